"""What has failed, from the records of the stages' attempts (moult/run/attempt.py): one table over all runs."""

import logging
import shutil
from collections.abc import Callable, Iterable
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
    return any(not attempt.again for attempt in _last_of_each(attempts))


def _attempts(records: Iterable[Path], started: float) -> dict[str, list[Attempt]]:
    """By the log of the rule: the attempts since `started`."""
    attempts: dict[str, list[Attempt]] = {}
    for record in records:
        attempt = Attempt.read(record)
        if attempt and record.stat().st_mtime >= started:
            attempts.setdefault(attempt.log, []).append(attempt)
    return attempts


def _failure_of_last(attempts: list[Attempt]) -> Failure | None:
    """Why the last attempt has failed, or None. `attempts` at one stage."""
    last = max(attempts, key=lambda attempt: attempt.begun)
    if last.outcome == "done":
        return None
    failures = filter(None, map(_failure, _last_of_each(attempts)))
    return min(failures, key=lambda failure: CAUSES.index(failure.cause), default=None)


def _last_of_each(attempts: list[Attempt]) -> list[Attempt]:
    """The last attempt of each of the stage's processes. They begin together, and one may be gone before another is there."""
    return list({attempt.rank: attempt for attempt in sorted(attempts, key=lambda attempt: attempt.begun)}.values())


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
