"""The record of an attempt at a stage: a small JSON beside the attempt's log, from which the failure table is made.

`<logs>/<run>/attempts/<stage>-<UTC time>-<process>.json`. It is written when the stage begins and when it ends. A record that
still says "running" when its process is gone is of one that was killed.
"""

import contextlib
import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from moult.files import write_text
from moult.run.process import process_name

SCHEMA_VERSION = 1


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def prefix(stage: str, about: str) -> str:
    """What each line on the console begins with, behind the time: the stage, and the run or dataset if that is known."""
    return f"{stage:<14} {about}: " if about else f"{stage:<14} "


@dataclass
class Attempt:
    """One process's attempt at a stage.

    stage: its name.
    log: the log that the rule names. `<the record's name>.log` is this attempt's own.
    rank: which of the stage's processes it was (torchrun); 0 for most stages.
    process: see `process_name`.
    begun, ended: UTC times in ISO format; `ended` is None while it runs.
    outcome: running, done, failed, unfinished (the same command goes on), interrupted (Ctrl-C), or terminated (SIGTERM).
    what: what is wrong, or of a stage that is done what it found.
    fix: what to do about it.
    again: whether it may be tried again as it is; not if it would fail in the same way (errors.HOPELESS).
    """

    stage: str
    log: str
    rank: int = 0
    process: str = field(default_factory=process_name)
    begun: str = field(default_factory=now)
    ended: str | None = None
    outcome: str = "running"
    what: str = ""
    fix: str = ""
    again: bool = True
    schema_version: int = SCHEMA_VERSION

    @property
    def about(self) -> str:
        """The run or dataset that the stage works for: a rule's log is `<logs>/<run or dataset>/<stage>.log`. Otherwise ""."""
        log = Path(self.log)
        return log.parent.name if len(log.parts) > 2 and log.stem == self.stage else ""

    def line(self) -> str:
        """How it ended, as its console said it."""
        clock = datetime.fromisoformat(self.ended or self.begun).astimezone()
        return f"{clock:%H:%M:%S} {prefix(self.stage, self.about)}{self.what}"

    def write(self, path: Path) -> None:
        """Write the record. On a full disk it takes the place of the older one, for which there was room; or it is lost."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        with contextlib.suppress(OSError):
            try:
                write_text(path, text)
            except OSError:
                with path.open("r+", encoding="utf-8") as file:
                    file.write(text)
                    file.truncate()

    @classmethod
    def read(cls, path: Path) -> "Attempt | None":
        """The record, or None if the file is not one of this version."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(**content) if content["schema_version"] == SCHEMA_VERSION else None
        except (OSError, ValueError, TypeError, KeyError):
            return None
