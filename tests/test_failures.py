"""failures: what the stages said last, in one table."""

import os
import subprocess
import sys
import time

import pytest

from moult.workflow.failures import failures_since, table

SCRIPT = """
import os, sys
sys.path.insert(0, {scripts!r})
from moult.errors import MoultError
from moult.run.stage import stage
with stage("prepare", "logs/d/{log}"):
    {body}
"""


@pytest.fixture
def attempt(tmp_path):
    def run(body: str, log: str = "prepare.log") -> None:
        from workflow import ROOT

        script = SCRIPT.format(scripts=str(ROOT / "scripts"), body=body, log=log)
        subprocess.run([sys.executable, "-c", script], cwd=tmp_path, stderr=subprocess.DEVNULL)

    return run


def found(tmp_path, since: float = 0.0) -> list[tuple]:
    return [failure[:3] for failure in failures_since(since, tmp_path / "logs")]


def test_what_was_said(attempt, tmp_path):
    attempt("raise MoultError('rows.jsonl: bad\\n  - twice', 'mend it (log: no)')")
    assert found(tmp_path) == [("prepare", "rows.jsonl: bad\n  - twice", "mend it (log: no)")]


def test_an_error_without_advice_and_one_of_ours(attempt, tmp_path):
    attempt("raise MoultError('bad')")
    assert found(tmp_path) == [("prepare", "bad", "")]
    attempt("1 / 0")
    assert found(tmp_path)[0][1] == "ZeroDivisionError: division by zero"


def test_unfinished_and_interrupted(attempt, tmp_path):
    attempt("raise MoultError('stopped by SIGTERM', 'run it again', 75)")
    assert found(tmp_path) == [("prepare", "unfinished: stopped by SIGTERM", "run it again")]
    attempt("raise KeyboardInterrupt")
    assert found(tmp_path) == [("prepare", "interrupted; run the same command again to go on", "")]


@pytest.mark.parametrize(
    ("rank0", "rank1"),
    [
        ("raise MoultError('bad')", "raise SystemExit(75)"),
        ("raise SystemExit(75)", "raise MoultError('bad')"),
        ("raise MoultError('bad')", "os.kill(os.getpid(), 9)"),
    ],
)
def test_of_several_processes_the_one_that_has_failed_counts(rank0, rank1, attempt, tmp_path):
    attempt(rank0)
    attempt(rank1, "prepare.log.rank1")
    (tmp_path / "logs/d/attempts/notes.log").touch()
    for log in (tmp_path / "logs/d/attempts").iterdir():
        until = time.time() + (".log-" in log.name)
        os.utime(log, (until, until))
    assert found(tmp_path) == [("prepare", "bad", "")]


def test_killed_without_a_word(attempt, tmp_path):
    attempt("os.kill(os.getpid(), 9)")
    assert found(tmp_path) == [
        ("prepare", "killed without a word, most often for want of memory", "give it more memory")
    ]


def test_only_the_last_attempt_counts(attempt, tmp_path):
    attempt("raise MoultError('bad')")
    attempt("pass")
    assert found(tmp_path) == []


def test_one_at_work_has_not_failed(attempt, tmp_path):
    attempt("os.kill(os.getpid(), 9)")
    log = next((tmp_path / "logs/d/attempts").iterdir())
    log.rename(log.with_name(f"prepare-20260101T000000-{os.getpid()}.log"))
    assert found(tmp_path) == []


def test_what_failed_before_the_start_is_left_out(attempt, tmp_path):
    attempt("raise MoultError('bad')")
    assert found(tmp_path, since=2e9 * 2) == []


def test_table_fits_the_terminal_and_breaks_no_path(attempt, tmp_path):
    path = "results/" + "x" * 90
    attempt(f"raise MoultError('{path}: ' + 'word ' * 40, 'mend ' * 30)")
    runs = [f"run-{number}" for number in range(30)]
    lines = table([f._replace(runs=runs) for f in failures_since(0.0, tmp_path / "logs")], 100).splitlines()
    assert any(path in line for line in lines)
    assert all(len(line) <= 100 for line in lines if path not in line and "log:" not in line)
    assert "and 22 more" in " ".join(line[:24].strip() for line in lines)
