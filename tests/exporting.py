"""What the tests of the exports share."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv-export" / "bin" / "python"


@pytest.fixture(scope="session")
def export_python() -> str:
    """The Python of the environment of the exports."""
    if not PYTHON.exists():
        pytest.skip("the environment of the exports is not there: make export-env")
    return str(PYTHON)
