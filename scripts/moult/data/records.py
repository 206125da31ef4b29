"""Rows whose text is not in memory: a record of fixed size for each, in an array, and its finished line in a file.

What decides about a row (copies, sample, split, weights) is in its record. A million rows take 0.1 GB, however long they are.
"""

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

import numpy as np

from moult.data.conversation import joined

# Packed by the processes that read, and taken as an array as it is.
_PACKED = struct.Struct("<16s16sdd?IIQQ")
RECORD = np.dtype(
    [
        ("key", ">u8", 2),
        ("group", ">u8", 2),
        ("sample", "<f8"),
        ("split", "<f8"),
        ("again", "?"),
        ("source", "<u4"),
        ("language", "<u4"),
        ("length", "<u8"),
        ("start", "<u8"),
    ]
)


def record(key: bytes, group: bytes, sample: float, split: float, again: bool, source: int, length: int) -> bytes:
    """A row as it is decided about.

    Args:
        key: SHA-256 of the content. The first half is kept: two of 1e9 different ones are equal with a chance of 1e-21.
        group: SHA-256 of what its group is.
        sample, split: in [0, 1): what orders the rows of a sample, and the groups for the validation part.
        again: whether the fraction of its source's weight repeats it.
        source: index of its source.
        length: bytes of its line.
    """
    return _PACKED.pack(key[:16], group[:16], sample, split, again, source, 0, length, 0)


@dataclass
class Rows:
    """Rows in the order in which they were read.

    records: array of RECORD. Its language is an index of `languages`, whose first is "": not looked for.
    lines: the file with their lines, as they are written but for language and copies.
    """

    records: np.ndarray
    lines: BinaryIO
    languages: list[str]

    @classmethod
    def of(cls, packed: list[bytes], lines: BinaryIO, start: int) -> "Rows":
        """Rows whose lines follow each other in `lines` from `start` on."""
        records = np.frombuffer(bytearray().join(packed), RECORD)
        ends = start + np.cumsum(records["length"])
        records["start"] = ends - records["length"]
        return cls(records, lines, [""])

    def __len__(self) -> int:
        return len(self.records)

    def take(self, which: np.ndarray) -> "Rows":
        """Those of a mask, or at these indices."""
        return replace(self, records=self.records[which])

    def line(self, index: int) -> bytes:
        self.lines.seek(int(self.records["start"][index]))
        return self.lines.read(int(self.records["length"][index]))

    def place(self, index: int) -> str:
        return json.loads(self.line(index))["id"]

    # --- what is equal ---

    def is_first(self, column: str) -> np.ndarray:
        """Mask of the rows that are the first of their key or group."""
        return _first_equal(self.records[column]) == np.arange(len(self))

    def count_of(self, column: str) -> int:
        """How many different keys or groups there are."""
        return int(self.is_first(column).sum())

    def is_in(self, other: "Rows", column: str) -> np.ndarray:
        """Mask of the rows whose key or group is that of a row of `other`."""
        both = np.concatenate([other.records[column], self.records[column]])
        return _first_equal(both)[len(other) :] < len(other)

    def groups(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(the group of each row as a number, the sizes of the groups, their numbers in the order of their draws)."""
        first, group, sizes = np.unique(_first_equal(self.records["group"]), return_inverse=True, return_counts=True)
        records = self.records[first]
        high, low = records["group"].astype(np.uint64).T
        return group, sizes, np.lexsort((low, high, records["split"]))

    # --- samples and weights ---

    def drawn(self) -> np.ndarray:
        """Indices in the order of the draws; of equal draws, in that of the places."""
        order = np.argsort(self.records["sample"], kind="stable")
        draws = self.records["sample"][order]
        ties = np.flatnonzero(draws[1:] == draws[:-1])
        for run in np.split(ties, np.flatnonzero(np.diff(ties) > 1) + 1) if len(ties) else []:
            tied = slice(run[0], run[-1] + 2)
            order[tied] = sorted(order[tied].tolist(), key=self.place)
        return order

    def times(self, weights: list[float]) -> np.ndarray:
        """How often each row is written, by the weights of the sources."""
        whole = np.floor(weights).astype(np.int64)
        return whole[self.records["source"]] + self.records["again"]

    def once(self) -> np.ndarray:
        return np.ones(len(self), np.int64)

    # --- the end ---

    def counts(self, column: str) -> dict[int, int]:
        """How many rows have each value of `source` or `language`."""
        values, counts = np.unique(self.records[column], return_counts=True)
        return dict(zip(values.tolist(), counts.tolist(), strict=True))

    def finished(self, times: np.ndarray) -> Iterator[bytes]:
        """The lines, each `times` as often, with the language, and copies with an id of their own."""
        for begin in range(0, len(self), 10_000):
            part = self.records[begin : begin + 10_000]
            columns = (part["start"], part["length"], part["language"], times[begin : begin + 10_000])
            for start, length, language, count in zip(*(column.tolist() for column in columns), strict=True):
                if count:
                    self.lines.seek(start)
                    line = self.lines.read(length)
                    yield from _copies(line, count, self.languages[language])


def _first_equal(values: np.ndarray) -> np.ndarray:
    """For each of n pairs of numbers, (n, 2), the index of the first equal pair."""
    high, low = values.astype(np.uint64).T
    order = np.lexsort((low, high))  # stable: equal ones stay in their order
    high, low = high[order], low[order]
    is_new = np.ones(len(values), bool)
    is_new[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    first = np.empty_like(order)
    first[order] = order[is_new][np.cumsum(is_new) - 1]
    return first


def line_of(place: str, group: bytes, source: int, fields: dict[str, str]) -> bytes:
    """The line of a row in canonical JSON. fields: its content, {field: JSON}."""
    identity = {"group": f'"{group.hex()[:16]}"', "id": json.dumps(place, ensure_ascii=False), "source": str(source)}
    return (joined(identity | fields) + "\n").encode()


# In JSON a quote inside of a text has a backslash before it.
_IDENTITY = re.compile(rb'\{"group":"\w{16}","id":"(?:[^"\\]|\\.)*"')


def _copies(line: bytes, count: int, language: str) -> Iterator[bytes]:
    if not language and count == 1:
        yield line
        return
    end = _IDENTITY.match(line).end()
    rest = (f',"language":"{language}"'.encode() if language else b"") + line[end:]
    yield line[:end] + rest
    for copy in range(2, count + 1):
        yield line[: end - 1] + f'#{copy}"'.encode() + rest
