"""What several test files share."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from workflow import ROOT, checkout, snakemake

# The same examples each time, about a minute in all; `--hypothesis-profile=long` looks at others, and at more.
EVERYWHERE = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
settings.register_profile("ci", max_examples=100, derandomize=True, **EVERYWHERE)
settings.register_profile("long", max_examples=5000, print_blob=True, **EVERYWHERE)
settings.load_profile("ci")


def examples(count: int) -> settings:
    """Settings for `count` examples; 50 times as many under `--hypothesis-profile=long`."""
    return settings(max_examples=count * settings.default.max_examples // 100)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real models and datasets that nobody in this project wrote, kept beside the repository."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the shared data is not beside the repository")
    return folder


@pytest.fixture
def run_script():
    """Run a stage as a rule does: `run_script("prepare", "--train", path, ...)` -> returncode, stdout, stderr."""

    def run(name: str, *arguments, **options) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)

    return run


# In the environment of the demo; nothing that looks like a real one.
SECRETS = {
    "HF_TOKEN": "a-token-of-the-tests-1",
    "MY_PASSWORD": 'a "password" of the tests',
    "SIGNING_KEY": "a-key-of-the-tests",
}


@pytest.fixture(scope="session")
def watched_demo(tmp_path_factory):
    """(a checkout in which the demo has run, a folder with what it did elsewhere: HOME, TMPDIR, audit.jsonl)."""
    folder = checkout(tmp_path_factory.mktemp("demo"))
    beside = tmp_path_factory.mktemp("beside")
    with pytest.MonkeyPatch.context() as environment:
        for name, value in SECRETS.items():
            environment.setenv(name, value)
        for name in ("HOME", "TMPDIR"):
            (beside / name).mkdir()
            environment.setenv(name, str(beside / name))
        environment.setenv("AUDIT", str(beside / "audit.jsonl"))
        environment.setenv("PYTHONPATH", str(ROOT / "tests" / "audit"), prepend=os.pathsep)
        snakemake(folder, "results/demo/metrics.json")
    return folder, beside


@pytest.fixture(scope="session")
def demo(watched_demo):
    """A checkout in which the demo has run."""
    return watched_demo[0]


@pytest.fixture
def again(demo, tmp_path):
    """A copy of it, for a test that changes something. Times stay, as Snakemake looks at them."""
    shutil.copytree(demo, tmp_path / "demo", copy_function=shutil.copy2)
    return tmp_path / "demo"
