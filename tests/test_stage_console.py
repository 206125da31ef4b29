"""What the console of a stage shows and what its log keeps; the progress bar."""

import logging
import os
import pty
import struct
import termios
from fcntl import ioctl
from functools import partial
from pathlib import Path

import pytest
from running import begin, lay_out, lines_said, run_stage

from moult.run.console import progress


@pytest.fixture
def run(tmp_path):
    return partial(run_stage, folder=tmp_path)


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


def test_another_process_of_a_stage_says_nothing_and_has_a_log_of_its_own(run, tmp_path):
    result = run('log.info("a fact")\nlog.error("an error")', arguments=", rank=1")
    assert (result.code, result.console, result.log) == (0, "", "")
    assert "a fact" in (tmp_path / "logs/demo.log.rank1").read_text()


@pytest.mark.parametrize(
    ("log", "start"),
    [
        ("logs/capitals/demo.log", "demo           capitals: "),
        ("logs/models/org--model.log", "demo           "),
        ("logs/demo.log", "demo           "),
    ],
)
def test_a_line_says_which_run_it_is_about(run, log, start):
    """Of a rule's log; several run at once."""
    assert run('log.info("a fact of 100 %")', log=log).stderr[9:] == f"{start}a fact of 100 %\n"


@pytest.mark.parametrize(("arguments", "offline"), [("", "1"), (", online=True", "None")])
def test_only_an_online_stage_may_use_the_hub(run, monkeypatch, arguments, offline):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert f"OUTPUT  offline: {offline}\n" in run('print("offline:", os.environ.get("HF_HUB_OFFLINE"))', arguments).log


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
    result = run(COUNTING, head="progress.first_line_after = 0.0\n")
    assert lines_said(result) == [
        "before",
        *("rows: 1 of 3, loss 0", "line 0", "rows: 2 of 3, loss 1", "line 1", "rows: 3 of 3, loss 2", "line 2"),
        "after",
    ]
    assert "rows: 1 of 3" in result.log
    assert "rows:" not in run(COUNTING).console  # not before ten seconds have passed


def test_without_a_terminal_the_lines_get_rarer(monkeypatch, caplog):
    """A row a second."""
    now = 0.0
    monkeypatch.setattr("moult.run.console.time.monotonic", lambda: now)
    with caplog.at_level(logging.INFO, "moult"), progress(1000, "rows") as bar:
        for second in range(1, 1001):
            now = float(second)
            bar.update()
    assert [message.split()[1] for message in caplog.messages] == ["11", "32", "73", "154", "315", "616", "917"]


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
    lay_out(COUNTING, tmp_path, log="logs/capitals/demo.log")
    code, sent = on_terminal(tmp_path, 80)
    assert code == 0
    assert "demo capitals: rows:  33%|" in sent
    assert "loss 1]" in sent
    assert "inner" not in sent
    messages = [line.rpartition("\r")[2] for line in sent.split("\r\n")]
    assert [line.split("capitals: ")[1] for line in messages if " demo  " in line] == [
        *("before", "line 0", "line 1", "line 2"),
        "after",
    ]
    # The bar goes when it is done, and the log never had it.
    assert sent.rstrip().endswith("after")
    assert "%|" not in (tmp_path / "logs/capitals/demo.log").read_text()


def test_a_terminal_without_a_width_gets_lines(tmp_path):
    lay_out("progress.first_line_after = 0.0\n" + COUNTING, tmp_path)
    code, sent = on_terminal(tmp_path, 0)
    assert code == 0
    assert "rows: 2 of 3, loss 1" in sent


def test_the_work_goes_on_when_the_terminal_goes_away(tmp_path):
    lay_out(COUNTING, tmp_path)
    code, _ = on_terminal(tmp_path, 80, hang_up=True)
    log = (tmp_path / "logs/demo.log").read_text()
    assert code == 0
    assert "moult: after\n" in log
    assert "Logging error" not in log
