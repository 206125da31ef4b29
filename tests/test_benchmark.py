"""The benchmarks run. What they measure is in BENCHMARKS.md: a test asserts no time."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_training_benchmark_writes_its_table(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- make bench -->\nold\n<!-- end of make bench -->\nafter\n")
    script = ROOT / "tests" / "benchmark_training.py"
    command = [sys.executable, script, "--tiny", "--rounds", "1", "--rows", "4", "--write", page]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    lines = page.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert [row[0] for row in rows[2:]] == ["Moult's defaults", "TRL's defaults", "bare loop"]
    assert rows[4][3] == rows[3][4] == "1.00"


def test_the_page_has_the_marks_and_the_table():
    text = (ROOT / "BENCHMARKS.md").read_text()
    table = text.split("<!-- make bench -->")[1].split("<!-- end of make bench -->")[0]
    assert "| Moult's defaults |" in table and "make bench" in text
