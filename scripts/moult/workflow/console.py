"""Snakemake's own lines, as few as a person needs: what will run, how far it is, what went wrong. The stages say the rest."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moult.run.attempt import Attempt

# Seconds until a line says how many jobs are done, which then double, and the most that they become.
FIRST_PROGRESS, RAREST_PROGRESS = 60.0, 600.0

# Lines without an event that tell them apart, by how they begin (Snakemake 9.27).
NOISE = (
    "Select jobs to execute",
    "Using shell:",
    "Singularity containers: ignored",
    "Group jobs: inactive",
    "Some jobs were triggered by provenance information",
    "Rules with provenance triggered jobs",
)


class FewerLines(logging.Filter):
    """A filter for the handler that writes to the console. What it leaves out is in Snakemake's log all the same.

    Snakemake's `--quiet` (9.27) takes too much with it: `rules` its error messages and the commands of `-p`, `progress` the
    table of what will run. With `-p` (`commands`) each job's block is shown (files, reason, command), and its end.

    `say` writes a line. It gets what a stage has found whose job ran elsewhere: on Slurm a stage's own lines are not seen here.
    """

    def __init__(self, commands: bool, say: Callable[[str], None]):
        super().__init__()
        self.commands, self.say = commands, say
        self.remote_logs: dict[int, str] = {}
        self.table_shown = False
        self.progress_shown, self.interval = time.monotonic(), FIRST_PROGRESS

    def filter(self, record: Any) -> bool:
        event = getattr(record, "event", None)
        if event is None:
            text = str(record.msg)
            if text.startswith("Reasons:") and not self.commands:
                record.msg = text.replace("check individual jobs above for details", "-p tells those of each job")
            return not text.startswith(NOISE)
        if event == "job_info":
            if not record.local and record.log:
                self.remote_logs[record.jobid] = record.log[0]
            return self.commands
        if event == "job_finished" and (found := last_done(self.remote_logs.pop(record.job_id, None))):
            self.say(found.line())
        if event == "run_info":  # a dry run shows it twice
            shown, self.table_shown = self.table_shown, True
            return not shown
        if event == "progress":
            return self._is_time(record.done == record.total)
        if event in ("job_started", "resources_info"):
            return False
        return self.commands or event not in ("group_info", "job_finished")

    def _is_time(self, last: bool) -> bool:
        now = time.monotonic()
        if not last and now - self.progress_shown < self.interval:
            return False
        self.progress_shown, self.interval = now, min(2 * self.interval, RAREST_PROGRESS)
        return True


def last_done(log: str | None) -> Attempt | None:
    """The record of the last attempt with this log of a rule that has got to its end, if there is one."""
    if log is None:
        return None
    records = map(Attempt.read, Path(log).parent.glob(f"attempts/{Path(log).stem}-*.json"))
    done = [one for one in records if one and (one.log, one.rank, one.outcome) == (log, 0, "done")]
    return max(done, key=lambda attempt: attempt.begun, default=None)
