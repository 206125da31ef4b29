"""What the containers see, as far as it can be told without Apptainer; tests/integration/test_apptainer.py looks inside."""

import csv
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from recipes import files_of_definition, files_of_dockerfile, recipe
from workflow import ROOT, snakemake

from moult.errors import MoultError
from moult.workflow.code import closure
from moult.workflow.config import ConfigError, load_schema, resolve
from moult.workflow.container import check_image, environment, identity

SCHEMA = load_schema(str(ROOT / "config"))
DIGEST = "sha256:" + "0" * 64


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A home with a checkout in it, which is the working directory, and folders beside it."""
    for name in ("home/checkout", "data", "models/org/m", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("data/rows.jsonl", "data/private", "models/org/m/config.json", "home/ca.pem", "home/secret"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path / "home" / "checkout")
    for name in list(os.environ):
        if not name.startswith("PATH"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


def mounted(machine: Path, **config) -> dict[str, tuple[str, str]]:
    """{where in the container: (what of the machine, ro or rw)}, relative to the test's folder."""
    whole = {"model": {"name": "org/m"}, "datasets": {"d": {"source": "a/b"}}, **config}
    variables = environment(resolve(whole, SCHEMA), ["results"], machine / "scratch")
    (text,) = (value for name, value in variables.items() if name.endswith("_MOUNT") and "NO_" not in name)
    found = {}
    for _, source, destination, mode in csv.reader(text.splitlines()):
        pair = [field.partition("=")[2].replace(f"{machine}/", "") for field in (destination, source)]
        found[pair[0]] = (pair[1], "ro" if mode == "ro" else "rw")
    return found


NOTHING_BUT = {
    "/tmp": ("scratch/tmp", "rw"),
    "/var/tmp": ("scratch/tmp", "rw"),
    "home": ("scratch/home", "rw"),
    "home/checkout": ("home/checkout", "rw"),
}


def test_the_checkout_is_seen_and_neither_home_nor_tmp(machine):
    assert mounted(machine) == NOTHING_BUT


def test_what_the_config_names_is_seen_and_not_what_lies_beside_it(machine):
    (machine / "home/template.jinja").touch()
    found = mounted(
        machine,
        datasets={"d": {"source": str(machine / "data/rows.jsonl"), "val_source": "gone.jsonl", "test_source": None}},
        paths={"models": str(machine / "models")},
        network={"tls": "~/ca.pem"},
        model={"name": "org/m", "chat_template": "~/template.jinja"},
    )
    assert found == {
        **NOTHING_BUT,
        "data/rows.jsonl": ("data/rows.jsonl", "ro"),
        "models": ("models", "ro"),
        "home/ca.pem": ("home/ca.pem", "ro"),
        "home/template.jinja": ("home/template.jinja", "ro"),
    }


@pytest.mark.parametrize("source", ["{}/data", "{}/data/*.jsonl", ["{}/data/rows.jsonl", {"path": "{}/data"}]])
def test_a_folder_is_seen_whole_and_of_a_pattern_its_folder(machine, source):
    found = mounted(machine, datasets={"d": {"source": json.loads(json.dumps(source).replace("{}", str(machine), 2))}})
    assert found == {**NOTHING_BUT, "data": ("data", "ro")}


def test_links_that_lead_out_of_the_checkout_lead_to_the_same_inside(machine):
    Path("rows.jsonl").symlink_to(machine / "elsewhere/link.jsonl")
    (machine / "elsewhere/link.jsonl").symlink_to("../data/rows.jsonl")
    Path("results").symlink_to(machine / "elsewhere/results")
    (machine / "elsewhere/results").mkdir()
    assert mounted(machine, datasets={"d": {"source": "rows.jsonl"}}) == {
        **NOTHING_BUT,
        "data/rows.jsonl": ("data/rows.jsonl", "ro"),
        "elsewhere/link.jsonl": ("data/rows.jsonl", "ro"),
        "elsewhere/results": ("elsewhere/results", "rw"),
    }


def test_a_model_in_the_hubs_cache_is_links_to_another_folder(machine):
    snapshot = machine / "cache/snapshots/abc"
    snapshot.mkdir(parents=True)
    (machine / "cache/blobs").mkdir()
    (machine / "cache/blobs/1").touch()
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    assert mounted(machine, model={"name": str(snapshot)}) == {
        **NOTHING_BUT,
        "cache/snapshots/abc": ("cache/snapshots/abc", "ro"),
        "cache/blobs": ("cache/blobs", "ro"),
    }


def test_results_within_a_folder_that_is_only_read_can_be_written(machine):
    results = machine / "models/results"
    whole = {"model": {"name": "org/m"}, "datasets": {}, "paths": {"models": str(machine / "models")}}
    text = "\n".join(environment(resolve(whole, SCHEMA), [str(results)], machine / "scratch").values())
    assert f"destination={machine}/models,ro" in text
    assert f"destination={results},type=bind" in text and results.is_dir()


def test_names_with_a_comma_or_a_colon(machine):
    (machine / "a,b: c").mkdir()
    (machine / "a,b: c" / "rows.jsonl").touch()
    found = mounted(machine, datasets={"d": {"source": str(machine / "a,b: c" / "rows.jsonl")}})
    assert found["a,b: c/rows.jsonl"] == ("a,b: c/rows.jsonl", "ro")


def test_what_is_passed_on_of_the_environment(machine, monkeypatch):
    (machine / "hub").mkdir()
    (machine / "certificates.pem").touch()
    passed = {
        "HF_HOME": str(machine / "hub"),
        "SSL_CERT_FILE": str(machine / "certificates.pem"),
        "HF_TOKEN": "a-token",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "SLURM_JOB_ID": "7",
        "SLURM_SUBMIT_DIR": str(machine / "home"),
        "MASTER_ADDR": "n1",
        "RANK": "0",
        "MOULT_STARTED_BY": "1@pid",
    }
    outside = {
        "PYTHONPATH": "/p",
        "PYTHONHOME": "/p",
        "LD_LIBRARY_PATH": "/p",
        "LD_PRELOAD": "/p",
        "VIRTUAL_ENV": "/p",
        "CUDA_HOME": "/p",
        "XDG_CACHE_HOME": "/p",
        "TMPDIR": "/p",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    for name, value in {**passed, **outside}.items():
        monkeypatch.setenv(name, value)
    whole = resolve({"model": {"name": "org/m"}, "datasets": {}}, SCHEMA)
    variables = environment(whole, ["results"], machine / "scratch")
    told = {name.partition("ENV_")[2]: value for name, value in variables.items() if "ENV_" in name}
    assert told == passed
    found = mounted(machine)
    assert found["hub"] == ("hub", "rw") and found["certificates.pem"] == ("certificates.pem", "ro")
    assert found["home"] == ("scratch/home", "rw")


def test_the_token_that_lies_in_the_home_is_seen(machine):
    token = machine / "home/.cache/huggingface/token"
    token.parent.mkdir(parents=True)
    token.touch()
    place = "home/.cache/huggingface/token"
    assert mounted(machine) == {**NOTHING_BUT, place: (place, "ro")}


# --- the image --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("container", "is_one"),
    [
        ("containers/moult-train-0.1.0.sif", True),
        ("/images/moult.sif", True),
        (f"docker://registry.example/moult-train@{DIGEST}", True),
        (f"oras://registry.example/moult-train:1@{DIGEST}", True),
        ("docker://registry.example/moult-train:latest", False),
        (f"docker://registry.example/moult-train@{DIGEST[:-1]}", False),
        ("registry.example/moult-train", False),
        ("my image.sif", False),
    ],
)
def test_an_image_is_a_file_or_has_a_digest(container, is_one):
    config = {"model": {"name": "m"}, "container": container}
    if is_one:
        assert resolve(config, SCHEMA)["container"] == container
        return
    with pytest.raises(ConfigError) as error:
        resolve(config, SCHEMA)
    (problem,) = error.value.problems
    assert problem.startswith("container: ") and "a local .sif file, or a registry URL with a digest" in problem


def test_the_identity_of_an_image_is_no_place():
    assert identity("containers/moult-train-0.1.0.sif") == identity("/images/moult-train-0.1.0.sif")
    assert identity(f"docker://a/b@{DIGEST}") == identity(f"oras://mirror/b:1@{DIGEST}") == DIGEST


def test_a_missing_image_and_a_missing_apptainer(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MoultError, match="neither apptainer nor singularity is on the PATH\n  -> install Apptainer"):
        check_image("moult.sif")
    (tmp_path / "singularity").touch(mode=0o755)
    with pytest.raises(MoultError, match=r"the image does not exist: moult\.sif\n  -> `make image` builds"):
        check_image("moult.sif")
    check_image(f"docker://a/b@{DIGEST}")


@pytest.mark.slow
def test_runs_with_and_without_containers_agree(demo, tmp_path):
    """On a machine with neither Apptainer nor an image. A new image is seen either way, a moved one is none."""
    folder = tmp_path / "demo"
    shutil.copytree(demo, folder, copy_function=shutil.copy2)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PATH", "/usr/bin:/bin")
        if shutil.which("apptainer") or shutil.which("singularity"):
            pytest.skip("Apptainer is in /usr/bin")
        for image, arguments, reruns in (
            ("containers/moult-train-0.1.0.sif", ["--use-singularity"], False),
            ("/images/moult-train-0.1.0.sif", [], False),
            ("containers/moult-train-0.2.0.sif", [], True),
            ("containers/moult-train-0.2.0.sif", ["--use-singularity"], True),
        ):
            (folder / "mine.yaml").write_text(f"container: {image}")
            output = snakemake(folder, "-n", "results/demo/metrics.json", *arguments, "--configfile", "mine.yaml")
            assert ("Nothing to be done" in output) != reruns
            assert not reruns or re.search(r"^finetune +1$", output, re.MULTILINE)


# --- the recipes ------------------------------------------------------------------------------------------------------


RECIPES = [("train.def", "Dockerfile"), ("serve.def", "Dockerfile.serve")]


@pytest.mark.parametrize(("definition", "dockerfile"), RECIPES)
def test_the_two_recipes_make_the_same(definition, dockerfile):
    assert files_of_definition(definition) == files_of_dockerfile(dockerfile)
    for path in files_of_definition(definition):
        assert (ROOT / path).is_file()
    base = re.search(r"^    BASE_IMAGE=(\S+)$", recipe(definition), re.MULTILINE)[1]
    assert re.fullmatch(r"docker\.io/\S+@sha256:[0-9a-f]{64}", base)
    assert f"\nARG BASE_IMAGE={base}\n" in recipe(dockerfile)
    labels = set(re.findall(r"org\.opencontainers\.image\.\w+", recipe(definition)))
    assert labels == set(re.findall(r"org\.opencontainers\.image\.\w+", recipe(dockerfile)))
    assert {"version", "source", "revision", "licenses", "title"} <= {label.rpartition(".")[2] for label in labels}


@pytest.mark.parametrize("name", ["benchmark", "export"])
def test_an_image_without_a_dockerfile_has_its_own_environment_on_the_same_base(name):
    text = recipe(f"{name}.def")
    assert files_of_definition(f"{name}.def") == {
        "containers/install.sh",
        f"envs/{name}-constraints.txt",
        f"envs/{name}.txt",
    }
    assert all((ROOT / path).is_file() for path in files_of_definition(f"{name}.def"))
    base = re.compile(r"^    BASE_IMAGE=\S+$", re.MULTILINE)
    assert base.search(text)[0] == base.search(recipe("train.def"))[0]
    default = resolve({"model": {"name": "m"}, "datasets": {"d": {"source": "a/b"}}}, SCHEMA)["runs"]["d"]
    section = default["export"] if name == "export" else default["eval"]["lm_eval"]
    made = subprocess.run(["make", "-n", "-B", f"{name}-image"], cwd=ROOT, capture_output=True, text=True).stdout
    assert f"mv {section['container']}.part {section['container']}" in made
    # What the self-test asks for is pinned.
    asked = re.findall(r'"([\w-]+)"', re.search(r"for name in \((.*)\)", text)[1]) if name == "export" else ["lm_eval"]
    pinned = (ROOT / f"envs/{name}-constraints.txt").read_text()
    assert [package for package in asked if not re.search(rf"^{package}==", pinned, re.MULTILINE)] == []


def test_the_self_test_has_the_modules_that_it_imports():
    """The image holds no more of the workflow than that."""
    modules = closure("tools/print_runtime.py", lambda path: (ROOT / "scripts" / path).read_text())
    found = {"scripts/tools/_library.py", *(f"scripts/{path}" for path in modules)}
    for definition, _ in RECIPES:
        assert found == {path for path in files_of_definition(definition) if path.startswith("scripts/")}


def test_the_context_of_docker_holds_what_is_copied():
    """`.dockerignore` lets through what the Dockerfiles copy, and no results, no model, no .git."""
    patterns = (ROOT / ".dockerignore").read_text().split("\n")
    assert "*" in patterns
    allowed = [line.removeprefix("!") for line in patterns if line.startswith("!")]
    for path in (path for _, dockerfile in RECIPES for path in files_of_dockerfile(dockerfile)):
        assert any(Path(path).match(pattern) for pattern in allowed), path


def test_images_bear_the_version():
    from moult import __version__

    default = resolve({"model": {"name": "m"}}, SCHEMA)["container"]
    assert default == f"containers/moult-train-{__version__}.sif"
    made = subprocess.run(["make", "-n", "docker-image", "DOCKER=true"], cwd=ROOT, capture_output=True, text=True)
    assert f"--tag moult-train:{__version__} ." in made.stdout and f"--build-arg VERSION={__version__} " in made.stdout
    compose = yaml.safe_load(recipe("compose.yaml"))
    assert compose["services"]["moult"]["image"] == f"moult-train:${{MOULT_VERSION:-{__version__}}}"


def test_what_is_missing_to_build_an_image_is_said(tmp_path):
    (tmp_path / "sed").symlink_to(shutil.which("sed"))
    (tmp_path / "sh").symlink_to(shutil.which("sh"))
    for target, said in (("image", "apptainer is not installed"), ("docker-image", "docker is not installed")):
        environment = {**os.environ, "PATH": str(tmp_path)}
        command = [shutil.which("make"), "-B", target]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
        assert done.returncode and said in done.stdout, done


# --- Docker -----------------------------------------------------------------------------------------------------------


def compose(*, environment=()) -> dict:
    """What docker compose makes of the file; the stand-alone program will do."""
    program = shutil.which("docker-compose")
    if program is None:
        pytest.skip("docker-compose is not installed")
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    command = [program, "-f", "containers/compose.yaml", "--profile", "train", "config"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**kept, **dict(environment)})
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


@pytest.mark.slow
def test_docker_compose_reads_the_file_and_gives_the_callers_rights_only(tmp_path):
    services = compose(environment={"UID": "4321", "GID": "99", "HF_HOME": str(tmp_path)})["services"]
    for name in ("moult", "moult-gpu"):
        service = services[name]
        assert service["user"] == "4321:99" and service["cap_drop"] == ["ALL"]
        assert "privileged" not in service and not service.get("ports") and service["working_dir"] == "/work"
        volumes = sorted(str(volume) for volume in service["volumes"])
        assert len(volumes) == 2 and all(
            any(str(folder) in volume for volume in volumes) for folder in (ROOT, tmp_path)
        )
        assert ("gpu" in str(service.get("deploy"))) == (name == "moult-gpu")


@pytest.mark.slow
def test_docker_compose_without_any_variable():
    whole = compose()
    assert whole["services"]["moult"]["user"] == "1000:1000" and "huggingface" in whole["volumes"]
    assert not whole["services"]["moult"]["environment"].get("HF_TOKEN")
