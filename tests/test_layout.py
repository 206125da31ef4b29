"""The tests themselves: all of them can be collected together, and each file has a name and a size that a reader can keep."""

import re
import subprocess
import sys
from collections import Counter

import pytest
from workflow import ROOT

FILES = sorted(path for path in (ROOT / "tests").rglob("*.py") if path.name not in ("conftest.py", "__init__.py"))


@pytest.mark.slow
def test_all_tests_are_collected_in_one_process():
    """`-P` keeps the working directory off Python's path, where only `python -m pytest` puts it."""
    command = [sys.executable, "-P", "-m", "pytest", "--collect-only", "-qq", "-m", "", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_no_two_test_files_share_a_name():
    names = Counter(path.name for path in FILES if path.name.startswith("test_"))
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "tests")))
def test_a_file_is_short_and_imports_no_tests(path):
    """What two files share stands in a helper, or in a conftest.py if it is a fixture."""
    text = path.read_text()
    assert len(text.splitlines()) <= 500
    assert re.findall(r"^\s*(?:from|import) (?:test_\w+|conftest)\b.*", text, re.MULTILINE) == []


def test_ci_first_gives_the_commands_of_the_readme():
    """What a newcomer types, with nothing before it that would prepare the machine and nothing added."""
    lines = [
        line
        for line in (ROOT / ".ci/run").read_text().splitlines()
        if line and not line.startswith(("#", "set ", "cd "))
    ]
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"^    (make (?:demo|test))\b", readme, re.MULTILINE)
    assert commands == ["make demo", "make test"] == lines[:2]
