"""The file of tokens: readers find what was written, and hold nothing of it in memory."""

import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from moult.data.token_file import TokenFile, lengths_of, rows_of, token_schema, unpack


def write(path: Path, lengths: list[int]) -> list[dict]:
    rows = [
        {
            "id": f"r{place}",
            "group": str(place),
            "source": 0,
            "length": length,
            "input_ids": list(range(place, place + length)),
            "labels": [-100, *range(place + 1, place + length)],
            "answer_start": -1,
            "trained_bytes": 3,
        }
        for place, length in enumerate(lengths)
    ]
    with TokenFile(path) as file:
        for begin in range(0, len(rows), 7):
            file.add(pa.RecordBatch.from_pylist(rows[begin : begin + 7], schema=token_schema()))
    return rows


def test_rows_are_those_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("moult.data.token_file.ROW_GROUP", 100)
    path = tmp_path / "val.parquet"
    rows = write(path, [3, 250, 1, *([40] * 30)])
    assert pq.ParquetFile(path).num_row_groups > 5
    found = rows_of(path)
    assert [dict(row) for row in found] == rows
    assert all(type(token) is int for token in found[1]["input_ids"])
    assert found[2].get("length") == 1 and "none" not in found[2]
    assert [length for part in lengths_of(path) for length in part] == [row["length"] for row in rows]
    assert list(tmp_path.iterdir()) == [path]  # nothing is left beside it


def test_rows_are_on_the_disk(tmp_path):
    """Reading the file holds a row group, and no more, in Arrow's memory; and afterwards nothing."""
    path = tmp_path / "val.parquet"
    write(path, [10_000] * 400)
    before = pa.total_allocated_bytes()
    rows = rows_of(path)
    deadline = time.monotonic() + 10  # Arrow's threads give back what they have read a moment later
    while pa.total_allocated_bytes() - before >= 100_000:
        assert time.monotonic() < deadline, pa.total_allocated_bytes() - before
        time.sleep(0.05)
    assert rows[399]["input_ids"][-1] == 399 + 9_999
    assert pa.total_allocated_bytes() - before < 100_000


def test_unpacked_columns(tmp_path):
    write(tmp_path / "train.parquet", [5, 6])
    unpack(tmp_path / "train.parquet", tmp_path / "train.arrow", ["labels", "length"])
    table = pa.ipc.open_stream(pa.memory_map(str(tmp_path / "train.arrow"))).read_all()
    assert table.column_names == ["labels", "length"] and table["length"].to_pylist() == [5, 6]
