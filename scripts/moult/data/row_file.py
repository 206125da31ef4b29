"""Rows in a Parquet file that gives them again as they were: null is not a missing field there, 1 not 1.0, "5" not 5.

Arrow has one type for all values of a column, and `datasets` guesses it. Here a column of text is text; any other is JSON.
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from moult.data.tables import QUOTED
from moult.errors import MoultError

BATCH = 1000  # rows


def columns_of(rows: Iterable[dict]) -> tuple[dict[str, bool], int]:
    """({column: whether it holds nothing but text}, how many rows). Raises MoultError for a column that Arrow cannot name."""
    columns: dict[str, bool] = {}
    count = 0
    for row in rows:
        count += 1
        for column, value in row.items():
            columns[column] = columns.get(column, True) and isinstance(value, str) and _is_unicode(value)
    bad = [column for column in columns if not _is_unicode(column)]
    if bad:
        raise MoultError(f"{bad[0]!r} cannot be the name of a column", "rename it")
    return columns, count


def write_rows(path: Path, rows: Iterator[dict], columns: dict[str, bool]) -> int:
    """Write rows of these columns, and return how many they were."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {column: pa.string() if is_text else pa.json_() for column, is_text in columns.items()}
    schema = pa.schema(list(kinds.items()), metadata=QUOTED)
    count = 0
    with pq.ParquetWriter(path, schema) as writer:
        while batch := list(itertools.islice(rows, BATCH)):
            count += len(batch)
            cells = [
                pa.array([_cell(row, column, is_text) for row in batch], kinds[column])
                for column, is_text in columns.items()
            ]
            writer.write_batch(pa.record_batch(cells, schema=schema))
    return count


def _cell(row: dict, column: str, is_text: bool) -> str | None:
    if column not in row:
        return None
    return row[column] if is_text else json.dumps(row[column])


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)
