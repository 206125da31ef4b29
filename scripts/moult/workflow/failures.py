"""What has failed, from the records of the stages' attempts (moult/run/attempt.py): one table over all runs."""

import logging
import shutil
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from moult.errors import some
from moult.run.attempt import Attempt
from moult.run.process import is_running

# Of several processes of a stage the first of these counts: when one fails, the others are stopped.
CAUSES = ("failed", "unfinished", "killed", "interrupted", "terminated")


class Failure(NamedTuple):
    """A stage that has ended without its outputs. `cause` is one of CAUSES; `runs` are those that need the outputs."""

    stage: str
    what: str
    fix: str
    cause: str
    log: Path
    runs: list[str]


def failures_since(started: float, logs: Path) -> list[Failure]:
    """The stages whose last attempt since `started` (seconds since the epoch) has failed, in the order of their logs."""
    attempts = _attempts(logs.glob("**/attempts/*.json"), started)
    found = [_failure_of_last(attempts[log]) for log in sorted(attempts)]
    return [failure for failure in found if failure]


class NotAgain(logging.Filter):
    """A filter of Snakemake's logger, which lets every line pass. When a job has failed, it keeps Snakemake from trying again
    what would fail in the same way (`Attempt.again`): a retry on a cluster waits in the queue, and takes a GPU, for nothing.

    Snakemake (9.27) decides by the number of attempts only, after it has logged the error.

    Args:
        running: returns Snakemake's running jobs.
        started: attempts before this time (seconds since the epoch) do not count.
    """

    def __init__(self, running: Callable[[], Iterable[Any]], started: float):
        super().__init__()
        self.running, self.started = running, started

    def filter(self, record: Any) -> bool:
        if getattr(record, "event", None) in ("job_error", "group_error"):
            for job in list(self.running()):
                logs = [Path(log) for part in getattr(job, "jobs", [job]) for log in part.log]
                if any(_is_hopeless(log, self.started) for log in logs):
                    job.attempt = job.restart_times + 1
        return True


def _is_hopeless(log: Path, started: float) -> bool:
    """Whether the last attempt with this log of a rule has failed, and would fail again."""
    attempts = _attempts(log.parent.glob(f"attempts/{log.stem}-*.json"), started).get(str(log), [])
    last = max((attempt.begun for attempt, _ in attempts), default="")
    return any(not attempt.again for attempt, heard in attempts if heard >= last)


def _attempts(records: Iterable[Path], started: float) -> dict[str, list[tuple[Attempt, str]]]:
    """By the log of the rule: the attempts since `started`, each with when it was heard of last."""
    attempts: dict[str, list[tuple[Attempt, str]]] = {}
    for record in records:
        attempt = Attempt.read(record)
        if attempt and record.stat().st_mtime >= started:
            attempts.setdefault(attempt.log, []).append((attempt, attempt.ended or _last_line(record)))
    return attempts


def _last_line(record: Path) -> str:
    """When the attempt was heard of last: of one that was killed, when its log was written to last."""
    log = record.with_suffix(".log")
    seconds = (log if log.exists() else record).stat().st_mtime
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def _failure_of_last(attempts: list[tuple[Attempt, str]]) -> Failure | None:
    """Why the last attempt has failed, or None. `attempts` at one stage, each with when it was heard of last."""
    last = max((attempt for attempt, _ in attempts), key=lambda attempt: attempt.begun)
    if last.outcome == "done":
        return None
    together = [_failure(attempt) for attempt, heard in attempts if heard >= last.begun]
    return min(filter(None, together), key=lambda failure: CAUSES.index(failure.cause), default=None)


def _failure(attempt: Attempt) -> Failure | None:
    cause, what, fix = attempt.outcome, attempt.what, attempt.fix
    if cause == "done":
        return None
    if cause == "running":
        if is_running(attempt.process):  # for another Snakemake
            return None
        cause, what, fix = "killed", "killed without an error message (usually out of memory)", "give it more memory"
    if cause == "unfinished":
        what = f"unfinished: {what}"
    return Failure(attempt.stage, what, fix, cause, Path(attempt.log), [])


def table(failures: list[Failure], width: int | None = None) -> str:
    """Runs, stage, and what is wrong, in columns; below it what to do, and the log. A path is never broken."""
    width = max(80, width or shutil.get_terminal_size((120, 0)).columns)
    rows = []
    for failure in failures:
        fix = [f"-> {failure.fix}"] if failure.fix else []
        rows.append(
            (some(failure.runs, 8) or "-", failure.stage, "\n".join([failure.what, *fix, f"   log: {failure.log}"]))
        )
    headers = ("runs", "stage", "what is wrong -> what to do")
    # tabulate leaves two columns free on the right of a header, and between two cells.
    taken = [max(len(headers[column]) + 2, *(min(24, len(row[column])) for row in rows)) + 2 for column in (0, 1)]
    text = tabulate(
        rows,
        headers=headers,
        tablefmt="plain",
        disable_numparse=True,
        maxcolwidths=[24, None, width - sum(taken)],
        break_long_words=False,
        break_on_hyphens=False,
    )
    return f"\n{len(rows)} stage{'s have' if len(rows) > 1 else ' has'} failed:\n\n{text}"
