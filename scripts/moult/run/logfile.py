"""The log of a stage: a file of its own for each attempt, which also gets every line that a library or a child prints."""

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from moult.run.redact import RedactingFormatter, redact

# Loggers whose DEBUG lines are wire noise and may hold headers.
_CHATTY = ("httpcore", "httpcore2", "httpx", "httpx2", "urllib3", "filelock", "fsspec", "asyncio", "hf_xet", "numba")


class LogFile:
    """A full disk stops the work where that needs it, with its own message; what no longer fits into the log is lost."""

    def __init__(self, file: TextIO):
        self.file = file

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.file.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.file.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.file.close()

    @property
    def closed(self) -> bool:
        return self.file.closed


def open_log(path: Path, name: str) -> tuple[LogFile, Path]:
    """The log of this attempt and where it lies: `<folder>/attempts/<name>-<UTC time>-<process>.log`; `path` is a link to it.

    Snakemake deletes a rule's log before each attempt: what an earlier one has said stays in its own file.
    """
    attempts = path.parent / "attempts"
    attempts.mkdir(parents=True, exist_ok=True)
    attempt = attempts / f"{name}-{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}.log"
    file = LogFile(attempt.open("a", encoding="utf-8", buffering=1, errors="backslashreplace"))
    path.unlink(missing_ok=True)
    try:
        path.hardlink_to(attempt)
    except OSError:  # a file system without hard links
        path.symlink_to(attempt.relative_to(path.parent))
    return file, attempt


def log_everything(file: LogFile) -> None:
    """All of Python's logging and its warnings go to the log file."""
    handler = logging.StreamHandler(file)
    handler.setFormatter(
        RedactingFormatter("%(asctime)s.%(msecs)03d %(levelname)-7s %(name)s: %(message)s", "%Y-%m-%d %H:%M:%S")
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.DEBUG)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(True)


@contextlib.contextmanager
def capture_output(file: LogFile) -> Iterator[TextIO]:
    """Send what is written to descriptors 1 and 2 to the log, and yield a stream to the real console.

    At the level of descriptors, because CUDA, tokenizers and child processes do not know `sys.stdout`.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved_out, saved_err = os.dup(1), os.dup(2)
    console = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace", buffering=1)
    read_end, write_end = os.pipe()
    os.dup2(write_end, 1)
    os.dup2(write_end, 2)
    os.close(write_end)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)

    def pump() -> None:
        with os.fdopen(read_end, encoding="utf-8", errors="backslashreplace", newline=None) as lines:
            for line in lines:
                if line.strip() and not file.closed:
                    file.write(f"{_clock()} OUTPUT  {redact(line.rstrip())}\n")

    thread = threading.Thread(target=pump, daemon=True)
    thread.start()
    try:
        yield console
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(saved_out, 1)
        os.dup2(saved_err, 2)
        os.close(saved_out)
        os.close(saved_err)
        # A child that outlives the stage holds the pipe open: do not wait for it.
        thread.join(timeout=2)
        with contextlib.suppress(OSError):  # a terminal that went away takes what is still buffered with it
            console.close()


def _clock() -> str:
    return datetime.now().strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
