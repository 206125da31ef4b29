"""The torture test, as a command, with few kills. `python tests/torture/torture.py --help` says how to have many."""

import subprocess
import sys

import pytest
from workflow import ROOT


@pytest.mark.slow
def test_five_kills_are_survived(tmp_path):
    # The seed draws encode, merge, prepare and finetune (twice), and each kind of victim.
    table = tmp_path / "table.md"
    command = [sys.executable, str(ROOT / "tests" / "torture" / "torture.py"), "--kills", "5", "--seed", "8"]
    done = subprocess.run([*command, "--out", str(table)], cwd=tmp_path, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "| kills survived | **5 of 5** |" in table.read_text()
