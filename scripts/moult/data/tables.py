"""Rows out of Parquet and Arrow: batches that are small enough for a process each, and the Python values in them."""

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moult.errors import MoultError

# Metadata of the schema of a Parquet file that moult/data/row_file.py has written: JSON of every value, texts in quotes.
QUOTED = {b"moult": b"json of every value"}


class JsonText(str):
    """JSON of a value in a column that `datasets` calls Json: columns of mixed types, such as content that is text or blocks.

    A text that was JSON already is held without quotes there: 42 and "42" look the same. Which of the two it is, tells
    only what is asked for: where text is, this is the text; elsewhere it stands for a number, a list or an object.
    """


@dataclass
class Table:
    """Some rows of a table.

    batch: an Arrow stream, which unlike a slice of a batch holds nothing but these rows.
    before: how many rows of the file come before them. end: how far into the file, in bytes.
    kind: Parquet or Arrow, for messages.
    """

    batch: bytes
    before: int
    count: int
    kind: str
    end: int

    def rows(self, name: str) -> Iterator[tuple[int, dict]]:
        import pyarrow

        with _damage(name, self.kind):
            [batch] = pyarrow.ipc.open_stream(self.batch)
            is_quoted = QUOTED.items() <= (batch.schema.metadata or {}).items()
            decoders = {field.name: _json_decoder(field.type, is_quoted) for field in batch.schema}
            for number, row in enumerate(_python_rows(batch, name, self.before), self.before + 1):
                row = {
                    column: _without_nulls(value) for column, value in row.items() if not (is_quoted and value is None)
                }
                yield number, {column: _decoded(row[column], decoders[column]) for column in row}


def tables_in(file: Path, data: bytes | None, kind: str, name: str, size: int) -> Iterator[Table]:
    """The rows of a file in pieces of about `size` bytes. `data`: the file's contents where it is compressed."""
    import pyarrow
    import pyarrow.parquet

    with _damage(name, kind):
        source = pyarrow.memory_map(str(file)) if data is None else pyarrow.BufferReader(data)
        on_disk = file.stat().st_size
        before = 0
        for batch, share in _parquet_batches(source, size) if kind == "Parquet" else _arrow_batches(source):
            step = max(1, batch.num_rows * size // max(batch.get_total_buffer_size(), 1))
            for start in range(0, batch.num_rows, step):
                part = batch.slice(start, step)
                sink = pyarrow.BufferOutputStream()
                with pyarrow.ipc.new_stream(sink, part.schema) as writer:
                    writer.write_batch(part)
                yield Table(sink.getvalue().to_pybytes(), before, part.num_rows, kind, int(share * on_disk))
                before += part.num_rows


@contextlib.contextmanager
def _damage(name: str, kind: str) -> Iterator[None]:
    """Raises MoultError for what pyarrow says of a damaged file."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # the latter in the name of a column
        raise MoultError(
            f"{name}: not a whole {kind} file ({str(error).splitlines()[0]})", "write or download it again"
        ) from None


def _parquet_batches(source, size: int) -> Iterator[tuple]:
    """(batch of about `size` bytes, how much of the file has been read behind it)."""
    import pyarrow.parquet

    reader = pyarrow.parquet.ParquetFile(source)
    groups = [reader.metadata.row_group(index) for index in range(reader.num_row_groups)]
    rows, stored = reader.metadata.num_rows, sum(group.total_byte_size for group in groups)
    done = 0
    for batch in reader.iter_batches(batch_size=min(max(1, rows * size // max(stored, 1)), 65_536)):
        done += batch.num_rows
        yield batch, done / max(rows, 1)


def _arrow_batches(source) -> Iterator[tuple]:
    """(batch, how much of the file has been read behind it)."""
    import pyarrow

    # datasets writes the stream format; other tools write the file format.
    try:
        reader = pyarrow.ipc.open_stream(source)
        batches = ((batch, source.tell() / source.size()) for batch in reader)
    except pyarrow.ArrowInvalid:
        source.seek(0)
        reader = pyarrow.ipc.open_file(source)
        count = reader.num_record_batches
        batches = ((reader.get_batch(index), (index + 1) / count) for index in range(count))
    for batch, share in batches:
        # pyarrow believes the offsets of a damaged file, and ends the process where they lead.
        batch.validate(full=True)
        yield batch, share


def _python_rows(batch, name: str, before: int) -> list[dict]:
    """The rows of a batch, `before` of which there were others. Raises MoultError for a value that Python cannot hold."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):  # text that is not UTF-8, a date in the year 5,881,580
        for index, column in itertools.product(range(batch.num_rows), batch.column_names):
            try:
                batch.column(column)[index].as_py()
            except (ValueError, OverflowError) as error:
                raise MoultError(
                    f"{name}:{before + index + 1}: column {column}: {error}", "fix that value, or take the column out"
                ) from None
        raise


def _without_nulls(value):
    """The value without fields that are null: Arrow gives each object in a column the fields of all the others.

    A tool's parameters would otherwise list those of every other tool.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _json_decoder(kind, is_quoted: bool) -> Callable | None:
    """What turns the Python values of the Arrow type `kind` into those that it holds as JSON; None where it holds none.

    The type says it, not the metadata that `datasets` leaves in its files: others write JSON columns too (DuckDB).
    """
    import pyarrow as pa

    if isinstance(kind, pa.JsonType):
        return json.loads if is_quoted else _of_json
    if isinstance(kind, pa.BaseExtensionType):
        return _json_decoder(kind.storage_type, is_quoted)
    if pa.types.is_dictionary(kind):
        return _json_decoder(kind.value_type, is_quoted)
    if pa.types.is_struct(kind):
        decoders = {field.name: _json_decoder(field.type, is_quoted) for field in kind}
        if any(decoders.values()):
            return lambda value: {key: _decoded(item, decoders[key]) for key, item in value.items()}
    elif pa.types.is_map(kind):
        if decode := _json_decoder(kind.item_type, is_quoted):
            return lambda value: [(key, _decoded(item, decode)) for key, item in value]
    elif hasattr(kind, "value_type") and (decode := _json_decoder(kind.value_type, is_quoted)):
        return lambda value: [_decoded(item, decode) for item in value]
    return None


def _decoded(value, decode: Callable | None):
    return value if value is None or decode is None else decode(value)


def _of_json(text: str):
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if value is None or isinstance(value, str) else JsonText(text)
