"""Processes and signals: a stage ends on SIGTERM as on an error, and when the Snakemake that has started it is gone."""

import logging
import os
import signal
import sys
import threading
import time
import types
from pathlib import Path

log = logging.getLogger("moult")

# Exit code of a stage that SIGTERM has ended.
TERMINATED = 128 + signal.SIGTERM

# What tells a stage which Snakemake has started it: a `process_name` (rules/failures.smk).
STARTED_BY = "MOULT_STARTED_BY"


def process_name(process: int | None = None) -> str:
    """A name for a process (default: this one): its id, when it was started, the machine, the machine's id namespace.

    Ids are given out again, and a container or another machine has its own: the name is never another process's.
    """
    process = process or os.getpid()
    return f"{process} {_state_and_start(process)[1]} {os.uname().nodename} {_namespace()}"


def is_running(name: str) -> bool | None:
    """Whether the process of that `process_name` runs. None if it can't be seen from here."""
    process, start, *place = name.split(" ")
    if place != [os.uname().nodename, _namespace()]:
        return None
    try:
        os.kill(int(process), 0)
        state, started = _state_and_start(int(process))
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return state != "Z" and started == start  # Z: it has ended, and its parent has not asked how


def _state_and_start(process: int) -> tuple[str, str]:
    """Two fields of /proc/<id>/stat, behind the command's name in brackets. Empty on a system without /proc."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return "", ""
    return fields[0], fields[19]


def _namespace() -> str:
    path = Path("/proc/self/ns/pid")
    return str(path.readlink()) if path.exists() else ""


def end_with_starter() -> None:
    """Terminate this stage when the Snakemake that has started it is gone, so that a killed one leaves no trainer behind.

    Nothing is watched if the stage is run by hand, or in a container that doesn't see that process.
    """
    starter = os.environ.get(STARTED_BY, "")
    if not starter or is_running(starter) is None:
        return

    def watch() -> None:
        while is_running(starter):
            time.sleep(1)
        log.warning("the Snakemake that has started this is gone")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def exit_on_signal(number: int, frame: types.FrameType | None) -> None:
    """Handler of SIGTERM. Raising lets `atomic_folder` and the like clean up, which dying from the signal would not."""
    signal.signal(number, signal.SIG_IGN)  # a second one must not stop the cleaning up
    signal.signal(signal.SIGALRM, _exit_if_swallowed)
    signal.setitimer(signal.ITIMER_REAL, 1, 1)
    raise SystemExit(TERMINATED)


def _exit_if_swallowed(number: int, frame: types.FrameType | None) -> None:
    # What is raised in a callback of the interpreter's (of a weak reference, `__del__`) is swallowed, and the work goes on.
    if not isinstance(sys.exc_info()[1], SystemExit):
        raise SystemExit(TERMINATED)
