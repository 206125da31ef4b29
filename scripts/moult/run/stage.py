"""How every stage runs: one log that tells the story, one clear error at the end, secrets kept out of both.

    with stage("prepare", args.log, settings) as console:
        ...

The console gets INFO, and at most one progress bar. The log file gets everything: DEBUG, warnings, and each line that
a library prints. Snakemake deletes a rule's log before each attempt, so the file is written as
`<folder>/attempts/<stage>-<UTC time>-<pid>.log` and the log that the rule names is a hard link to it: what an earlier
attempt said stays.

Exit codes: 0 done, 1 failed, 75 unfinished (the same command goes on), 130 interrupted, 143 terminated.
"""

import contextlib
import errno
import json
import logging
import os
import platform
import re
import reprlib
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote

from moult import __version__
from moult.errors import UNFINISHED, MoultError

log = logging.getLogger("moult")

# Loggers whose DEBUG lines are wire noise and may hold headers.
_CHATTY = ("httpcore", "httpcore2", "httpx", "httpx2", "urllib3", "filelock", "fsspec", "asyncio", "hf_xet", "numba")

_SECRET_NAME = re.compile(
    r"token$|secret|passw|passphrase|_pwd$|_pat$|api_?key|_key$|authorization|credential", re.IGNORECASE
)
# The last: what stands before the host in an address. A password may hold an @ itself.
_SECRET_TEXT = re.compile(r"\bhf_[A-Za-z0-9]{16,}|(?<=Bearer )[\w.~+/-]{8,}|(?<=://)[^/\s?#\"]+(?=@)")
_MASK = "***"

TERMINATED = 128 + signal.SIGTERM

_console: "_Console | None" = None


def redact(text: str) -> str:
    """`text` without tokens: whatever looks like one, and the values of environment variables named like one."""
    for secret in _secrets(tuple(value for name, value in os.environ.items() if _SECRET_NAME.search(name))):
        text = text.replace(secret, _MASK)
    return _SECRET_TEXT.sub(_MASK, text)


@lru_cache(maxsize=8)
def _secrets(values: tuple[str, ...]) -> list[str]:
    """How the values may be written: as they are, each line of them, in JSON, in Python, in an address. The longest first."""
    plain = {part.strip() for value in values for part in (value, *value.splitlines())}
    written = {
        spelling
        for secret in plain
        if len(secret) >= 8
        for spelling in (
            secret,
            json.dumps(secret)[1:-1],
            json.dumps(secret, ensure_ascii=False)[1:-1],
            repr(secret)[1:-1],
            ascii(secret)[1:-1],
            shlex.quote(secret).strip("'"),
            quote(secret, safe="", errors="surrogateescape"),
            quote(secret, errors="surrogateescape"),
        )
    }
    return sorted(written, key=lambda secret: (-len(secret), secret))


@contextlib.contextmanager
def stage(
    name: str,
    log_path: str | None,
    settings: dict | None = None,
    *,
    quiet: bool = False,
    online: bool = False,
) -> Iterator[logging.Logger]:
    """Run the block as stage `name`: log to `log_path`, turn errors into one message, and exit.

    `settings` are written to the log first. `quiet` keeps the console for another process. Unless `online`, the hub's
    libraries are kept off the network. Raises SystemExit when the block fails.
    """
    global _console
    if not online:
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it does not go together with fork
    path = Path(log_path or f"logs/{name}.log")
    try:
        file = _open_log(path)
    except OSError as error:
        raise SystemExit(
            f"{name} failed: {path}: the log cannot be written ({error.strerror})\n"
            "what to do: mend the folder's permissions, or free space"
        ) from None
    with contextlib.ExitStack() as stack:
        stack.callback(file.close)
        stack.callback(signal.setitimer, signal.ITIMER_REAL, 0)
        stream = stack.enter_context(_capture_output(file))
        _console = _Console(stream, name, quiet)
        _set_up_logging(file)
        signal.signal(signal.SIGTERM, _exit_on_signal)
        _end_with_starter()
        log.debug("%s, Moult %s, Python %s on %s", name, __version__, platform.python_version(), platform.node())
        log.debug("command: %s", " ".join(sys.argv))
        log.debug("settings: %s", json.dumps(settings or {}, indent=2, sort_keys=True, default=str))
        started = time.monotonic()
        try:
            yield log
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            raise SystemExit(_tell(error, name, path)) from None
        log.debug("%s done in %.1f s", name, time.monotonic() - started)


def _tell(error: BaseException, name: str, path: Path) -> int | str | None:
    """Say what has ended the stage, and return its exit code."""
    if isinstance(error, SystemExit):
        if error.code in (TERMINATED, UNFINISHED):
            log.error("%s terminated; run the same command again to go on", name)
        return error.code
    if isinstance(error, KeyboardInterrupt):
        log.error("%s interrupted; run the same command again to go on", name)
        return 130
    log.debug("where it was raised:\n%s", _traceback_with_locals(error))
    code, word = 1, "failed"
    if isinstance(error, MoultError):
        what, fix, code = error.what, error.fix, error.exit_code
        word = "unfinished" if code == UNFINISHED else "failed"
    elif isinstance(error, OSError) and error.errno in _DISK:
        what = f"{error.filename or 'a file'}: {_DISK[error.errno]} ({_free_space(error.filename)})"
        fix = "free space or mend the permissions, and run the same command again: what was finished stays"
    else:
        what = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        fix = "unexpected; the log has the traceback with the values of all variables"
    log.error("%s %s: %s", name, word, what)
    log.error("%s(log: %s)", f"what to do: {fix} " if fix else "", path)
    return code


_DISK = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file system takes no larger file",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission",
}


def _free_space(path) -> str:
    """What is free where `path` is, or in the working directory if it is not known."""
    folder = next((parent for parent in Path(str(path or ".")).absolute().parents if parent.exists()), Path())
    return f"{shutil.disk_usage(folder).free:,} bytes are free"


def process_name() -> str:
    """This process for MOULT_STARTED_BY: its id, and the namespace that the number belongs to."""
    return f"{os.getpid()}@{_namespace()}"


def _namespace() -> str:
    path = Path("/proc/self/ns/pid")
    return str(path.readlink()) if path.exists() else ""


def _end_with_starter() -> None:
    """Terminate this stage when the Snakemake that has started it is gone, so that a killed one leaves no trainer behind.

    Which one that is comes in the environment (rules/failures.smk). Run by hand, or in a container that does not see that
    process, nothing is watched.
    """
    starter, _, namespace = os.environ.get("MOULT_STARTED_BY", "").partition("@")
    if not starter.isdigit() or namespace != _namespace():
        return

    def watch() -> None:
        while _alive(int(starter)):
            time.sleep(1)
        log.warning("the Snakemake that has started this is gone")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _alive(process: int) -> bool:
    """Whether a process runs. One that has ended and that nobody has asked about yet does not."""
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z"
    except ProcessLookupError:
        return False
    except OSError:  # another user's, or a system without /proc
        return True


def _exit_on_signal(number: int, frame: types.FrameType | None) -> None:
    # Raising lets `atomic_folder` and the like clean up, which dying from the signal, or from a second one, would not.
    signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, _exit_if_swallowed)
    signal.setitimer(signal.ITIMER_REAL, 1, 1)
    raise SystemExit(TERMINATED)


def _exit_if_swallowed(number: int, frame: types.FrameType | None) -> None:
    # What is raised in a callback of the interpreter's (of a weak reference, `__del__`) is swallowed, and the work goes on.
    if not isinstance(sys.exc_info()[1], SystemExit):
        raise SystemExit(TERMINATED)


def _open_log(path: Path):
    attempts = path.parent / "attempts"
    attempts.mkdir(parents=True, exist_ok=True)
    attempt = attempts / f"{path.stem}-{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}.log"
    file = _LogFile(attempt.open("a", encoding="utf-8", buffering=1, errors="backslashreplace"))
    path.unlink(missing_ok=True)
    try:
        path.hardlink_to(attempt)
    except OSError:  # a file system without hard links
        path.symlink_to(attempt.relative_to(path.parent))
    return file


class _LogFile:
    """A full disk stops the work where that needs it, with its own message; what no longer fits into the log is lost."""

    def __init__(self, file):
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


@contextlib.contextmanager
def _capture_output(file):
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
                    file.write(f"{_now()} OUTPUT  {redact(line.rstrip())}\n")

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


def _now() -> str:
    return datetime.now().strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]


def _set_up_logging(file) -> None:
    to_file = logging.StreamHandler(file)
    to_file.setFormatter(
        _Redacting("%(asctime)s.%(msecs)03d %(levelname)-7s %(name)s: %(message)s", "%Y-%m-%d %H:%M:%S")
    )
    root = logging.getLogger()
    root.handlers = [to_file]
    root.setLevel(logging.DEBUG)
    log.handlers = [_console]
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(True)


class _Redacting(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class _Console(logging.Handler):
    """INFO and above on the real standard error, above the progress bar if there is one."""

    def __init__(self, stream, name: str, quiet: bool):
        super().__init__(logging.CRITICAL + 1 if quiet else logging.INFO)
        self.stream = stream
        # A terminal that does not tell its width gets lines: tqdm shows nothing on it.
        self.shows_bars = not quiet and stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
        self.setFormatter(_Redacting(f"%(asctime)s {name:<14} %(message)s", "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        # If the terminal went away, the work goes on, and the log has the line.
        with contextlib.suppress(OSError, ValueError):
            tqdm.write(self.format(record), file=self.stream)


class progress:
    """The one progress bar: `with progress(total, "rows") as bar: bar.update(n)`, or `for x in progress.over(xs, "rows")`.

    On a terminal a tqdm bar; elsewhere (Slurm, CI) a line in the log every ten seconds.
    """

    every_seconds = 10.0
    outermost: "progress | None" = None

    def __init__(self, total: int, what: str, initial: int = 0):
        self.total, self.what, self.done = total, what, initial
        self.reported = time.monotonic()
        self.bar = None
        if progress.outermost is not None:  # one bar at a time: what runs inside another is silent
            return
        progress.outermost = self
        if _console is not None and _console.shows_bars:
            from tqdm import tqdm

            self.bar = tqdm(
                total=total, initial=initial, desc=what, file=_console.stream, leave=False, dynamic_ncols=True
            )

    @classmethod
    def over(cls, items: Iterable, what: str, total: int | None = None) -> Iterator:
        with cls(len(items) if total is None else total, what) as bar:
            for item in items:
                yield item
                bar.update()

    def update(self, count: int = 1, note: str = "") -> None:
        self.done += count
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(count)
        elif progress.outermost is self and time.monotonic() - self.reported > self.every_seconds:
            self.reported = time.monotonic()
            log.info("%s: %s of %s%s", self.what, f"{self.done:,}", f"{self.total:,}", f", {note}" if note else "")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if progress.outermost is self:
            progress.outermost = None

    def __enter__(self) -> "progress":
        return self

    def __exit__(self, *error) -> None:
        self.close()


class _RedactingRepr(reprlib.Repr):
    """Masks before it shortens: half a token is no longer found."""

    def repr_str(self, text: str, level: int) -> str:
        return super().repr_str(redact(text), level)

    def repr_instance(self, value, level: int) -> str:
        try:
            text = redact(repr(value))
        except Exception:
            return super().repr_instance(value, level)
        return text if len(text) <= self.maxother else f"{text[: self.maxother]}..."

    def repr_dict(self, value: dict, level: int) -> str:
        masked = {
            key: _MASK if isinstance(key, str) and _SECRET_NAME.search(key) else item for key, item in value.items()
        }
        return super().repr_dict(masked, level)


def _traceback_with_locals(error: BaseException) -> str:
    """The traceback, each frame with its variables: short values only, secrets masked."""
    shorten = _RedactingRepr()  # its arguments came with Python 3.12
    shorten.maxstring, shorten.maxother, shorten.maxlist, shorten.maxdict, shorten.maxlevel = (
        200,
        200,
        8,
        12,
        3,
    )
    lines = []
    for frame, line_number in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        lines.append(f'  File "{code.co_filename}", line {line_number}, in {code.co_name}')
        for name, value in frame.f_locals.items():
            if isinstance(value, types.ModuleType | types.FunctionType | type):
                continue
            try:
                shown = _MASK if _SECRET_NAME.search(name) else shorten.repr(value)
            except Exception as failure:
                shown = f"<repr failed: {type(failure).__name__}>"
            lines.append(f"      {name} = {shown}")
    chain = "".join(traceback.format_exception(error))
    return f"{chain}variables, outermost frame first:\n" + "\n".join(lines)
