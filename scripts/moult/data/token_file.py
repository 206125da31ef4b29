"""The file of sequences that encode writes and the trainer reads: Parquet, a sequence per row, written as they come.

Parquet is compressed, so it cannot be memory-mapped. A stage that reads rows in any order unpacks the file beside its own files
(8 bytes per token), and maps that: the system keeps in memory what is used, and takes it back where it is short.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Tokens in a row group, which is what a reader has in memory at a time. Each token has an id and a label of 4 bytes.
ROW_GROUP = 2**20


def token_schema():
    """The columns. `length` is the number of tokens: who needs no more need not read them."""
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    return pa.schema(
        [
            ("id", pa.string()),
            ("group", pa.string()),
            ("source", pa.int32()),
            ("length", pa.int32()),
            ("input_ids", ids),
            ("labels", ids),
            ("answer_start", pa.int32()),
            ("trained_bytes", pa.int32()),
        ]
    )


class TokenFile:
    """Writes sequences to a Parquet file: `with TokenFile(path) as file: file.add(batch)`.

    Where a row group ends depends on the sequences alone, so the bytes are the same however they come in batches.
    """

    def __init__(self, path: Path):
        import pyarrow.parquet as pq

        self._writer = pq.ParquetWriter(path, token_schema(), compression="zstd")
        self._waiting: list = []
        self._tokens = 0

    def add(self, batch) -> None:
        """Append a RecordBatch of `token_schema`."""
        import numpy as np

        ends = np.cumsum(batch.column("length").to_numpy(), dtype=np.int64)
        begin, before = 0, 0
        while (end := int(np.searchsorted(ends, before + ROW_GROUP - self._tokens)) + 1) <= len(ends):
            self._waiting.append(batch.slice(begin, end - begin))
            self._write()
            begin, before = end, int(ends[end - 1])
        if begin < len(ends):
            self._waiting.append(batch.slice(begin))
            self._tokens += int(ends[-1]) - before

    def _write(self) -> None:
        import pyarrow as pa

        table = pa.Table.from_batches(self._waiting).combine_chunks()
        self._writer.write_table(table, row_group_size=len(table))
        self._waiting, self._tokens = [], 0

    def __enter__(self) -> "TokenFile":
        return self

    def __exit__(self, *error) -> None:
        if self._waiting and error[0] is None:
            self._write()
        self._writer.close()


def unpack(path: Path, target: Path, columns: list[str] | None = None) -> None:
    """Write the sequences of a token file as an Arrow stream, which can be memory-mapped. A row group is in memory at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        names = columns or file.schema_arrow.names
        schema = pa.schema([file.schema_arrow.field(name) for name in names])
        with pa.ipc.new_stream(target, schema) as stream:
            for group in range(file.num_row_groups):
                stream.write_table(file.read_row_group(group, names))


class Row(Mapping):
    """A sequence as a dict, of which nothing is in memory: each value is read when it is asked for."""

    __slots__ = ("_place", "_table")

    def __init__(self, table, place: int):
        self._table, self._place = table, place

    def __getitem__(self, name: str) -> Any:
        value = self._table.column(name)[self._place]
        return value.values.to_numpy().tolist() if hasattr(value, "values") else value.as_py()

    def __iter__(self) -> Iterator[str]:
        return iter(self._table.column_names)

    def __len__(self) -> int:
        return self._table.num_columns


def rows_of(path: Path) -> list[Row]:
    """The sequences of a token file. It is unpacked beside it, into a file without a name: nothing is left of that, however the
    process ends."""
    import pyarrow as pa

    handle, unpacked = tempfile.mkstemp(prefix=f"{path.stem}.tmp-", suffix=".arrow", dir=path.parent)
    os.close(handle)
    try:
        unpack(path, Path(unpacked))
        table = pa.ipc.open_stream(pa.memory_map(unpacked)).read_all()
    finally:
        Path(unpacked).unlink()
    return rows_in(table)


def rows_in(table) -> list[Row]:
    return [Row(table, place) for place in range(table.num_rows)]


def lengths_of(path: Path) -> Iterator:
    """The lengths of the sequences of a token file, a row group at a time: int32 arrays of numpy."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, ["length"]).column("length").to_numpy()


def every_nth(path: Path, count: int) -> Iterator[dict]:
    """`count` sequences of a file, spread over it; all if it has no more."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        rows = file.metadata.num_rows
        wanted = range(0, rows, max(1, rows // count))[:count]
        begin = 0
        for group in range(file.num_row_groups):
            end = begin + file.metadata.row_group(group).num_rows
            if places := [place - begin for place in wanted if begin <= place < end]:
                yield from file.read_row_group(group, ["id", "input_ids", "labels"]).take(places).to_pylist()
            begin = end
