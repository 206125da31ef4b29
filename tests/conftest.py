"""What several test files share."""

import subprocess
import sys
from pathlib import Path

import pytest
from workflow import ROOT, checkout, snakemake


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


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A checkout in which the demo has run."""
    folder = checkout(tmp_path_factory.mktemp("demo"))
    snakemake(folder, "results/demo/metrics.json")
    return folder
