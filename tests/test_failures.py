"""failures: how the stages' attempts ended, in one table."""

import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from running import begin, lay_out, run_stage

from moult.run.attempt import Attempt
from moult.workflow.failures import failures_since, table

ROOT = Path(__file__).resolve().parent.parent
LOG = "logs/d/demo.log"
KILLED = ("demo", "killed without an error message (usually out of memory)", "give it more memory")


@pytest.fixture
def attempt(tmp_path):
    return partial(run_stage, folder=tmp_path, log=LOG)


def found(folder: Path, since: float = 0.0) -> list[tuple]:
    return [failure[:3] for failure in failures_since(since, folder / "logs")]


def test_what_was_said(attempt, tmp_path):
    attempt("raise MoultError('rows.jsonl: bad\\n  - twice', 'fix it (log: no)')")
    (failure,) = failures_since(0.0, tmp_path / "logs")
    assert failure[:3] == ("demo", "rows.jsonl: bad\n  - twice", "fix it (log: no)")
    assert failure.log == Path(LOG)


def test_an_error_without_advice_and_one_of_ours(attempt, tmp_path):
    attempt("raise MoultError('bad')")
    assert found(tmp_path) == [("demo", "bad", "")]
    attempt("1 / 0")
    assert found(tmp_path)[0][1] == "ZeroDivisionError: division by zero"


def test_unfinished_and_interrupted(attempt, tmp_path):
    attempt("raise MoultError('stopped by SIGTERM', 'run it again', 75)")
    assert found(tmp_path) == [("demo", "unfinished: stopped by SIGTERM", "run it again")]
    attempt("raise KeyboardInterrupt")
    assert found(tmp_path) == [("demo", "interrupted", "run the same command again to go on")]


FAILS = "raise MoultError('bad')"
UNFINISHED = "raise MoultError('stopped', '', 75)"
TERMINATED = "os.kill(os.getpid(), 15); time.sleep(9)"
DIES = "os.kill(os.getpid(), 9)"


@pytest.mark.parametrize(
    ("codes", "what"),
    [
        ((TERMINATED, FAILS), "bad"),
        ((UNFINISHED, TERMINATED), "unfinished: stopped"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ((FAILS, TERMINATED), "bad"),
                ((UNFINISHED, FAILS), "bad"),
                ((FAILS, DIES), "bad"),
                ((TERMINATED, DIES), KILLED[1]),
            )
        ),
    ],
)
def test_of_several_processes_the_one_that_has_failed_counts(codes, what, tmp_path):
    """torchrun stops the others when one has failed. They run side by side."""
    processes = []
    for rank, code in enumerate(codes):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "logs").symlink_to(tmp_path / "logs")
        (tmp_path / "logs").mkdir(exist_ok=True)
        lay_out(f"time.sleep(3)\nlog.debug('at work')\n{code}", tmp_path / str(rank), f", rank={rank}", log=LOG)
        processes.append(begin(tmp_path / str(rank)))
    for process in processes:
        process.communicate()
    (tmp_path / "logs/d/attempts/notes.json").write_text("[]")
    assert [failure.what for failure in failures_since(0.0, tmp_path / "logs")] == [what]
    assert {path.name for path in (tmp_path / "logs/d").glob("*.log*")} == {"demo.log", "demo.log.rank1"}


def test_a_process_that_was_killed_before_another_has_begun_counts(tmp_path):
    """On a busy machine rank 1 was gone before rank 0 had its log, and `terminated` was all that the table said."""
    records = tmp_path / "logs/d/attempts"
    records.mkdir(parents=True)
    killed = Attempt("demo", LOG, rank=1, process="1 0 elsewhere x", begun="2026-01-01T00:00:00.000+00:00")
    killed.outcome, killed.what = "failed", "no room"
    other = Attempt("demo", LOG, begun="2026-01-01T00:00:09.000+00:00", outcome="terminated", what="terminated")
    killed.ended = "2026-01-01T00:00:01.000+00:00"
    killed.write(records / "demo-1.json"), other.write(records / "demo-2.json")
    assert [failure.what for failure in failures_since(0.0, tmp_path / "logs")] == ["no room"]


def test_killed_without_an_error_message(attempt, tmp_path):
    attempt(DIES)
    assert found(tmp_path) == [KILLED]


def test_only_the_last_attempt_counts(attempt, tmp_path):
    attempt(FAILS)
    attempt(DIES)
    attempt("pass")
    assert found(tmp_path) == []
    attempt(DIES)
    assert found(tmp_path) == [KILLED]


def test_one_at_work_has_not_failed(tmp_path):
    lay_out('log.info("at work")\ntime.sleep(60)', tmp_path, log=LOG)
    process = begin(tmp_path)
    process.stderr.readline()
    assert found(tmp_path) == []
    process.kill(), process.communicate()
    assert found(tmp_path) == [KILLED]


def test_one_that_was_killed_is_not_taken_for_another_process_with_its_number(attempt, tmp_path):
    attempt(DIES)
    (path,) = (tmp_path / "logs").rglob("*.json")
    record = Attempt.read(path)
    record.process = " ".join([str(os.getpid()), *record.process.split(" ")[1:]])
    record.write(path)
    assert found(tmp_path) == [KILLED]


def test_one_that_was_killed_on_another_machine(attempt, tmp_path):
    attempt(DIES)
    (path,) = (tmp_path / "logs").rglob("*.json")
    record = Attempt.read(path)
    record.process = f"{os.getpid()} 1 a-node pid:[1]"
    record.write(path)
    assert found(tmp_path) == [KILLED]


def test_what_failed_before_the_start_is_left_out(attempt, tmp_path):
    attempt(FAILS)
    assert found(tmp_path, since=time.time() + 60) == []


def test_table_fits_the_terminal_and_breaks_no_path(attempt, tmp_path):
    path = "results/" + "x" * 90
    attempt(f"raise MoultError('{path}: ' + 'word ' * 40, 'fix ' * 30)")
    runs = [f"run-{number}" for number in range(30)]
    lines = table([f._replace(runs=runs) for f in failures_since(0.0, tmp_path / "logs")], 100).splitlines()
    assert lines[1] == "1 stage has failed:"
    assert re.fullmatch("runs +stage +what is wrong -> what to do", lines[3])
    assert any(path in line for line in lines)
    assert all(len(line) <= 100 for line in lines if path not in line)
    assert "and 22 more" in " ".join(line[:24].strip() for line in lines)
    assert any(line.endswith(f"   log: {LOG}") for line in lines)


SNAKEFILE = """
import sys, time
sys.path.insert(0, {scripts!r})
from snakemake.logging import logger
from moult.workflow.failures import NotAgain

if workflow.is_main_process:
    logger.addFilter(NotAgain(lambda: workflow.scheduler.running, time.time() - 1))

rule all:
    input: "hopeless.out", "passing.out"

rule stage:
    output: "{{name}}.out"
    log: "logs/{{name}}/stage.log"
    params: lambda wildcards: "HOPELESS" if wildcards.name == "hopeless" else "1"
    shell: "{python} stage.py {{log}} {{params}}"
"""

STAGE = """
import sys
sys.path.insert(0, {scripts!r})
from moult import errors
from moult.run.stage import stage
with stage("stage", sys.argv[1]):
    raise errors.MoultError("it failed", "fix it", getattr(errors, sys.argv[2], 1))
"""


@pytest.mark.parametrize("group", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_would_fail_in_the_same_way_is_not_tried_again(group, tmp_path):
    """With retries, as on Slurm: an error that may pass is tried three times, one that cannot once."""
    scripts = str(ROOT / "scripts")
    (tmp_path / "Snakefile").write_text(SNAKEFILE.format(scripts=scripts, python=sys.executable))
    (tmp_path / "stage.py").write_text(STAGE.format(scripts=scripts))
    grouped = ["--groups", "stage=all", "--group-components", "all=1"] if group else []
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--retries", "2", "--keep-going", *grouped]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    tried = {name: len(list((tmp_path / f"logs/{name}/attempts").glob("*.json"))) for name in ("hopeless", "passing")}
    assert tried == {"hopeless": 1, "passing": 3}, done.stderr
