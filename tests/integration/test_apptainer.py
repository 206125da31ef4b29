"""The real Apptainer: the image is built, the demo runs in it as it does outside, and the container sees no more than it needs.

Needs root, `apptainer` and the tools of the folder `shared` beside the checkout, which make a Debian to build on. The image
is kept in a folder beside the checkout (MOULT_TEST_CACHE names another), under a hash of what it is made of.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from test_container import files_of_definition
from workflow import ROOT, checkout, snakemake, write_rows

CACHE = Path(os.environ.get("MOULT_TEST_CACHE", ROOT.parent / "moult-test-cache")).absolute()
BASE_MAKER = ROOT.parent / "shared" / "tools" / "make-test-image.sh"
TARGET = "results/demo/metrics.json"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("apptainer"), reason="Apptainer is not installed"),
]


# --- the image --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A Debian to build on, with this machine's settings of pip in it: no registry can be reached from a test."""
    if not BASE_MAKER.exists() or os.geteuid():
        pytest.skip("the maker of a base image is not beside the repository, or this is not root")
    CACHE.mkdir(exist_ok=True)
    environment = {**os.environ, "TEST_IMAGE_CACHE": str(CACHE)}
    subprocess.run([BASE_MAKER, "tar", CACHE / "base.tar"], check=True, env=environment)
    folder = tmp_path_factory.mktemp("base")
    subprocess.run(["tar", "-C", folder, "--exclude=./dev/*", "-xpf", CACHE / "base.tar"], check=True)
    shutil.copy("/etc/ssl/certs/ca-certificates.crt", folder / "etc/test-ca.crt")
    settings = ["[global]", "cert = /etc/test-ca.crt"]
    for name in ("index-url", "extra-index-url", "find-links"):
        if value := pip_setting(name):
            settings.append(f"{name} = {value}")
    (folder / "etc/pip.conf").write_text("\n".join(settings) + "\n")
    for local in local_packages():
        (folder / local.relative_to("/")).mkdir(parents=True, exist_ok=True)
    return folder


def pip_setting(name: str) -> str:
    command = [sys.executable, "-m", "pip", "config", "get", f"global.{name}"]
    return " ".join(subprocess.run(command, capture_output=True, text=True).stdout.split())


def local_packages() -> list[Path]:
    """Folders of this machine that pip is told to look in."""
    words = f"{pip_setting('extra-index-url')} {pip_setting('find-links')}".split()
    folders = [Path(word.removeprefix("file://")) for word in words if re.match(r"(file://)?/", word)]
    return [folder.parent if folder.name == "simple" else folder for folder in folders]


def make_image(folder: Path, base: Path, **environment) -> subprocess.CompletedProcess:
    """`make image` in a checkout."""
    for name in ("containers", "envs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.sif"))
    shutil.copy(ROOT / "Makefile", checkout(folder))
    environment = {
        **os.environ,
        "APPTAINER_BINDPATH": ",".join(map(str, local_packages())),
        "APPTAINER_MKSQUASHFS_ARGS": "-comp zstd -Xcompression-level 3",  # a quarter of the time
        "APPTAINER_TMPDIR": str(folder),
        **environment,
    }
    command = ["make", "image", f"BASE_IMAGE={base}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="session")
def sif(base, tmp_path_factory):
    """The image that `make image` makes, or has made."""
    from moult import __version__

    inputs = {"containers/train.def", *files_of_definition("train.def")}
    content = hashlib.sha256(b"".join((ROOT / path).read_bytes() for path in sorted(inputs))).hexdigest()[:16]
    kept = CACHE / f"train-{content}.sif"
    if not kept.exists():
        folder = tmp_path_factory.mktemp("image")
        done = make_image(folder, base)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert re.search(r"^  torch +\d", done.stdout, re.MULTILINE), "the build did not run the self-test"
        assert [path.name for path in (folder / "containers").glob("*.sif*")] == [f"moult-train-{__version__}.sif"]
        for old in CACHE.glob("train-*.sif"):
            old.unlink()
        shutil.move(folder / "containers" / f"moult-train-{__version__}.sif", kept)
    return kept


def inside(sif: Path, *command: str) -> str:
    return subprocess.run(["apptainer", "exec", sif, *command], capture_output=True, text=True, check=True).stdout


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

# Python runs it at its start, wherever PYTHONPATH leads there, and for an interpreter without a site of the user's
# excluded also from ~/.local: it tells which interpreter has started with which script.
POISON = """
import os, sys
with open(os.environ.get("POISONED", "poisoned.txt"), "a") as file:
    file.write(f"{sys.prefix} {sys.orig_argv}\\n")
"""


@pytest.fixture(scope="session")
def poisoned(tmp_path_factory):
    """An environment in which every Python of the host is told what it must not be told in a container."""
    folder = tmp_path_factory.mktemp("poison")
    for place, module in (("path", "sitecustomize"), ("home/.local/lib/python3.%d/site-packages", "usercustomize")):
        for minor in range(11, 15) if "%" in place else [0]:
            path = folder / (place % minor if "%" in place else place) / f"{module}.py"
            path.parent.mkdir(parents=True)
            path.write_text(POISON)
    library = folder / "lib"
    library.mkdir()
    (library / "libz.so.1").write_text("no library")
    return {"PYTHONPATH": str(folder / "path"), "HOME": str(folder / "home"), "LD_LIBRARY_PATH": str(library)}


@pytest.fixture
def folder(tmp_path, sif):
    """A checkout with the image where the config has it."""
    folder = tmp_path / "moult"
    folder.mkdir()
    return with_image(folder, sif)


def with_image(folder: Path, sif: Path) -> Path:
    from moult import __version__

    (checkout(folder) / "containers").mkdir()
    (folder / "containers" / f"moult-train-{__version__}.sif").symlink_to(sif)
    return folder


def contained(folder: Path, *arguments: str, environment=(), code: int | None = 0) -> str:
    """`snakemake --use-singularity`, with these variables."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in dict(environment).items():
            patch.setenv(name, value)
        return snakemake(folder, "--use-singularity", *arguments, code=code)


@pytest.fixture(scope="session")
def contained_demo(sif, poisoned, tmp_path_factory):
    """(a checkout in which the demo has run in containers, what Snakemake has said)."""
    folder = with_image(tmp_path_factory.mktemp("contained"), sif)
    # Snakemake itself needs a library path that works; the stages are what this is about.
    environment = {name: value for name, value in poisoned.items() if name != "LD_LIBRARY_PATH"}
    return folder, contained(folder, TARGET, environment=environment)


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
    ours, theirs = (json.loads((root / TARGET).read_text()) for root in (folder, demo))
    assert ours["provenance"]["versions"].pop("python") == inside_version(folder)
    del theirs["provenance"]["versions"]["python"]
    assert ours == theirs


def inside_version(folder: Path) -> str:
    (image,) = (folder / "containers").glob("*.sif")
    return inside(image, "python", "-c", "import platform; print(platform.python_version())").strip()


def test_each_stage_ran_inside_and_nothing_of_the_host_got_in(contained_demo, poisoned, tmp_path):
    folder, said = contained_demo
    stages = {"fetch_model", "prepare", "encode", "plan", "finetune", "merge", "evaluate_model", "score"}
    assert said.count("Activating singularity image") == 9
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


@pytest.mark.skipif(
    os.environ.get("MOULT_TEST_SLURM") != "1" or not shutil.which("sbatch"),
    reason="needs a Slurm for tests, and MOULT_TEST_SLURM=1",
)
def test_on_a_cluster_too(folder):
    """What a container sees is worked out on the node where it runs."""
    quick = ("--profile", "slurm", "--latency-wait", "5", "--slurm-init-seconds-before-status-checks", "3")
    snakemake(folder, "--use-singularity", *quick, "--slurm-keep-successful-logs", "results/demo/plan.json", cores=None)
    (log,) = (folder / "logs/slurm").rglob("*.log")
    assert log.read_text().count("Activating singularity image") == 3  # prepare, encode, plan
    assert json.loads((folder / "results/demo/plan.json").read_text())["steps"]["total"] == 200


# --- what a container sees --------------------------------------------------------------------------------------------

PROBE = """
import json, os, sys
from pathlib import Path

def try_to_write(path):
    try:
        Path(path, "written").touch()
        return True
    except OSError:
        return False

looked_for = json.loads(sys.argv[1])
json.dump(
    {
        "environment": dict(os.environ),
        "python": sys.path,
        "seen": [path for path in looked_for if os.path.exists(path)],
        "written": [path for path in looked_for if os.path.isdir(path) and try_to_write(path)],
        "tmp": sorted(os.listdir("/tmp")),
    },
    open("results/probe.json", "w"),
)
"""


def probe(folder: Path, config: dict, paths: list, environment=()) -> dict:
    """What a rule of ours finds in its container: which of `paths` there are, and which can be written into."""
    (folder / "probe.py").write_text(PROBE)
    (folder / "mine.yaml").write_text(yaml.safe_dump(config))
    with (folder / "Snakefile").open("a") as file:
        file.write(f"\nrule probe:\n    params: paths={json.dumps(list(map(str, paths)))!r},\n")
        file.write("    shell: 'python probe.py {params.paths:q}'\n")
    contained(folder, "probe", "--configfile", "mine.yaml", environment=environment)
    return json.loads((folder / "results" / "probe.json").read_text())


def test_the_container_sees_what_it_needs_and_nothing_else(folder, tmp_path, poisoned):
    for name in ("home/.ssh", "home/.cache/huggingface", "data", "models/org/m", "hub", "store/results", "bystander"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("home/.ssh/id", "home/.cache/huggingface/token", "data/rows.jsonl", "data/other", "template.jinja"):
        (tmp_path / name).touch()
    (folder / "results").symlink_to(tmp_path / "store/results")
    config = {
        "model": {"name": "org/m", "chat_template": str(tmp_path / "template.jinja")},
        "datasets": {"demo": None, "d": {"source": "~/../data/rows.jsonl"}},
        "paths": {"models": str(tmp_path / "models")},
    }
    (folder / "here").mkdir()
    readable = ["data/rows.jsonl", "models/org/m", "template.jinja", "home/.cache/huggingface/token"]
    writable = ["hub", "store/results", "moult/here", "home"]
    hidden = ["home/.ssh", "data/other", "bystander", "store/other"]
    told = {
        "HF_HOME": str(tmp_path / "hub"),
        "HF_TOKEN_PATH": str(tmp_path / "home/.cache/huggingface/token"),
        "CUDA_VISIBLE_DEVICES": "3",
        "SLURM_JOB_ID": "17",
        "RANK": "0",
        "OMP_NUM_THREADS": "1",
    }
    environment = {"HOME": str(tmp_path / "home"), "PYTHONPATH": poisoned["PYTHONPATH"], "OTHER": "x", **told}
    looked_for = [tmp_path / name for name in (*readable, *writable, *hidden)]
    found = probe(folder, config, looked_for, environment)

    def names(paths):
        return {str(Path(path).relative_to(tmp_path)) for path in paths}

    assert names(found["seen"]) == {*readable, *writable}
    assert names(found["written"]) == set(writable)
    assert not (tmp_path / "home" / "written").exists(), "that was to be a home of the container's own"
    assert {name: found["environment"].get(name) for name in told} == told
    assert found["environment"]["HOME"] == environment["HOME"]
    assert not {"PYTHONPATH", "PYTHONHOME", "OTHER", "VIRTUAL_ENV"} & found["environment"].keys()
    assert str(poisoned["PYTHONPATH"]) not in found["python"] and not (folder / "poisoned.txt").read_text().count(
        "/opt/"
    )
    assert all(path.startswith((str(folder), "/usr/lib", "/opt/moult")) for path in found["python"])
    # Folders on the way to what is mounted there, and nothing of the machine's.
    assert set(found["tmp"]) <= {tmp_path.parts[2]} if tmp_path.is_relative_to("/tmp") else not found["tmp"]


def test_the_hosts_libraries_do_not_get_in(folder, poisoned):
    """Without the clean environment the container would have it: Apptainer drops LD_LIBRARY_PATH, and it is not passed on."""
    found = probe(folder, {}, [], {"APPTAINERENV_OWN": "mine"})
    assert found["environment"]["LD_LIBRARY_PATH"] == "/.singularity.d/libs"
    assert found["environment"]["OWN"] == "mine"  # what a user says to Apptainer stands
    assert found["environment"]["PYTHONNOUSERSITE"] == "1" and found["environment"]["PATH"].startswith(
        "/opt/moult/bin:"
    )


def test_data_and_a_model_outside_of_the_checkout(folder, tmp_path):
    """By a path, by `~`, through links; up to the token ids."""
    rows = [{"prompt": f"How many is {n} and {n}, please tell me?", "completion": f"It is {2 * n}."} for n in range(40)]
    (tmp_path / "home").mkdir()
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data", rows[:20])
    write_rows(tmp_path / "home", rows[20:], "more.jsonl")
    (folder / "linked.jsonl").symlink_to(tmp_path / "data" / "rows.jsonl")
    shutil.copytree(folder / "config/demo/base", tmp_path / "models/org/base")
    (tmp_path / "home/chatml.jinja").write_text((folder / "config/chat_templates/chatml.jinja").read_text())
    config = {
        "model": {"name": "org/base", "chat_template": "~/chatml.jinja"},
        "datasets": {"d": {"source": ["linked.jsonl", "~/more.jsonl"]}},
        "paths": {"models": str(tmp_path / "models"), "results": str(tmp_path / "out" / "results")},
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(config))
    report = tmp_path / "out/results/d/tokens/report.json"
    environment = {"HOME": str(tmp_path / "home")}
    contained(folder, str(report), "--configfile", "mine.yaml", environment=environment)
    assert json.loads((tmp_path / "out/results/prepared/d/metadata.json").read_text())["ledger"]["read"] == 40
    assert report.exists() and not (tmp_path / "home" / ".cache").exists()


def test_in_a_folder_of_the_home_and_as_a_module(sif, tmp_path):
    """Snakemake then keeps its copies of our scripts below the home, which the container sees otherwise empty."""
    ours = checkout(tmp_path / "moult")
    own = tmp_path / "home" / "own"
    own.mkdir(parents=True)
    rows = [{"prompt": f"How many is {n} and {n}, please tell me?", "completion": f"It is {2 * n}."} for n in range(40)]
    write_rows(own, rows)
    (own / "Snakefile").write_text(
        f"""
module moult:
    snakefile: {str(ours / "Snakefile")!r}
    config: {{"model": {{"name": "a/model"}}, "datasets": {{"d": {{"source": "rows.jsonl"}}}}, "container": {str(sif)!r}}}

use rule * from moult as moult_*
"""
    )
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--cores",
        "1",
        "--use-singularity",
        "results/prepared/d/metadata.json",
    ]
    environment = {**os.environ, "HOME": str(own.parent), "XDG_CACHE_HOME": str(own.parent / ".cache")}
    done = subprocess.run(command, cwd=own, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "Activating singularity image" in done.stderr, done.stderr[-3000:]


@pytest.fixture(scope="session")
def open_folder():
    """A folder that another user gets to; those of pytest are closed."""
    folder = Path(tempfile.mkdtemp(prefix="moult-test-", dir="/var/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


NOBODY = 65534


def give_to_nobody(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        os.chown(path, NOBODY, NOBODY)


def test_for_a_user_without_rights(sif, open_folder, monkeypatch):
    """Apptainer then works in a name space of the user's; home and checkout are mounted into one another all the same."""
    from moult.workflow.config import load_schema, resolve
    from moult.workflow.container import environment as environment_of

    folder = open_folder / "user"
    for name in ("home/checkout", "data"):
        (folder / name).mkdir(parents=True)
    for name in ("home/secret", "data/rows.jsonl", "data/secret"):
        (folder / name).touch()
    shutil.copy(sif, folder / "image.sif")
    monkeypatch.chdir(folder / "home" / "checkout")
    monkeypatch.setenv("HOME", str(folder / "home"))
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    config = {"model": {"name": "m"}, "datasets": {"d": {"source": str(folder / "data/rows.jsonl")}}}
    variables = environment_of(resolve(config, load_schema(str(ROOT / "config"))), ["results"], folder / "scratch")
    give_to_nobody(folder)
    script = "ls ~ ../../data; touch results/made /tmp/made; touch ../../data/rows.jsonl 2>&1 | grep -o Read-only.*"
    command = ["apptainer", "exec", "--home", str(Path.cwd()), folder / "image.sif", "bash", "-c"]
    command.append(f"export HOME={folder}/home; {script}")
    environment = {**variables, "PATH": os.environ["PATH"], "HOME": str(folder / "home")}
    done = subprocess.run(command, capture_output=True, text=True, user=NOBODY, group=NOBODY, env=environment)
    said = done.stdout.replace(str(folder), "").split("\n")
    assert said == ["../../data:", "rows.jsonl", "", "/home:", "checkout", "Read-only file system", ""], done
    assert Path("results/made").exists() and (folder / "scratch/tmp/made").exists()


# --- before it starts, and when it is killed --------------------------------------------------------------------------


def test_without_the_image_one_message_and_no_job(tmp_path):
    folder = checkout(tmp_path)
    output = contained(folder, TARGET, code=1)
    said = output[output.index("Building DAG") :].splitlines()[1:]
    assert said == [
        "--use-singularity: the image is not there: containers/moult-train-0.1.0.sif",
        "  -> `make image` builds the one of the training stages, `make serve-image` that of the server; `container` and "
        "`serve.container` in the config name others",
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


def processes(folder: Path) -> str:
    """The command lines of those that work in `folder`, in containers or not."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").readlink() == folder:
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return "\n".join(filter(None, found))


def wait(until, seconds: int) -> None:
    limit = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < limit, "not in time"
        time.sleep(0.2)


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
