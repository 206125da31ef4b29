"""Rows out of files: JSON, JSON Lines, CSV, TSV, Parquet, Arrow, each also gzipped; folders and globs of them.

Our own readers, because those of `datasets` name neither file nor line when a row is bad, and guess a structure where
they cannot read one. Every row comes with the place that it was read from, `name.jsonl:17`; the number is a line for
JSON Lines, CSV and TSV, and the position of the row, from 1, elsewhere.
"""

import codecs
import contextlib
import csv
import glob
import gzip
import io
import itertools
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from moult.data.tables import Table, tables_in
from moult.errors import MoultError, some

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")

SIZE = 1 << 20  # characters, or bytes of a table, in a chunk of a file; a row is never cut


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
        "check datasets.<name>.source, val_source or test_source: a path is relative to the working directory",
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


# --- chunks -----------------------------------------------------------------------------------------------------------


@dataclass
class Json:
    """Rows as JSON, `separator` between them.

    text: bytes are UTF-8 that nobody has looked at. first: the number of the first one. end: how far into the file, in bytes.
    """

    file: Path
    text: str | bytes
    first: int
    end: int
    separator: str = "\n"

    @property
    def count(self) -> int:
        text = self.text.decode(errors="replace") if isinstance(self.text, bytes) else self.text
        return sum(bool(piece.strip()) for piece in text.split(self.separator))

    def rows(self, name: str) -> Iterator[tuple[int, dict]]:
        try:
            text = self.text.decode() if isinstance(self.text, bytes) else self.text
        except UnicodeDecodeError as error:
            raise _not_text(error, "utf-8", self.file, name, self.first) from None
        for number, piece in enumerate(text.split(self.separator), self.first):
            if piece.strip():
                yield number, _checked(_parse_json(piece, name, number), f"{name}:{number}")


@dataclass
class Cells:
    """Rows of a CSV or TSV: the line of each, and its cells."""

    header: list[str]
    lines: list[tuple[int, list[str]]]
    end: int

    @property
    def count(self) -> int:
        return len(self.lines)

    def rows(self, name: str) -> Iterator[tuple[int, dict]]:
        for number, cells in self.lines:
            yield number, dict(zip(self.header, cells, strict=True))


@dataclass
class Document:
    """What a JSON file holds that is more than a list, or not right: whoever reads it parses all of it at once.

    skip: how many of its rows have been in chunks already.
    """

    file: Path
    skip: int
    end: int
    count: int = 0  # known only when it is read; nothing comes after it

    def rows(self, name: str) -> Iterator[tuple[int, dict]]:
        with _damage(name):
            text = _read_text(self.file, name)
        if not text.strip():
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
            what = type(value).__name__
            raise MoultError(f"{name}: {what}, where a list of rows belongs", "make it a list of objects")
        for number, row in enumerate(value[self.skip :], self.skip + 1):
            yield number, _checked(row, f"{name}:{number}")


@dataclass
class Unreadable:
    """The place in a file from which on it cannot be read: whoever comes there raises the error, after all rows before it."""

    error: MoultError
    count: int = 0
    end: int = 0

    def rows(self, name: str) -> Iterator[tuple[int, dict]]:
        raise self.error


@dataclass
class Chunk:
    """Some rows of a file, to be parsed in any process. limit: no more than so many of them; None: all."""

    content: Json | Cells | Document | Table | Unreadable
    limit: int | None = None

    def rows(self, name: str) -> Iterator[tuple[int, dict]]:
        """(number, row) for each row. `name` is what the file is called in messages.

        The number is a line for JSON Lines, CSV and TSV, and the position of the row, from 1, elsewhere.
        Raises MoultError with the place for what cannot be read.
        """
        return itertools.islice(self.content.rows(name), self.limit)


def chunks_in(size: int) -> int:
    """About how many chunks there are in files of so many bytes: more processes than these have nothing to do."""
    return 1 + size // SIZE


def read_chunks(file: Path, name: str, limit: int | None = None) -> Iterator[Chunk]:
    """All of a file, or its first `limit` rows, in chunks of about SIZE. What is wrong with it comes out of their rows."""
    left = limit
    for content in _contents(file, name):
        yield Chunk(content, left)
        if left is not None:
            left -= content.count
            if left <= 0:
                return


def read_rows(file: Path, name: str) -> Iterator[tuple[str, dict]]:
    """(place, row) for each row of a file. `name` is what places begin with.

    Raises MoultError with the place for what cannot be read; a row that is read is a dict, its contents unchecked.
    """
    for chunk in read_chunks(file, name):
        for number, row in chunk.rows(name):
            yield f"{name}:{number}", row


def _contents(file: Path, name: str) -> Iterator[Json | Cells | Document | Table | Unreadable]:
    suffix = _suffix(file)
    try:
        with _damage(name):
            if suffix in (".parquet", ".arrow"):
                data = _read_bytes(file) if _is_gzip(file) else None
                yield from tables_in(file, data, suffix.removeprefix(".").capitalize(), name, SIZE)
            elif suffix in (".jsonl", ".ndjson"):
                yield from _json_lines(file, name)
            elif suffix == ".json":
                yield from _json(file, name)
            elif suffix in (".csv", ".tsv"):
                yield from _csv(file, name, "\t" if suffix == ".tsv" else ",")
            else:
                raise MoultError(
                    f"{name}: unknown kind of file", f"supported: {', '.join(SUFFIXES)}, each also with .gz"
                )
    except MoultError as error:
        yield Unreadable(error)


@contextlib.contextmanager
def _damage(name: str) -> Iterator[None]:
    """Raises MoultError for what gzip and the disk say of a file."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise MoultError(f"{name}: not a whole gzip file ({error})", "download or compress it again") from None
    except OSError as error:
        raise MoultError(
            f"{name}: cannot be read ({error.strerror or str(error).splitlines()[0]})",
            "check the file and its permissions",
        ) from None


# --- text -------------------------------------------------------------------------------------------------------------


def _is_gzip(file: Path) -> bool:
    return file.name.lower().endswith(".gz")


def _read_bytes(file: Path) -> bytes:
    data = file.read_bytes()
    return gzip.decompress(data) if _is_gzip(file) else data


def _read_text(file: Path, name: str) -> str:
    data = _read_bytes(file)
    # By the byte order mark, or by where the zeros are: PowerShell's `>` writes UTF-16.
    encoding = json.detect_encoding(data)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise _not_text(error, encoding, file, name) from None


def _not_text(error: UnicodeDecodeError, encoding: str, file: Path, name: str, first_line: int = 1) -> MoultError:
    data = error.object  # without the byte order mark
    line = first_line + data[: error.start].decode(encoding, "replace").count("\n")
    found = f"{name}:{line}: not {encoding.removesuffix('-sig').upper()} (byte 0x{data[error.start]:02x})"
    if encoding.startswith("utf-8"):
        return MoultError(found, f"convert it, for example: iconv -f latin1 -t utf-8 {file.name} > fixed{file.suffix}")
    return MoultError(found, "save it again, as UTF-8")


@contextlib.contextmanager
def _open_bytes(file: Path) -> Iterator[tuple[gzip.GzipFile | io.BufferedReader, io.BufferedReader, str]]:
    """(its contents, the file as it is on the disk, the encoding that it seems to have)."""
    with file.open("rb") as raw, gzip.open(raw) if _is_gzip(file) else raw as data:
        encoding = json.detect_encoding(data.read(4))
        data.seek(0)
        yield data, raw, encoding


@contextlib.contextmanager
def _open(file: Path, name: str, newline: str) -> Iterator[tuple[io.TextIOWrapper, io.BufferedReader]]:
    """(its text, the file as it is on the disk): neither is held in memory. Raises MoultError where it is not text."""
    try:
        with _open_bytes(file) as (data, raw, encoding):
            yield io.TextIOWrapper(data, encoding, newline=newline), raw
    except UnicodeDecodeError:
        _read_text(file, name)  # which says where
        raise


class _Constant(Exception):
    """NaN or Infinity, which Python takes for JSON."""


def _refuse(constant: str):
    raise _Constant(constant)


# json.loads would make one for each text. It also has a message of its own for a byte order mark.
_decode = json.JSONDecoder(parse_constant=_refuse).decode


def _parse_json(text: str, name: str, first_line: int = 1):
    try:
        return json.loads(text) if text.startswith("\ufeff") else _decode(text)
    except _Constant as constant:
        raise MoultError(f"{name}:{first_line}: {constant} is not JSON", "write null instead") from None
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise MoultError(f"{name}:{line}: not JSON: {error.msg} (column {error.colno})", "fix that line") from None
    except RecursionError:
        raise MoultError(f"{name}:{first_line}: nested too deeply to read", "remove or flatten that row") from None
    except ValueError as error:  # a number of thousands of digits
        raise MoultError(f"{name}:{first_line}: {error}", "write it as text") from None


def _checked(row, place: str) -> dict:
    if not isinstance(row, dict):
        raise MoultError(f"{place}: {type(row).__name__}, where an object with columns belongs", "fix that row")
    return row


def _json_lines(file: Path, name: str) -> Iterator[Json]:
    # Only \n ends a line: U+2028 and the like may stand unescaped in a JSON string.
    line = 1
    with _open_bytes(file) as (data, raw, encoding):
        if encoding.startswith("utf-8"):
            data.seek(len(codecs.BOM_UTF8) if encoding == "utf-8-sig" else 0)
            while lines := data.read(SIZE) + data.readline():
                yield Json(file, lines, line, raw.tell())
                line += lines.count(b"\n")
            return
    with _open(file, name, "\n") as (stream, raw):
        while text := stream.read(SIZE) + stream.readline():
            yield Json(file, text, line, raw.tell())
            line += text.count("\n")


# Between rows of a JSON list. No JSON holds it unescaped: RFC 7464 takes it to separate JSON texts.
_SEPARATOR = "\x1e"


def _json(file: Path, name: str) -> Iterator[Json | Document]:
    """A list of rows, in pieces; or JSON Lines, as many a .json is; or anything else, at once."""
    if _holds_lines(file, name):
        yield from _json_lines(file, name)
        return
    done, waiting, size = 0, [], 0
    with _open(file, name, "\n") as (stream, raw):
        try:
            for row in _elements(stream):
                waiting.append(row)
                size += len(row)
                if size > SIZE:
                    yield Json(file, _SEPARATOR.join(waiting), done + 1, raw.tell(), _SEPARATOR)
                    done, waiting, size = done + len(waiting), [], 0
            yield Json(file, _SEPARATOR.join(waiting), done + 1, raw.tell(), _SEPARATOR)
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError):
            yield Document(file, done, file.stat().st_size)


def _holds_lines(file: Path, name: str) -> bool:
    """Whether a .json file is JSON Lines: its first line is an object, and more follows."""
    with _open(file, name, "\n") as (stream, _):
        lines = (line.lstrip() for line in stream if line.strip())
        first = next(lines, "")
        try:
            return first.startswith("{") and isinstance(json.loads(first), dict) and next(lines, None) is not None
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError):
            return False


def _elements(stream: TextIO) -> Iterator[str]:
    """The JSON of each element of a list. Raises ValueError or RecursionError for anything but a whole list of JSON."""
    decode = json.JSONDecoder().raw_decode
    window, separator = stream.read(SIZE), "["
    at = _after_space(window, 0)
    if not window.startswith("[", at):
        raise ValueError
    while True:
        start, end = _after_space(window, at + 1), 0
        if window.startswith(separator, at):
            with contextlib.suppress(ValueError, RecursionError):  # not JSON, or cut off
                _, end = decode(window, start)
        behind = _after_space(window, end)
        if end and behind < len(window):  # more follows, so it is not a number that goes on
            yield window[start:end]
            at, separator = behind, ","
        elif separator == "," and window.startswith("]", at):
            rest = window[at + 1 :] + stream.read()
            if _after_space(rest, 0) < len(rest):
                raise ValueError
            return
        elif more := stream.read(max(SIZE, len(window))):
            window, at = window[at:] + more, 0
        else:
            raise ValueError


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


_SPACE = re.compile(r"[ \t\n\r]*")  # what JSON calls space


def _csv(file: Path, name: str, delimiter: str) -> Iterator[Cells]:
    csv.field_size_limit(sys.maxsize)
    with _open(file, name, "") as (stream, raw):
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
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
            lines: list[tuple[int, list[str]]] = []
            size, line = 0, reader.line_num + 1
            for cells in reader:
                if cells:
                    if len(cells) != len(header):
                        raise MoultError(
                            f"{name}:{line}: {len(cells)} cells, the header has {len(header)}",
                            "quote cells that hold the delimiter; use .tsv for tabs",
                        )
                    lines.append((line, cells))
                    size += sum(map(len, cells))
                if size > SIZE:
                    yield Cells(header, lines, raw.tell())
                    lines, size = [], 0
                line = reader.line_num + 1
            yield Cells(header, lines, raw.tell())
        except csv.Error as error:
            raise MoultError(f"{name}:{reader.line_num}: not CSV: {error}", "fix that line's quotes") from None
