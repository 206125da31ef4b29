"""What differs between two files of prepared rows, by the rows' ids. Of each row 16 bytes are held, whatever its text."""

import hashlib
import json
from array import array
from itertools import islice
from pathlib import Path
from typing import TypedDict

from moult.files import read_jsonl

# What a row says of itself besides its text.
NAMES = ("id", "group", "source", "language")


class Changed(TypedDict):
    """How many rows are in each file; how many of b have an id that a has not (added), the reverse (removed), or the same id and
    another text (changed). moved: of the added and changed ones, how many have a text that is in a under another id.

    examples: {"added": [row of b], "removed": [row of a], "changed": [(row of a, row of b)]}
    """

    rows: tuple[int, int]
    added: int
    removed: int
    changed: int
    moved: int
    examples: dict[str, list]


def changed_rows(a: str | Path, b: str | Path, examples: int) -> Changed:
    """Compare two train.jsonl. A row that is there several times, because its source has a weight, counts once."""
    import numpy as np

    ids_a, texts_a = _hashes(a)
    ids_b, texts_b = _hashes(b)
    _, first_a, first_b = np.intersect1d(ids_a, ids_b, return_indices=True)
    differ = texts_a[first_a] != texts_b[first_b]
    pairs = sorted(zip(first_a[differ].tolist(), first_b[differ].tolist(), strict=True))
    removed, added = _only(ids_a, ids_b), _only(ids_b, ids_a)
    new = texts_b[np.concatenate([added, first_b[differ]])]
    shown = pairs[:examples]
    old_a, new_b = removed[:examples].tolist(), added[:examples].tolist()
    rows_a = _rows(a, {*old_a, *(place for place, _ in shown)})
    rows_b = _rows(b, {*new_b, *(place for _, place in shown)})
    return {
        "rows": (len(ids_a), len(ids_b)),
        "added": len(added),
        "removed": len(removed),
        "changed": len(pairs),
        "moved": int(np.isin(new, texts_a).sum()),
        "examples": {
            "added": [rows_b[place] for place in new_b],
            "removed": [rows_a[place] for place in old_a],
            "changed": [(rows_a[one], rows_b[other]) for one, other in shown],
        },
    }


def _only(ids, others):
    """The places of the ids that the others do not have, each id once, in order."""
    import numpy as np

    _, first = np.unique(ids, return_index=True)
    first.sort()
    return first[~np.isin(ids[first], others)]


def _hashes(path: str | Path):
    """Of each row a hash of its id, and of its text: two uint64 arrays (rows,)."""
    import numpy as np

    ids, texts = array("Q"), array("Q")
    for row in read_jsonl(path):
        ids.append(_hash(row["id"]))
        texts.append(_hash({key: value for key, value in row.items() if key not in NAMES}))
    return np.array(ids, dtype=np.uint64), np.array(texts, dtype=np.uint64)


def _hash(value) -> int:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _rows(path: str | Path, places: set[int]) -> dict[int, dict]:
    last = max(places, default=-1)
    return {place: row for place, row in enumerate(islice(read_jsonl(path), last + 1)) if place in places}
