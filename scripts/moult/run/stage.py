"""How every stage runs: one log that tells the story, one clear error at the end, secrets kept out of both.

    with stage("prepare", args.log_file, settings) as log:
        ...

The console gets INFO, and at most one progress bar (moult/run/console.py). The log file gets everything: DEBUG, warnings, and
each line that a library prints (logfile.py). A small JSON beside it says how the attempt ended (attempt.py).

Exit codes: 0 done, 1 failed, 75 unfinished (the same command goes on), 78 failed and would fail again, 130 interrupted, 143
terminated.
"""

import contextlib
import errno
import json
import logging
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from moult import __version__
from moult.errors import HOPELESS, UNFINISHED, MoultError
from moult.run.attempt import Attempt, now
from moult.run.console import Console, log
from moult.run.logfile import capture_output, log_everything, open_log
from moult.run.process import TERMINATED, end_with_starter, exit_on_signal
from moult.run.redact import redact
from moult.run.variables import traceback_with_variables

AGAIN = "run the same command again to go on"


@contextlib.contextmanager
def stage(
    name: str, log_file: str | None, settings: dict | None = None, *, rank: int = 0, online: bool = False
) -> Iterator[logging.Logger]:
    """Run the block as the stage `name`: log to `log_file`, turn errors into one message, and exit.

    log_file: default: logs/<name>.log. The log of a rule is `<logs>/<run or dataset>/<stage>.log`.
    settings: written to the log first.
    rank: which of the stage's processes this is. All but 0 log to `<log_file>.rank<rank>` and keep off the console.
    online: otherwise the hub's libraries are kept off the network.

    Raises SystemExit when the block fails.
    """
    if not online:
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it does not go together with fork
    path = Path(log_file or f"logs/{name}.log")
    own_path = path.with_name(f"{path.name}.rank{rank}") if rank else path
    try:
        file, attempt_log = open_log(own_path, path.stem)
    except OSError as error:
        raise SystemExit(
            f"{name} failed: {own_path}: the log cannot be written ({error.strerror})\n"
            "what to do: fix the folder's permissions, or free space"
        ) from None
    attempt = Attempt(stage=name, log=str(path), rank=rank)
    record = attempt_log.with_suffix(".json")
    attempt.write(record)

    def end(error: BaseException) -> int | str | None:
        code, attempt.outcome, attempt.what, attempt.fix = explain(error)
        attempt.again = code != HOPELESS
        tell(attempt, own_path, error)
        close()
        return code

    def close() -> None:
        attempt.ended = now()
        attempt.what, attempt.fix = redact(attempt.what), redact(attempt.fix)
        attempt.write(record)

    _ends.append(end)
    with contextlib.ExitStack() as stack:
        stack.callback(file.close)
        stack.callback(signal.setitimer, signal.ITIMER_REAL, 0)
        stream = stack.enter_context(capture_output(file))
        console = Console(stream, name, attempt.about, quiet=rank > 0)
        log_everything(file)
        signal.signal(signal.SIGTERM, exit_on_signal)
        end_with_starter()
        log.debug("%s, Moult %s, Python %s on %s", name, __version__, platform.python_version(), platform.node())
        log.debug("command: %s", " ".join(sys.argv))
        log.debug("settings: %s", json.dumps(settings or {}, indent=2, sort_keys=True, default=str))
        started = time.monotonic()
        try:
            yield log
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            raise SystemExit(end(error)) from None
        else:
            attempt.outcome, attempt.what = "done", console.found
            log.debug("%s done in %.1f s", name, time.monotonic() - started)
            close()
        finally:
            _ends.remove(end)


# How the stage that runs is ended, if one runs.
_ends: list[Callable[[BaseException], int | str | None]] = []


def end_at_once(error: BaseException) -> NoReturn:
    """End this process as the stage would end with `error`: message, record, exit code. For a thread, while the main thread
    waits in a library, where nothing can be raised."""
    code = _ends[-1](error) if _ends else 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code if isinstance(code, int) else 1)


def explain(error: BaseException) -> tuple[int | str | None, str, str, str]:
    """What has ended a stage: exit code, outcome (moult/run/attempt.py), what is wrong, what to do about it."""
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted", "interrupted", AGAIN
    if isinstance(error, SystemExit):
        if error.code in (TERMINATED, UNFINISHED):
            return error.code, "terminated", "terminated", AGAIN
        if not error.code:
            return error.code, "done", "", ""
        return error.code, "failed", f"exit code {error.code}", ""
    if isinstance(error, MoultError):
        outcome = "unfinished" if error.exit_code == UNFINISHED else "failed"
        return error.exit_code, outcome, error.what, error.fix
    if isinstance(error, OSError) and error.errno in _DISK:
        what = f"{error.filename or 'a file'}: {_DISK[error.errno]} ({_free_space(error.filename)})"
        fix = "free space or fix the permissions, and run the same command again: what was finished stays"
        return 1, "failed", what, fix
    what = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    return 1, "failed", what, "unexpected; the log has the traceback with the values of all variables"


def tell(attempt: Attempt, path: Path, error: BaseException) -> None:
    """Say on the console and in the log how the attempt has ended."""
    if isinstance(error, SystemExit) and attempt.outcome != "terminated":
        return  # whoever exits on purpose has said why
    if attempt.outcome in ("interrupted", "terminated"):
        log.error("%s %s; %s", attempt.stage, attempt.what, attempt.fix)
        return
    log.debug("where it was raised:\n%s", traceback_with_variables(error))
    log.error("%s %s: %s", attempt.stage, attempt.outcome, attempt.what)
    log.error("%s(log: %s)", f"what to do: {attempt.fix} " if attempt.fix else "", path)


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
