"""Rows out of files: JSON, JSON Lines, CSV, TSV, Parquet, Arrow, each also gzipped; folders and globs of them.

Our own readers, because those of `datasets` name neither file nor line when a row is bad, and guess a structure where
they cannot read one. Every row comes with the place that it was read from, `name.jsonl:17`; the number is a line for
JSON Lines, CSV and TSV, and the position of the row, from 1, elsewhere.
"""

import csv
import glob
import gzip
import io
import itertools
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from moult.errors import MoultError, some

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")

# Metadata of the schema of a Parquet file that moult/data/row_file.py has written: JSON of every value, texts in quotes.
QUOTED = {b"moult": b"json of every value"}


class JsonText(str):
    """JSON of a value in a column that `datasets` calls Json: columns of mixed types, such as content that is text or blocks.

    A text that was JSON already is held without quotes there: 42 and "42" look the same. Which of the two it is, tells
    only what is asked for: where text is, this is the text; elsewhere it stands for a number, a list or an object.
    """


def expand(path: str, split: str = "train") -> list[Path]:
    """The data files that a path, a folder or a glob stands for, sorted. An Arrow folder stands for its `split`."""
    files = _expand(path, split)
    for file in files:
        if "{" in str(file) or "}" in str(file):
            raise MoultError(f"{file}: Snakemake takes {{ and }} in a name for a wildcard", "rename the file or folder")
    return files


def _expand(path: str, split: str) -> list[Path]:
    plain = Path(path).expanduser()
    if plain.is_file():
        return [plain]
    if plain.is_dir():
        return _expand_folder(plain, split)
    if any(char in path for char in "*?["):
        files = sorted(Path(hit) for hit in glob.glob(str(plain), recursive=True))  # noqa: PTH207 (Path.glob takes no absolute pattern)
        files = [file for file in files if file.is_file()]
        if files:
            return files
        raise MoultError(f"{path}: no file matches", "check the pattern; it is relative to the working directory")
    raise MoultError(
        f"{path}: no such file or folder",
        "check datasets.<name>.source; it is relative to the working directory",
    )


def _expand_folder(folder: Path, split: str) -> list[Path]:
    if (folder / "dataset_dict.json").exists():
        splits = _saved(folder / "dataset_dict.json", lambda content: content["splits"])
        if split not in splits:
            raise MoultError(f"{folder}: has no split {split}", f"set datasets.<name>.split to one of {some(splits)}")
        folder = folder / split
    if (folder / "state.json").exists():
        parts = _saved(folder / "state.json", lambda content: [part["filename"] for part in content["_data_files"]])
        return [folder / part for part in parts]
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file()
        and _suffix(file) in SUFFIXES
        # Editors and download tools keep copies in hidden folders.
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if not files:
        raise MoultError(f"{folder}: holds no data files", f"supported: {', '.join(SUFFIXES)}, each also with .gz")
    return files


def _saved(file: Path, names: Callable) -> list[str]:
    """The `names` of files or folders beside it that a file of datasets.save_to_disk holds."""
    try:
        found = names(json.loads(file.read_text(encoding="utf-8")))
        if all(Path(name).name == name for name in found):
            return found
        raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise MoultError(
            f"{file}: not what datasets.save_to_disk writes",
            "save the dataset again; if it is another file, name the data files instead of the folder",
        ) from None


def _suffix(file: Path) -> str:
    return Path(file.name.lower().removesuffix(".gz")).suffix


def read_rows(file: Path, name: str) -> Iterator[tuple[str, dict]]:
    """(place, row) for each row of a file. `name` is what places begin with.

    Raises MoultError with the place for what cannot be read; a row that is read is a dict, its contents unchecked.
    """
    suffix = _suffix(file)
    try:
        if suffix in (".parquet", ".arrow"):
            yield from _read_table(file, name, suffix)
        elif suffix in (".jsonl", ".ndjson"):
            yield from _read_json_lines(file, name)
        elif suffix == ".json":
            yield from _read_json(file, name)
        elif suffix in (".csv", ".tsv"):
            yield from _read_csv(file, name, "\t" if suffix == ".tsv" else ",")
        else:
            raise MoultError(f"{name}: unknown kind of file", f"supported: {', '.join(SUFFIXES)}, each also with .gz")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise MoultError(f"{name}: not a whole gzip file ({error})", "download or compress it again") from None
    except OSError as error:
        raise MoultError(
            f"{name}: cannot be read ({error.strerror or str(error).splitlines()[0]})",
            "check the file and its permissions",
        ) from None


def _read_bytes(file: Path) -> bytes:
    data = file.read_bytes()
    return gzip.decompress(data) if file.name.lower().endswith(".gz") else data


def _read_text(file: Path, name: str) -> str:
    data = _read_bytes(file)
    # By the byte order mark, or by where the zeros are: PowerShell's `>` writes UTF-16.
    encoding = json.detect_encoding(data)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        data = error.object  # without the byte order mark
        line = data[: error.start].decode(encoding, "replace").count("\n") + 1
        found = f"{name}:{line}: not {encoding.removesuffix('-sig').upper()} (byte 0x{data[error.start]:02x})"
    if encoding.startswith("utf-8"):
        raise MoultError(found, f"convert it, for example: iconv -f latin1 -t utf-8 {file.name} > fixed{file.suffix}")
    raise MoultError(found, "save it again, as UTF-8")


def _lines(file: Path, name: str) -> Iterator[str]:
    """The lines of a text file, which is not held in memory."""
    try:
        with gzip.open(file) if file.name.lower().endswith(".gz") else file.open("rb") as data:
            encoding = json.detect_encoding(data.read(4))
            data.seek(0)
            # Only \n ends a line: U+2028 and the like may stand unescaped in a JSON string.
            for line in io.TextIOWrapper(data, encoding, newline="\n"):
                yield line.removesuffix("\n")
    except UnicodeDecodeError:
        _read_text(file, name)  # which says where
        raise


def _parse_json(text: str, name: str, first_line: int = 1):
    def refuse(constant: str):
        raise MoultError(f"{name}:{first_line}: {constant} is not JSON", "write null instead")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise MoultError(f"{name}:{line}: not JSON: {error.msg} (column {error.colno})", "fix that line") from None
    except RecursionError:
        raise MoultError(f"{name}:{first_line}: nested too deeply to read", "remove or flatten that row") from None
    except ValueError as error:  # a number of thousands of digits
        raise MoultError(f"{name}:{first_line}: {error}", "write it as text") from None


def _read_json_lines(file: Path, name: str) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(_lines(file, name), start=1):
        if line.strip():
            yield _checked(_parse_json(line, name, number), f"{name}:{number}")


def _read_json(file: Path, name: str) -> Iterator[tuple[str, dict]]:
    text = _read_text(file, name)
    if not text.strip():
        return
    if text.lstrip().startswith("{") and _holds_lines(text):
        yield from _read_json_lines(file, name)
        return
    value = _parse_json(text, name)
    if isinstance(value, dict):
        lists = [key for key, item in value.items() if isinstance(item, list)]
        if len(lists) != 1:
            raise MoultError(
                f"{name}: an object, where a list of rows belongs",
                "make it a list, or JSON Lines with the suffix .jsonl",
            )
        value = value[lists[0]]
    if not isinstance(value, list):
        raise MoultError(f"{name}: {type(value).__name__}, where a list of rows belongs", "make it a list of objects")
    for number, row in enumerate(value, start=1):
        yield _checked(row, f"{name}:{number}")


def _holds_lines(text: str) -> bool:
    """Whether a .json file is JSON Lines, as many are: its first line is an object, and more follows."""
    first, _, rest = text.lstrip().partition("\n")
    try:
        return isinstance(json.loads(first), dict) and bool(rest.strip())
    except (ValueError, RecursionError):
        return False


def _checked(row, place: str) -> tuple[str, dict]:
    if not isinstance(row, dict):
        raise MoultError(f"{place}: {type(row).__name__}, where an object with columns belongs", "fix that row")
    return place, row


def _read_csv(file: Path, name: str, delimiter: str) -> Iterator[tuple[str, dict]]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(_read_text(file, name), newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        if len(header) == 1 and any(other in header[0] for other in ",;\t|"):
            raise MoultError(
                f"{name}:1: the header is one column, {header[0][:60]!r}: the delimiter is not {delimiter!r}",
                "save it with commas as .csv, or with tabs as .tsv",
            )
        twice = sorted({column for column in header if header.count(column) > 1})
        if twice:
            raise MoultError(f"{name}:1: the header has {some(twice)} twice", "give each column a name of its own")
        line = reader.line_num + 1
        for cells in reader:
            if cells:
                if len(cells) != len(header):
                    raise MoultError(
                        f"{name}:{line}: {len(cells)} cells, the header has {len(header)}",
                        "quote cells that hold the delimiter; use .tsv for tabs",
                    )
                yield f"{name}:{line}", dict(zip(header, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise MoultError(f"{name}:{reader.line_num}: not CSV: {error}", "fix that line's quotes") from None


def _read_table(file: Path, name: str, suffix: str) -> Iterator[tuple[str, dict]]:
    import pyarrow
    import pyarrow.parquet

    try:
        if file.name.lower().endswith(".gz"):
            source = pyarrow.BufferReader(_read_bytes(file))
        else:
            source = pyarrow.memory_map(str(file))
        if suffix == ".parquet":
            batches = pyarrow.parquet.ParquetFile(source).iter_batches()
        else:
            batches = _arrow_batches(source)
        number = 0
        for batch in batches:
            is_quoted = QUOTED.items() <= (batch.schema.metadata or {}).items()
            decoders = {field.name: _json_decoder(field.type, is_quoted) for field in batch.schema}
            for row in _python_rows(batch, name, number):
                number += 1
                row = {
                    column: _without_nulls(value) for column, value in row.items() if not (is_quoted and value is None)
                }
                yield f"{name}:{number}", {column: _decoded(row[column], decoders[column]) for column in row}
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # the latter in the name of a column
        kind = suffix.removeprefix(".").capitalize()
        raise MoultError(
            f"{name}: not a whole {kind} file ({str(error).splitlines()[0]})", "write or download it again"
        ) from None


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


def _arrow_batches(source):
    import pyarrow

    # datasets writes the stream format; other tools write the file format.
    try:
        reader = pyarrow.ipc.open_stream(source)
        batches = iter(reader)
    except pyarrow.ArrowInvalid:
        source.seek(0)
        reader = pyarrow.ipc.open_file(source)
        batches = map(reader.get_batch, range(reader.num_record_batches))
    for batch in batches:
        # pyarrow believes the offsets of a damaged file, and ends the process where they lead.
        batch.validate(full=True)
        yield batch
