"""Rows as records: what is equal, drawn and written is what it would be with the rows themselves."""

import io
import json

import numpy as np
import pytest

from moult.data.first_pass import digest, line_of
from moult.data.records import Rows, record

OTHER = 'rows "of"\\ [1],"source":2.jsonl'  # a name may be anything


def rows_of(*rows: dict) -> Rows:
    """Rows of these values; the others are those of an ordinary row."""
    lines, records = io.BytesIO(b"of other rows"), []
    lines.seek(0, io.SEEK_END)
    for number, row in enumerate(rows, 1):
        given = {
            "key": digest(b"%d" % number),
            "group": digest(b"g%d" % number),
            "sample": 0.5,
            "split": 0.5,
            "source": 0,
        }
        given |= {"name": "a.jsonl", "text": f"text {number}"} | row
        place, text = f"{given.pop('name')}:{number}", json.dumps(given.pop("text")).encode()
        line = line_of(place, given["group"], given["source"], {"text": text})
        lines.write(line)
        records.append(
            record(again=row.get("again", False), length=len(line), **{k: v for k, v in given.items() if k != "again"})
        )
    return Rows.of(records, lines, len(b"of other rows"))


def test_equal_is_what_is_equal_as_a_whole():
    first, second = b"a" * 8, b"b" * 8
    keys = [first + second, second + first, first + first, first + second, second + first, b"\0" * 16, b"\xff" * 16]
    rows = rows_of(*({"key": key} for key in keys))
    assert rows.is_first("key").tolist() == [True, True, True, False, False, True, True]
    assert rows.count_of("key") == 5
    other = rows_of({"key": first + first}, {"key": b"\xff" * 16})
    assert rows.is_in(other, "key").tolist() == [False, False, True, False, False, False, True]
    assert not rows.take([]).is_in(other, "key").any() and not rows.is_in(other.take([]), "key").any()


def test_groups_come_in_the_order_of_their_draws_and_then_of_their_hashes():
    of = [("c", 0.2), ("b", 0.2), ("a", 0.9), ("b", 0.2), ("d", 0.1)]
    rows = rows_of(*({"group": letter.encode() * 16, "split": draw} for letter, draw in of))
    group, sizes, order = rows.groups()
    letter = {number: of[index][0] for index, number in enumerate(group)}
    assert [(letter[number], sizes[number]) for number in order] == [("d", 1), ("b", 2), ("c", 1), ("a", 1)]


def test_equal_draws_are_ordered_by_place():
    rows = rows_of(*({"sample": draw} for draw in [0.9, 0.2, 0.2, 0.1, 0.9, 0.9, *[0.2] * 6]))
    assert [rows.place(index) for index in rows.drawn()] == [
        f"a.jsonl:{number}" for number in (4, 10, 11, 12, 2, 3, 7, 8, 9, 1, 5, 6)
    ]


@pytest.mark.parametrize("together", [1, 2, 500])
def test_lines_with_their_languages_and_copies(monkeypatch, together):
    monkeypatch.setattr("moult.data.records._TOGETHER", together)
    rows = rows_of({}, {"name": OTHER}, {"source": 1, "again": True}, {}, {}, {"name": OTHER}, {}).take(
        [0, 1, 2, 4, 5, 6]
    )
    rows.records["language"], rows.languages = [0, 2, 1, 0, 1, 0], ["", "en", "en+zh"]
    times = rows.times([1.0, 2.25])
    assert times.tolist() == [1, 1, 3, 1, 1, 1]
    times[3] = 0
    pieces = list(rows.finished(times))
    assert sum(count for count, _ in pieces) == 6
    text = b"".join(lines for _, lines in pieces).decode()
    found = [json.loads(line) for line in text.split("\n")[:-1]]
    ids = [(row["id"], row.get("language"), row["source"]) for row in found]
    assert ids == [
        ("a.jsonl:1", None, 0),
        (f"{OTHER}:2", "en+zh", 0),
        *[(f"a.jsonl:3{copy}", "en", 1) for copy in ("", "#2", "#3")],
        (f"{OTHER}:6", "en", 0),
        ("a.jsonl:7", None, 0),
    ]
    assert text == "".join(
        json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n" for row in found
    )


def test_counts():
    rows = rows_of({"source": 3}, {"source": 1}, {"source": 3})
    assert rows.counts("source") == {1: 1, 3: 2}
    assert np.array_equal(rows.once(), [1, 1, 1])
