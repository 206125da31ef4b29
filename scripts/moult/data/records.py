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

# Packed by the processes that read, and taken as an array as it is.
_PACKED = struct.Struct("<16s16sdd?IIQQQ?")
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
        ("number", "<u8"),
        ("moved", "?"),
    ]
)


_TOGETHER = 500  # rows


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
    return _PACKED.pack(key[:16], group[:16], sample, split, again, source, 0, length, 0, 0, False)


@dataclass
class Rows:
    """Rows in the order in which they were read.

    records: array of RECORD. Its language is an index of `languages`, whose first is "": not looked for. number: which of the
        rows of all sources it is. moved: whether its group is another one than its line says.
    lines: the file with their lines, as they are written but for language, copies and moved groups.
    """

    records: np.ndarray
    lines: BinaryIO
    languages: list[str]

    @classmethod
    def of(cls, packed: list[bytes], lines: BinaryIO, start: int, number: int = 0) -> "Rows":
        """Rows whose lines follow each other in `lines` from `start` on, and whose numbers begin with `number`."""
        records = np.frombuffer(bytearray().join(packed), RECORD)
        ends = start + np.cumsum(records["length"])
        records["start"] = ends - records["length"]
        records["number"] = number + np.arange(len(records))
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

    def first_of(self, column: str) -> np.ndarray:
        """Of each row the index of the first one with its key or group."""
        return _first_equal(self.records[column])

    def is_first(self, column: str) -> np.ndarray:
        """Mask of the rows that are the first of their key or group."""
        return self.first_of(column) == np.arange(len(self))

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

    def finished(self, times: np.ndarray) -> Iterator[tuple[int, bytes]]:
        """(how many rows, their lines) in pieces: each row `times` as often, with its language; a copy has an id of its own."""
        start, language = self.records["start"], self.records["language"]
        end = start + self.records["length"]
        is_plain = (times == 1) & (language == 0) & ~self.records["moved"]
        # Rows that stand together in the file and stay as they are are copied together, but not too many at once.
        goes_on = is_plain[1:] & is_plain[:-1] & (start[1:] == end[:-1])
        goes_on[_TOGETHER - 1 :: _TOGETHER] = False
        firsts = np.flatnonzero(np.append(True, ~goes_on))
        lasts: np.ndarray = np.append(firsts[1:], len(self)) - 1
        for first, last in zip(firsts, lasts, strict=True):
            self.lines.seek(int(start[first]))
            data = self.lines.read(int(end[last] - start[first]))
            if not is_plain[first]:
                group = b"%016x" % int(self.records["group"][first][0])
                data = _copies(data, int(times[first]), self.languages[language[first]], group)
            yield int(last - first) + 1, data


def _first_equal(values: np.ndarray) -> np.ndarray:
    """For each of n pairs of numbers, (n, 2), the index of the first equal pair."""
    high, low = values.astype(np.uint64).T
    order = np.lexsort((low, high))  # stable: equal ones stay in their order
    high, low = high[order], low[order]
    is_new: np.ndarray = np.ones(len(values), bool)
    is_new[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    first = np.empty_like(order)
    first[order] = order[is_new][np.cumsum(is_new) - 1]
    return first


# In JSON a quote inside of a text has a backslash before it.
_IDENTITY = re.compile(rb'\{"group":"\w{16}","id":"(?:[^"\\]|\\.)*"')


def _copies(line: bytes, count: int, language: str, group: bytes) -> bytes:
    identity = _IDENTITY.match(line)
    assert identity is not None, line[:200]
    line = line[:10] + group + line[26:]
    end = identity.end()
    rest = (f',"language":"{language}"'.encode() if language else b"") + line[end:]
    ids = [line[:end], *(line[: end - 1] + b'#%d"' % copy for copy in range(2, count + 1))]
    return b"".join([start + rest for start in ids[:count]])
