"""The real Apptainer: the image is built, the demo runs in it as it does outside, and the container sees no more than it needs.

Needs root, `apptainer` and the tools of the folder `shared` beside the checkout, which make a Debian to build on. The image
is kept in a folder beside the checkout (MOULT_TEST_CACHE names another), under a hash of what it is made of.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from apptainer import BASE_MAKER, CACHE, NOBODY, TARGET, contained, give_to_nobody, inside, make_image, processes, wait
from workflow import ROOT, checkout, measured, snakemake

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("apptainer"), reason="Apptainer is not installed"),
]


# --- the image --------------------------------------------------------------------------------------------------------


def test_the_image_says_what_it_is_and_tests_itself(sif):
    from moult import __version__

    shown = subprocess.run(["apptainer", "inspect", "--json", sif], capture_output=True, text=True, check=True).stdout
    labels = json.loads(shown)["data"]["attributes"]["labels"]
    labels = {name.rpartition(".")[2]: value for name, value in labels.items() if "opencontainers" in name}
    assert (labels["title"], labels["version"], labels["licenses"]) == ("moult-train", __version__, "Apache-2.0")
    assert labels["source"] and labels["revision"]
    tested = subprocess.run(["apptainer", "test", sif], capture_output=True, text=True)
    assert tested.returncode == 0 and re.search(rf"^  moult +{__version__}$", tested.stdout, re.MULTILINE)


def test_the_image_has_the_pinned_packages(sif):
    rows = [row.partition("#")[0].strip() for row in (ROOT / "envs/constraints.txt").read_text().splitlines()]
    pins = dict(row.lower().replace("_", "-").split("==") for row in rows if row)
    found = inside(sif, "python", "-m", "pip", "freeze").lower().replace("_", "-")
    for name, version in re.findall(r"^(\S+)==([\w.]+)", found, re.MULTILINE):
        assert name in ("setuptools", "pip") or pins[name] == version


def test_the_image_has_what_triton_compiles_with(sif):
    """Kernels are compiled at first use, on a node without network."""
    source = "'#include <Python.h>\\nint main(void) { return 0; }\\n'"
    include = "-I$(python -c 'import sysconfig; print(sysconfig.get_path(\"include\"))')"
    inside(sif, "bash", "-c", f"printf {source} | gcc {include} -x c -shared -fPIC -o /tmp/test-of-the-image.so -")
    Path("/tmp/test-of-the-image.so").unlink()


def test_a_build_that_fails_leaves_no_image(base, tmp_path):
    """The self-test is the last thing that can fail, and the base's Python the first."""
    empty = tmp_path / "base"
    subprocess.run(["cp", "-a", base, empty], check=True)
    (empty / "usr/bin/apt-get").write_text("#!/bin/sh\nexit 100\n")
    done = make_image(tmp_path, empty)
    assert done.returncode and not list((tmp_path / "containers").glob("*.sif*")), done.stderr


# --- the demo ---------------------------------------------------------------------------------------------------------


def test_the_demo_in_containers_gives_the_same(contained_demo, demo):
    """The same bytes; of what metrics.json tells, only the version of Python may differ."""
    folder, _ = contained_demo
    for path in (
        "adapter/adapter_model.safetensors",
        "merged/model.safetensors",
        "samples.jsonl",
        "tokens/train.parquet",
    ):
        ours, theirs = folder / "results/demo" / path, demo / "results/demo" / path
        assert ours.read_bytes() == theirs.read_bytes(), path
    ours, theirs = measured(folder), measured(demo)
    assert ours["provenance"]["versions"].pop("python") == inside_version(folder)
    del theirs["provenance"]["versions"]["python"]
    assert ours == theirs


def inside_version(folder: Path) -> str:
    (image,) = (folder / "containers").glob("*.sif")
    return inside(image, "python", "-c", "import platform; print(platform.python_version())").strip()


def test_each_stage_ran_inside_and_nothing_of_the_host_got_in(contained_demo, poisoned, tmp_path):
    folder, said = contained_demo
    stages = {
        "fetch_model",
        "prepare",
        "contamination",
        "encode",
        "plan",
        "finetune",
        "merge",
        "evaluate_model",
        "score",
    }
    assert said.count("Activating singularity image") == 10
    started = (folder / "poisoned.txt").read_text()
    assert "snakemake" in started and not any(f"scripts/{stage}.py" in started for stage in stages)
    # The same run outside: the poison does work.
    bare = checkout(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", poisoned["PYTHONPATH"])
        snakemake(bare, "results/prepared/demo/metadata.json")
    assert "scripts/prepare.py" in (bare / "poisoned.txt").read_text()


def test_the_demo_in_containers_leaves_nothing_in_the_checkout(contained_demo):
    folder, _ = contained_demo
    made = {path.name for path in folder.iterdir()} - {"poisoned.txt", ".cache"}  # the test's own
    before = {"Snakefile", "config", "profiles", "rules", "scripts", "slurm", "containers"}
    assert made - before == {"results", "logs", "benchmarks", ".snakemake"}


def test_the_demo_in_containers_is_not_run_again_outside(contained_demo):
    folder, _ = contained_demo
    for arguments in (["-n"], ["-n", "--use-singularity"], ["--use-singularity"], ["--profile", "profiles/local"]):
        assert "Nothing to be done" in snakemake(folder, TARGET, *arguments)


# --- before it starts, and when it is killed --------------------------------------------------------------------------


def test_without_the_image_one_message_and_no_job(tmp_path):
    folder = checkout(tmp_path)
    output = contained(folder, TARGET, code=1)
    said = output[output.index("Building DAG") :].splitlines()[1:]
    assert said == [
        "--use-singularity: the image does not exist: containers/moult-train-0.1.0.sif",
        "  -> `make image` builds the image of the training stages, `make serve-image` that of the server, "
        "`make benchmark-image` that of the benchmarks, `make export-image` that of the exports; `container`, "
        "`serve.container`, `eval.lm_eval.container` and `export.container` in the config name other images",
    ]
    assert not (folder / "results").exists()
    assert "finetune" in contained(folder, "-n", TARGET)


def test_a_killed_snakemake_leaves_no_process_in_a_container(contained_demo, tmp_path):
    folder = tmp_path / "demo"  # with what comes before the training
    shutil.copytree(contained_demo[0], folder, copy_function=shutil.copy2, symlinks=True)
    shutil.rmtree(folder / "results/demo/trainer_state")
    (folder / "mine.yaml").write_text("runs: {demo: {train: {max_steps: 100000}}}")
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--use-singularity",
        "--cores",
        "1",
        TARGET,
        "--configfile",
        "mine.yaml",
    ]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # where it leaves the container's /tmp
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=folder, env=environment, **silent)
    try:
        wait(lambda: (folder / "results/demo/trainer_state").is_dir() and "finetune.py" in processes(folder), 120)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait(lambda: not processes(folder), 30)


# --- the Dockerfile ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def docker_sif(base, open_folder):
    """The Dockerfile's image, made by buildah and turned into one that Apptainer runs: there is no daemon here."""
    if "MOULT_TEST_DOCKERFILE" not in os.environ:
        pytest.skip("takes some minutes: set MOULT_TEST_DOCKERFILE=1")
    image = open_folder / "docker.sif"
    arguments = ["-f", ROOT / "containers/Dockerfile", "--build-arg", "VERSION=0.1.0", "--build-arg", "REVISION=test"]
    command = [BASE_MAKER, "dockerfile", image, ROOT, *arguments]
    environment = {**os.environ, "TEST_IMAGE_CACHE": str(CACHE)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.search(r"^  torch +\d", done.stdout + done.stderr, re.MULTILINE), "the build did not run the self-test"
    return image


def test_the_whole_workflow_in_the_image_of_the_dockerfile(docker_sif, demo, open_folder):
    """With the command of containers/README.md, as `docker compose run` does it, for a user that the image does not know."""
    pattern = r"^    docker compose -f containers/compose\.yaml run --rm moult (.*)$"
    (command,) = re.findall(pattern, (ROOT / "containers/README.md").read_text(), re.MULTILINE)
    (open_folder / "moult").mkdir()
    folder = checkout(open_folder / "moult")
    give_to_nobody(folder)
    mounts = ["--containall", "--no-home", "--bind", f"{folder}:/work", "--pwd", "/work"]
    home = "export HOME=/tmp; "  # Docker has the image's, Apptainer sets its own
    run = ["apptainer", "exec", *mounts, docker_sif, "bash", "-c", home + command]
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    done = subprocess.run(run, capture_output=True, text=True, user=NOBODY, group=NOBODY, env=environment, cwd="/")
    assert done.returncode == 0, done.stderr[-3000:]
    for path in ("adapter/adapter_model.safetensors", "samples.jsonl"):
        made = folder / "results/demo" / path
        assert made.read_bytes() == (demo / "results/demo" / path).read_bytes() and made.stat().st_uid == NOBODY
