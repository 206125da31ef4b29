"""How a stage ends: errors and exit codes, the records and logs of its attempts, signals."""

import errno
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from running import begin, lay_out, lines_said, run_stage

from moult.run.attempt import Attempt
from moult.run.process import is_running, process_name


@pytest.fixture
def run(tmp_path):
    return partial(run_stage, folder=tmp_path)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_an_error_of_the_users_is_two_lines(run):
    result = run('rows = [1, 2]\nraise MoultError("rows.jsonl:3: no answer", "fix that line")')
    assert result.code == 1
    assert lines_said(result) == [
        "demo failed: rows.jsonl:3: no answer",
        "what to do: fix that line (log: logs/demo.log)",
    ]
    assert "Traceback (most recent call last)" in result.log
    assert "rows = [1, 2]" in result.log


def test_an_error_of_ours_is_two_lines_and_the_log_has_the_values(run):
    result = run('weights = {"layer": 3}\nweights["missing"]')
    assert result.code == 1
    assert lines_said(result) == [
        "demo failed: KeyError: 'missing'",
        "what to do: unexpected; the log has the traceback with the values of all variables (log: logs/demo.log)",
    ]
    assert "Traceback (most recent call last)" in result.log
    assert "weights = {'layer': 3}" in result.log


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        ("MoultError('stopped at step 3', 'run it again', UNFINISHED)", 75, "demo unfinished: stopped at step 3"),
        ("ValueError('first line\\nsecond')", 1, "demo failed: ValueError: first line"),
        ("ValueError()", 1, "demo failed: ValueError: no message"),
        ("KeyboardInterrupt()", 130, "demo interrupted; run the same command again to go on"),
        ("SystemExit(75)", 75, "demo terminated; run the same command again to go on"),
    ],
)
def test_exit_codes(run, raised, code, said):
    result = run(f"raise {raised}")
    assert (result.code, lines_said(result)[0]) == (code, said)


@pytest.mark.parametrize(("argument", "code", "console"), [("", 0, ""), ("3", 3, ""), ("'a reason'", 1, "a reason\n")])
def test_a_stage_that_exits_by_itself(run, argument, code, console):
    result = run(f"sys.exit({argument})")
    assert (result.code, result.console) == (code, console)


def test_a_value_that_cannot_be_shown_does_not_hide_the_error(run):
    head = 'class Odd:\n    def __repr__(self): raise RuntimeError("no repr")\n'
    result = run("odd = Odd()\nlong = 'x' * 10_000\nraise ValueError('the error')", head=head)
    assert lines_said(result)[0] == "demo failed: ValueError: the error"
    assert "odd = <Odd instance at" in result.log
    assert "x" * 1000 not in result.log


def test_a_log_that_cannot_be_written(run, tmp_path):
    (tmp_path / "logs").write_text("a file where the folder belongs")
    result = run("pass")
    assert result.code == 1
    assert "demo failed: logs/demo.log: the log cannot be written" in result.stderr
    assert "Traceback" not in result.console


# --- attempts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deleted", [True, False])
def test_a_later_attempt_does_not_erase_what_an_earlier_one_said(run, tmp_path, deleted):
    first = run('raise MoultError("the first went wrong")')
    if deleted:  # as Snakemake does before it runs a rule again
        (tmp_path / "logs/demo.log").unlink()
    second = run('log.info("the second went well")')
    assert "the first went wrong" in first.log
    assert "the first went wrong" not in second.log
    attempts = sorted((tmp_path / "logs/attempts").glob("*.log"), key=lambda path: path.stat().st_mtime_ns)
    assert [path.read_text() for path in attempts] == [first.log, second.log]


def record(folder: Path) -> Attempt:
    (path,) = folder.glob("logs/**/attempts/*.json")
    assert path.with_suffix(".log").exists()
    return Attempt.read(path)


@pytest.mark.parametrize(
    ("code", "outcome", "what", "fix"),
    [
        ('log.info("a fact")\nlog.info("645 rows")\nlog.warning("odd")', "done", "645 rows", ""),
        ("sys.exit(0)", "done", "", ""),
        ("sys.exit(3)", "failed", "exit code 3", ""),
        ("raise MoultError('bad\\n  - twice', 'fix it')", "failed", "bad\n  - twice", "fix it"),
        ("raise MoultError('bad \\udcff')", "failed", "bad \udcff", ""),
        ("1 / 0", "failed", "ZeroDivisionError: division by zero", "unexpected; the log has the traceback with the"),
        ("raise MoultError('step 3', 'go on', UNFINISHED)", "unfinished", "step 3", "go on"),
        ("raise KeyboardInterrupt", "interrupted", "interrupted", "run the same command again to go on"),
        ("os.kill(os.getpid(), 15); time.sleep(9)", "terminated", "terminated", "run the same command again to go on"),
        ("os.kill(os.getpid(), 9)", "running", "", ""),
    ],
)
def test_the_record_of_an_attempt_says_how_it_ended(run, tmp_path, code, outcome, what, fix):
    run(code, log="logs/capitals/demo.log")
    found = record(tmp_path)
    assert (found.stage, found.about, found.log, found.rank) == ("demo", "capitals", "logs/capitals/demo.log", 0)
    assert (found.outcome, found.what, found.fix[: len(fix)]) == (outcome, what, fix) and bool(found.fix) == bool(fix)
    assert is_running(found.process) is False
    assert found.ended is None if outcome == "running" else found.begun <= found.ended


def test_the_line_of_a_record_is_the_one_that_the_console_had(run, tmp_path):
    said = run('log.info("645 rows")', log="logs/capitals/demo.log").stderr
    assert record(tmp_path).line()[8:] == said.rstrip()[8:] == " demo           capitals: 645 rows"


def test_a_record_keeps_no_secret(run, tmp_path):
    run("raise MoultError(os.environ['HF_TOKEN'], os.environ['HF_TOKEN'])", HF_TOKEN="a-token-of-the-tests")
    assert (record(tmp_path).what, record(tmp_path).fix) == ("***", "***")


def test_a_record_is_written_on_a_full_disk(tmp_path, monkeypatch):
    """Where the older one was: a new file has no room."""

    def no_space(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    attempt, path = Attempt(stage="demo", log="logs/demo.log", what="x" * 500), tmp_path / "demo.json"
    monkeypatch.setattr("moult.run.attempt.write_text", no_space)
    attempt.write(path)
    assert not path.exists()
    monkeypatch.undo()
    attempt.write(path)
    monkeypatch.setattr("moult.run.attempt.write_text", no_space)
    attempt.what = "no space left"
    attempt.write(path)
    assert Attempt.read(path) == attempt


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema_version": 99}', '{"schema_version": 1, "x": 2}'])
def test_what_is_not_a_record_is_not_read(tmp_path, text):
    (tmp_path / "demo.json").write_text(text)
    assert Attempt.read(tmp_path / "demo.json") is None


# --- signals ----------------------------------------------------------------------------------------------------------


def test_sigterm_in_a_callback_of_the_interpreter_ends_the_stage_too(run):
    """Python swallows what is raised there."""
    result = run("""
        import signal
        class Swallowing:
            def __del__(self):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0)
        Swallowing()
        log.info("swallowed")
        try:
            time.sleep(60)
        finally:
            time.sleep(1.5)  # cleaning up is not disturbed
            log.info("cleaned up")
    """)
    assert result.code == 143
    assert "swallowed" in result.stderr and "cleaned up" in result.stderr and "demo terminated" in result.stderr


def test_sigterm_leaves_nothing_half_written(tmp_path):
    code = """
    with atomic_file("out.json") as file, atomic_folder("folder") as folder:
        file.write_text("half"), (folder / "x").write_text("half")
        log.info("writing")
        time.sleep(60)
    """
    lay_out(code, tmp_path)
    process = begin(tmp_path)
    assert "writing" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    said = process.stderr.read()
    assert process.wait(timeout=10) == 143
    assert "demo terminated; run the same command again to go on" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.py", "logs"]


@pytest.mark.parametrize("when", ["while it works", "before it has begun"])
def test_a_stage_ends_when_its_snakemake_is_gone(when, tmp_path):
    lay_out('log.info("at work")\ntime.sleep(60)', tmp_path)
    starter = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    name = process_name(starter.pid)
    if when == "before it has begun":
        starter.kill(), starter.wait()
    process = begin(tmp_path, {"MOULT_STARTED_BY": name})
    if when == "while it works":
        assert "at work" in process.stderr.readline()
        starter.kill(), starter.wait()
    assert "the Snakemake that has started this is gone" in process.stderr.read()
    assert process.wait(timeout=10) == 143


@pytest.mark.slow
def test_a_snakemake_that_cannot_be_seen_is_not_missed(run, monkeypatch):
    """In a container or on another machine the number may be another process's, or nobody's."""
    for place in (f"{os.uname().nodename} pid:[1]", "another-machine pid:[1]"):
        monkeypatch.setenv("MOULT_STARTED_BY", f"999999999 1 {place}")
        assert run("time.sleep(1.5)").code == 0


def test_a_process_is_known_by_more_than_its_number():
    number, start, *place = process_name().split(" ")
    assert number == str(os.getpid()) and is_running(process_name())
    assert is_running(" ".join([number, f"{start}1", *place])) is False  # the number was given out again
    assert is_running(" ".join([number, start, "another-machine", place[1]])) is None
    ended = subprocess.Popen(["true"])
    name = process_name(ended.pid)
    while Path(f"/proc/{ended.pid}/stat").read_text().split()[2] != "Z":
        time.sleep(0.01)
    assert is_running(name) is False  # nobody has asked yet how it ended
    ended.wait()
    assert is_running(name) is False
