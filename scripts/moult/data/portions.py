"""The lines of prepared rows, as several processes work on them."""

import json
from collections.abc import Collection, Iterator
from pathlib import Path

# What a process takes at a time: so few rows of a few turns, or so much text of long ones, that the bar moves.
PORTION_ROWS = 256
PORTION_BYTES = 2**18


def portion_count(path: Path, rows: int = 0) -> int:
    """In about how many portions the file comes; no more processes than that have work. `rows`: how many it has, if known."""
    return max(-(-rows // PORTION_ROWS), -(-path.stat().st_size // PORTION_BYTES))


def portions(path: Path, without: Collection[str] = ()) -> Iterator[list[bytes]]:
    """The lines of a file, some at a time, but for the rows with the ids `without`."""
    lines: list[bytes] = []
    size = 0
    with path.open("rb") as file:
        for line in file:
            if without and json.loads(line)["id"] in without:
                continue
            lines.append(line)
            size += len(line)
            if len(lines) >= PORTION_ROWS or size >= PORTION_BYTES:
                yield lines
                lines, size = [], 0
    if lines:
        yield lines
