"""How a stage runs: what the console shows and what the log keeps, secrets, errors and exit codes, signals, the bar."""

import json
import os
import pty
import shlex
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import time
from dataclasses import dataclass
from fcntl import ioctl
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest
from workflow import ROOT

from moult.errors import MoultError
from moult.parallel import ordered_map
from moult.run.stage import process_name, redact

HEAD = """\
import logging, os, sys, time, warnings
from moult.errors import MoultError, UNFINISHED
from moult.files import atomic_file, atomic_folder
from moult.run.stage import progress, stage
"""


@dataclass
class Result:
    code: int
    stdout: str
    stderr: str
    log: str

    @property
    def console(self) -> str:
        return self.stdout + self.stderr


@pytest.fixture
def run(tmp_path):
    """Run `code` inside a stage named demo, in an empty folder, with the log that a rule would name."""

    def run(code: str, arguments: str = "", head: str = "", **environment) -> Result:
        start(code, tmp_path, arguments, head)
        result = subprocess.run(
            [sys.executable, "demo.py"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT / "scripts"), **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        log = tmp_path / "logs/demo.log"
        return Result(result.returncode, result.stdout, result.stderr, log.read_text() if log.exists() else "")

    return run


def start(code: str, folder: Path, arguments: str = "", head: str = "") -> None:
    call = f'with stage("demo", "logs/demo.log"{arguments}) as log:\n'
    body = textwrap.indent(textwrap.dedent(code), "    ")
    (folder / "demo.py").write_text(HEAD + head + call + body)


def begin(folder: Path, environment=(), **options) -> subprocess.Popen:
    """demo.py, to be watched or disturbed while it runs; what it says on stderr can be read."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "scripts"), **dict(environment)}
    options = {"stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen([sys.executable, "demo.py"], cwd=folder, env=variables, **options)


# --- console and log --------------------------------------------------------------------------------------------------


def test_the_console_gets_info_and_the_log_everything(run):
    result = run(
        """
        log.debug("a detail")
        log.info("a fact")
        log.warning("a warning")
        logging.getLogger("library").debug("library's detail")
        logging.getLogger("library").warning("library's warning")
        logging.getLogger("urllib3").debug("wire noise")
        warnings.warn("python's warning")
        """,
        ', {"seed": 7}',
    )
    assert result.code == 0
    assert result.stdout == ""
    assert [line.split(maxsplit=2)[2] for line in result.stderr.splitlines()] == ["a fact", "a warning"]
    for text in ("a detail", "a fact", "a warning", "library's detail", "library's warning", "python's warning"):
        assert text in result.log
    assert "wire noise" not in result.log
    # The settings come first, the end is said.
    assert result.log.index('"seed": 7') < result.log.index("a detail")
    assert "demo done in" in result.log.splitlines()[-1]


def test_what_libraries_print_is_in_the_log_only(run):
    result = run("""
        print("python out")
        print("python err", file=sys.stderr)
        os.write(1, b"raw out\\n")
        os.write(2, b"raw err \\xff\\n")
        os.system("echo child out; echo child err >&2")
        print("no line end", end="")
    """)
    assert (result.code, result.console) == (0, "")
    for text in ("python out", "python err", "raw out", r"raw err \xff", "child out", "child err", "no line end"):
        assert f"OUTPUT  {text}\n" in result.log


def test_a_quiet_stage_says_nothing(run):
    result = run('log.info("a fact")\nlog.error("an error")', ", quiet=True")
    assert (result.code, result.console) == (0, "")
    assert "a fact" in result.log


@pytest.mark.parametrize(("arguments", "offline"), [("", "1"), (", online=True", "None")])
def test_only_an_online_stage_may_use_the_hub(run, monkeypatch, arguments, offline):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert f"OUTPUT  offline: {offline}\n" in run('print("offline:", os.environ.get("HF_HUB_OFFLINE"))', arguments).log


# --- errors -----------------------------------------------------------------------------------------------------------


def lines_said(result: Result) -> list[str]:
    """The console's lines without time and name."""
    assert result.stdout == ""
    return [line.split(maxsplit=2)[2] for line in result.stderr.splitlines()]


def test_an_error_of_the_users_is_two_lines(run):
    result = run('rows = [1, 2]\nraise MoultError("rows.jsonl:3: no answer", "mend that line")')
    assert result.code == 1
    assert lines_said(result) == [
        "demo failed: rows.jsonl:3: no answer",
        "what to do: mend that line (log: logs/demo.log)",
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
    ],
)
def test_exit_codes(run, raised, code, said):
    result = run(f"raise {raised}")
    assert (result.code, lines_said(result)[0]) == (code, said)


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


# --- secrets ----------------------------------------------------------------------------------------------------------

SECRETS = {
    "HF_TOKEN": "hf_AbCdEfGhIjKlMnOpQrStUvWx",
    "WANDB_API_KEY": "0123456789abcdef0123",
    "MY_PASSWORD": "correct horse battery",
}


def test_secrets_are_in_neither_console_nor_log(run, tmp_path):
    result = run(
        """
        log.info("token %s", os.environ["HF_TOKEN"])
        logging.getLogger("library").debug("key %s", os.environ["WANDB_API_KEY"])
        print("printed", os.environ["MY_PASSWORD"])
        os.system('echo "$HF_TOKEN by a child"')
        api_token = "only in a variable"
        headers = {"authorization": "Bearer abcdefghijklmnop"}
        url = "https://me:swordfish@proxy.example:3128/x"
        raise MoultError(f"cannot reach {url} with hf_ZzZzZzZzZzZzZzZzZzZzZzZz", "use https://ghp_0123456789@host/")
        """,
        ', {"remote": "https://user:hunter2@example.org", "given": os.environ["HF_TOKEN"]}',
        **SECRETS,
    )
    assert result.code == 1
    everything = result.console + "".join(path.read_text() for path in tmp_path.rglob("*.log"))
    for secret in (
        *SECRETS.values(),
        *("only in a variable", "abcdefghijklmnop", "swordfish", "hf_Zz", "ghp_", "hunter2"),
    ):
        assert secret not in everything
    assert "cannot reach https://***@proxy.example:3128/x with ***" in result.stderr
    assert "*** by a child" in result.log
    assert "api_token = ***" in result.log


AWKWARD = "pä\"ss\\wörd 'of' many/characters@host"


@pytest.mark.parametrize(
    "written",
    [str, json.dumps, lambda text: json.dumps(text, ensure_ascii=False), repr, ascii, quote, shlex.quote],
    ids=["text", "JSON", "JSON with letters", "Python", "ASCII", "address", "shell"],
)
@pytest.mark.parametrize("name", ["DB_PASSWORD", "SIGNING_KEY", "GITHUB_PAT", "HF_TOKEN"])
def test_a_secret_is_masked_however_it_is_written(monkeypatch, name, written):
    monkeypatch.setenv(name, f"{AWKWARD}\n")
    shown = redact(f"it is {written(AWKWARD)}.")
    assert "***" in shown and "rd" not in shown and "many" not in shown


def test_each_line_of_a_secret_is_masked(monkeypatch):
    monkeypatch.setenv("TLS_PRIVATE_KEY", "first line of it\nsecond line of it\nend")
    assert redact("second line of it") == "***"


def test_a_secret_is_masked_before_a_long_value_is_cut(run):
    """In the values of variables: half of it would no longer be found."""
    result = run(
        """
        key = "0123456789abcdef0123"
        line = "x" * 85 + key + "x" * 300
        data = ("x" * 85 + key + "x" * 300).encode()
        class Odd:
            def __repr__(self):
                return line
        odd, headers = Odd(), {"authorization": "Basic dXNlcjpwYXNzd29yZA=="}
        1 / 0
        """,
        WANDB_API_KEY="0123456789abcdef0123",
    )
    assert "xxx***xxx" in result.log and "dXNlcjpw" not in result.log
    variables = result.log.partition("variables, outermost frame first")[2]
    assert "0123456" not in variables and "cdef0123" not in variables


def test_a_password_with_an_at_sign_in_an_address():
    assert redact("http://me:sword@fish@proxy:3128/x and https://a@b") == "http://***@proxy:3128/x and https://***@b"


@pytest.mark.parametrize(
    "text",
    [
        *("https://example.org/a?b=c", "https://example.org?to=me@x", "mail me@example.org", "git@host:me/x"),
        *("hf_hub 1.2", "pad_token_id 0", "Bearer of news", '{"url":"https://x","mail":"a@b"}'),
    ],
)
def test_what_is_no_secret_stays(text):
    assert redact(text) == text


# --- attempts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deleted", [True, False])
def test_a_later_attempt_does_not_erase_what_an_earlier_one_said(run, tmp_path, deleted):
    first = run('raise MoultError("the first went wrong")')
    if deleted:  # as Snakemake does before it runs a rule again
        (tmp_path / "logs/demo.log").unlink()
    second = run('log.info("the second went well")')
    assert "the first went wrong" in first.log
    assert "the first went wrong" not in second.log
    attempts = sorted((tmp_path / "logs/attempts").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert [path.read_text() for path in attempts] == [first.log, second.log]


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
    start(code, tmp_path)
    process = begin(tmp_path)
    assert "writing" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    said = process.stderr.read()
    assert process.wait(timeout=10) == 143
    assert "demo terminated; run the same command again to go on" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.py", "logs"]


@pytest.mark.parametrize("when", ["while it works", "before it has begun"])
def test_a_stage_ends_when_its_snakemake_is_gone(when, tmp_path):
    start('log.info("at work")\ntime.sleep(60)', tmp_path)
    starter = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    if when == "before it has begun":
        starter.kill(), starter.wait()
    name = process_name().replace(str(os.getpid()), str(starter.pid), 1)
    process = begin(tmp_path, {"MOULT_STARTED_BY": name})
    if when == "while it works":
        assert "at work" in process.stderr.readline()
        starter.kill(), starter.wait()
    assert "the Snakemake that has started this is gone" in process.stderr.read()
    assert process.wait(timeout=10) == 143


def test_a_snakemake_that_cannot_be_seen_is_not_missed(run, monkeypatch):
    """In a container the number may be another process's, or nobody's."""
    monkeypatch.setenv("MOULT_STARTED_BY", "999999999@pid:[1]")
    assert run("time.sleep(1.5)").code == 0


def test_the_workers_of_a_killed_stage_end(tmp_path):
    code = """
    from moult.parallel import ordered_map
    ordered_map(time.sleep, [60, 60], workers=2, what="naps", setup=log.info, setup_args=("at work",), chunk=1)
    """
    start(code, tmp_path)
    process = begin(tmp_path)
    assert "at work" in process.stderr.readline() and "at work" in process.stderr.readline()
    workers = psutil.Process(process.pid).children()
    process.kill()
    assert len(workers) == 2
    assert psutil.wait_procs(workers, timeout=20)[1] == []
    process.communicate()


# --- progress ---------------------------------------------------------------------------------------------------------

COUNTING = """
log.info("before")
with progress(3, "rows") as bar:
    for index in range(3):
        for _ in progress.over(range(2), "inner"):
            pass
        bar.update(note=f"loss {index}")
        log.info("line %s", index)
        time.sleep(0.12)  # tqdm draws ten times a second
log.info("after")
"""


def test_without_a_terminal_progress_is_lines(run):
    result = run(COUNTING, head="progress.every_seconds = 0.0\n")
    assert lines_said(result) == [
        "before",
        *("rows: 1 of 3, loss 0", "line 0", "rows: 2 of 3, loss 1", "line 1", "rows: 3 of 3, loss 2", "line 2"),
        "after",
    ]
    assert "rows: 1 of 3" in result.log
    assert "rows:" not in run(COUNTING).console  # only every ten seconds


def on_terminal(folder: Path, columns: int, hang_up: bool = False) -> tuple[int, str]:
    """Run demo.py on a terminal of its own: its exit code, and what the terminal was sent."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = begin(folder, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    sent = b""
    while chunk := _read(ours):
        sent += chunk
        if hang_up and b"rows" in sent:
            break
    os.close(ours)
    return process.wait(timeout=30), sent.decode()


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # the other side is closed
        return b""


def test_on_a_terminal_progress_is_one_bar_and_messages_stand_above_it(tmp_path):
    start(COUNTING, tmp_path)
    code, sent = on_terminal(tmp_path, 80)
    assert code == 0
    assert "rows:  33%|" in sent
    assert "loss 1]" in sent
    assert "inner" not in sent
    messages = [line.rpartition("\r")[2] for line in sent.split("\r\n")]
    assert [line.split(maxsplit=2)[2] for line in messages if " demo " in line] == [
        *("before", "line 0", "line 1", "line 2"),
        "after",
    ]
    # The bar goes when it is done, and the log never had it.
    assert sent.rstrip().endswith("after")
    assert "%|" not in (tmp_path / "logs/demo.log").read_text()


def test_a_terminal_without_a_width_gets_lines(tmp_path):
    start("progress.every_seconds = 0.0\n" + COUNTING, tmp_path)
    code, sent = on_terminal(tmp_path, 0)
    assert code == 0
    assert "rows: 2 of 3, loss 1" in sent


def test_the_work_goes_on_when_the_terminal_goes_away(tmp_path):
    start(COUNTING, tmp_path)
    code, _ = on_terminal(tmp_path, 80, hang_up=True)
    log = (tmp_path / "logs/demo.log").read_text()
    assert code == 0
    assert "moult: after\n" in log
    assert "Logging error" not in log


# --- several processes ------------------------------------------------------------------------------------------------

_offset = 0


def set_offset(value: int) -> None:
    global _offset
    _offset = value


def shifted(item: int) -> int:
    if item == 13 and _offset == 13:
        raise ValueError("unlucky")
    if item == 13 and _offset == 99:
        os.kill(os.getpid(), signal.SIGKILL)
    return item + _offset


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 5, 103])
def test_a_map_keeps_the_order_with_any_number_of_processes(workers, count):
    results = ordered_map(shifted, range(count), workers, "items", set_offset, (1000,), chunk=5)
    assert results == list(range(1000, 1000 + count))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_a_worker_is_the_callers(workers):
    with pytest.raises(ValueError, match="unlucky"):
        ordered_map(shifted, range(50), workers, "items", set_offset, (13,), chunk=5)


def test_a_killed_worker_is_said_in_plain_words():
    with pytest.raises(MoultError, match="items: a worker process was killed, most often for want of memory"):
        ordered_map(shifted, range(50), 2, "items", set_offset, (99,), chunk=5)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 20])  # of 1, it comes while the work is being handed out
def test_sigterm_does_not_wait_for_all_the_work(tmp_path, chunk):
    head = "from moult.parallel import ordered_map\ndef slow(item): time.sleep(0.01)\n"
    start(f'log.info("working")\nordered_map(slow, range(100_000), 2, "items", chunk={chunk})', tmp_path, head=head)
    process = begin(tmp_path, start_new_session=True)
    assert "working" in process.stderr.readline()
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGTERM)  # Slurm and Snakemake signal the whole group
    assert process.wait(timeout=20) == 143
    assert "Traceback" not in process.stderr.read()
