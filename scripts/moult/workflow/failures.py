"""What has failed, told from the logs of the stages: one table over all runs."""

import os
import re
import shutil
import textwrap
from datetime import datetime
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from moult.errors import some

_RECORD = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (\w+) +(?:([\w.]+): )?", re.MULTILINE)
_ATTEMPT = re.compile(r"(?P<stage>.*?)(\.log)?-(?P<begun>\d{8}T\d{6})-\d+$")
_TERMINATED = "terminated;"
_KILLED = "killed without a word"
_LAST_WORD = re.compile(r"(\w+) (?:failed: )?(.*)", re.DOTALL)


class Failure(NamedTuple):
    """A stage that has ended without its outputs. `runs` are those that need them."""

    stage: str
    what: str
    fix: str
    log: Path
    runs: list[str]


def failures_since(started: float, logs: Path) -> list[Failure]:
    """The stages whose last attempt since `started` (seconds since the epoch) has failed, in the order of their logs."""
    attempts: dict[Path, list[Path]] = {}
    for attempt in sorted(logs.glob("**/attempts/*.log"), key=_written, reverse=True):
        name = _ATTEMPT.match(attempt.stem)
        if name and _written(attempt) >= started:
            attempts.setdefault(attempt.parent.parent / f"{name['stage']}.log", []).append(attempt)
    found = [_last_failure(log, newest_first) for log, newest_first in sorted(attempts.items())]
    return [failure for failure in found if failure]


def _written(attempt: Path) -> float:
    return attempt.stat().st_mtime


def _last_failure(log: Path, attempts: list[Path]) -> Failure | None:
    """Why the last attempt has failed; `attempts` begin with the newest.

    Of several processes (torchrun) each has a log, and when one fails the others are stopped: what it has said counts.
    """
    newest = _failure(log, attempts[0])
    if newest is None:
        return None
    begun = datetime.strptime(f"{_ATTEMPT.match(attempts[0].stem)['begun']}+0000", "%Y%m%dT%H%M%S%z").timestamp()
    others = [_failure(log, attempt) for attempt in attempts[1:] if _written(attempt) >= begun]
    return min([newest, *filter(None, others)], key=lambda failure: failure.what.startswith((_TERMINATED, _KILLED)))


def _failure(log: Path, attempt: Path) -> Failure | None:
    pieces = _RECORD.split(attempt.read_text(encoding="utf-8", errors="replace"))[1:]
    records = list(zip(pieces[0::3], pieces[1::3], map(str.strip, pieces[2::3]), strict=True))
    errors = [text for level, logger, text in records if (level, logger) == ("ERROR", "moult")]
    if errors:
        fix = re.fullmatch(r"(?:what to do: (.*) )?\(log: .*\)", errors[-1], re.DOTALL)
        stage, what = _LAST_WORD.fullmatch(errors[-2] if fix and len(errors) > 1 else errors[-1]).groups()
        return Failure(stage, what, (fix and fix.group(1)) or "", log, [])
    if any(re.fullmatch(r"\w+ done in [\d.]+ s", text) for *_, text in records) or _runs(attempt):
        return None
    return Failure(log.stem, f"{_KILLED}, most often for want of memory", "give it more memory", log, [])


def _runs(attempt: Path) -> bool:
    """Whether the process that writes this log is still at work, for another Snakemake."""
    try:
        os.kill(int(attempt.stem.rpartition("-")[2]), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def table(failures: list[Failure], width: int | None = None) -> str:
    """Runs, stage, and what is wrong, in columns; below it what to do, and the log."""
    width = max(80, width or shutil.get_terminal_size((120, 0)).columns)
    rows = [(some(failure.runs, 8), failure.stage, failure) for failure in failures]
    first = min(24, max(len("runs"), *(len(runs) for runs, *_ in rows)))
    second = max(len("stage"), *(len(stage) for _, stage, _ in rows))
    third = width - first - second - 4

    def line(*cells: str) -> str:
        return f"{cells[0]:<{first}}  {cells[1]:<{second}}  {cells[2]}".rstrip()

    plural = "s have" if len(rows) > 1 else " has"
    title = "what is wrong -> what to do"
    lines = ["", f"{len(rows)} stage{plural} failed:", "", line("runs", "stage", title)]
    lines.append(line("-" * first, "-" * second, "-" * len(title)))
    for runs, stage, failure in rows:
        text = _wrapped(failure.what, third)
        if failure.fix:
            text += _wrapped(f"-> {failure.fix}", third, "   ")
        text.append(f"   log: {failure.log}")
        lines += [
            line(*cells) for cells in zip_longest(textwrap.wrap(runs, first) or ["-"], [stage], text, fillvalue="")
        ]
    return "\n".join(lines)


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    """`text` in lines of at most `width`, its own line breaks kept. A path is never broken."""
    return [
        part
        for line in text.splitlines()
        for part in textwrap.wrap(
            line,
            width,
            subsequent_indent=indent + " " * (len(line) - len(line.lstrip())),
            break_long_words=False,
            break_on_hyphens=False,
        )
    ]
