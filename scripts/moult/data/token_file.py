"""The file of sequences that encode writes and the trainer reads: Parquet, a sequence per row, written as they come."""

from collections.abc import Iterator
from pathlib import Path

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
