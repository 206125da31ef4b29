"""Reading rows: each kind of file, gzipped or not, folders and globs; and what is said of a file that is not right."""

import gzip
import io
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from preparing import write_as
from workflow import ROOT

from moult.data import readers
from moult.data.readers import expand, read_rows
from moult.errors import MoultError

ROWS = [{"prompt": "Grüße, 世界", "completion": 'two\nlines, "quoted"'}, {"prompt": "q", "completion": "\ttab"}]


SIZES = (readers.SIZE, 1, 40)  # of chunks


def read(file: Path) -> list[tuple[str, dict]]:
    """The rows, which are the same in chunks of any size."""
    found = []
    for size in SIZES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(readers, "SIZE", size)
            found.append(list(read_rows(file, file.name)))
    assert found[0] == found[1] == found[2]
    return found[0]


def refused(file: Path, data: bytes | str) -> str:
    """What is said of a file with these contents, which does not depend on the size of chunks either."""
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    said = set()
    for size in SIZES:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(MoultError) as error:
            patch.setattr(readers, "SIZE", size)
            list(read_rows(file, file.name))
        assert error.value.fix
        said.add(error.value.what)
    [what] = said
    return what


# --- kinds of files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "csv", "tsv", "parquet", "arrow", "JSONL"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind, gz):
    file = tmp_path / f"rows.{kind}{gz}"
    write_as(file, ROWS)
    assert [row for _, row in read(file)] == ROWS


@pytest.mark.parametrize(
    ("name", "text", "places"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": 2}', [1, 3]),
        ("a.json", '[{"a": 1},\n\n{"a": 2}]', [1, 2]),
        ("a.json", '{"a": 1}\n{"a": 2}\n', [1, 2]),  # many a .json holds JSON Lines
        ("a.json", '{"version": 3, "data": [{"a": 1}]}', [1]),
        ("a.json", ' [\n{"a": "]"} , {"a": [1, 23]}\t] \n', [1, 2]),
        ("a.json", "[ ]", []),
        ("a.csv", 'a,b\n"x\ny",1\n\nz,2\n', [2, 5]),
        ("a.tsv", 'a\tb\nhe said "x"\t1\n', [2]),
    ],
)
def test_a_row_is_placed_where_an_editor_finds_it(tmp_path, name, text, places):
    (tmp_path / name).write_text(text)
    assert [place for place, _ in read(tmp_path / name)] == [f"{name}:{place}" for place in places]


def test_rows_are_read_as_they_are(tmp_path):
    file = tmp_path / "a.jsonl"
    # A byte order mark, line ends of Windows, and a line separator inside a string, which is no line end in JSON Lines.
    file.write_bytes('\ufeff{"a": "x\u2028y\x85z"}\r\n{"a": "\\u2028"}\r\n'.encode())
    assert read(file) == [("a.jsonl:1", {"a": "x\u2028y\x85z"}), ("a.jsonl:2", {"a": "\u2028"})]
    (tmp_path / "a.csv").write_bytes("\ufeffa,b\r\n1,\r\n".encode())
    assert read(tmp_path / "a.csv") == [("a.csv:2", {"a": "1", "b": ""})]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.jsonl.gz", "b.csv"])
def test_an_empty_file_has_no_rows(tmp_path, name):
    (tmp_path / name).write_text("a,b\n" if name == "b.csv" else "")
    assert read(tmp_path / name) == []


def test_arrow_does_not_give_a_row_the_fields_of_the_others(tmp_path):
    rows = [
        {"tools": [{"name": "f", "parameters": {"x": {"type": "number"}}}], "system": None},
        {"tools": [{"name": "g", "parameters": {"y": {"type": "string"}}}], "system": "be brief"},
    ]
    write_as(tmp_path / "a.parquet", rows)
    assert [row for _, row in read(tmp_path / "a.parquet")] == rows


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([0, 2**62], pa.timestamp("us")), "date value out of range"),
        (pa.array([b"ok", b"\xff"]).view(pa.string()), "'utf-8' codec can't decode byte 0xff"),
    ],
    ids=["a date in the year 148,000", "text that is not UTF-8"],
)
def test_a_value_that_python_cannot_hold(tmp_path, column, message):
    file = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table({"when": column}), file)
    with pytest.raises(MoultError) as error:
        list(read(file))
    assert message in error.value.what and error.value.what.startswith("a.parquet:2: column when: ")


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_damage_to_an_arrow_file_ends_no_process(tmp_path, kind):
    """Offsets that lead out of the file: pyarrow 26 reads there, and dies of it, unless it is told to look first."""
    table = pa.table({"text": ["abc" * index for index in range(1, 30)]})
    sink = io.BytesIO()
    with (pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table)
    whole = sink.getvalue()
    offset = whole.index((9).to_bytes(4, "little") + (18).to_bytes(4, "little"))
    (tmp_path / "a.arrow").write_bytes(whole[:offset] + (2**30).to_bytes(4, "little") + whole[offset + 4 :])
    code = "import sys; from pathlib import Path; from moult.data.readers import read_rows\n"
    code += "list(read_rows(Path(sys.argv[1]), 'a'))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    command = [sys.executable, "-c", code, str(tmp_path / "a.arrow")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "MoultError: a: not a whole Arrow file" in done.stderr


# --- bad files --------------------------------------------------------------------------------------------------------

GZIPPED = gzip.compress(b'{"a": "x"}\n' * 1000, mtime=0)
BAD = [
    ("a.jsonl", '{"a": 1}\n{"a": \n', "a.jsonl:2: not JSON: Expecting value (column 7)"),
    ("a.jsonl", '{"a": 1} {"a": 2}\n', "a.jsonl:1: not JSON: Extra data (column 10)"),
    ("a.jsonl", '{"a": 1}\n[1]\n', "a.jsonl:2: list, where an object with columns belongs"),
    ("a.jsonl", '\n{"a": NaN}\n', "a.jsonl:2: NaN is not JSON"),
    ("a.jsonl", '{"a": -Infinity}\n', "a.jsonl:1: -Infinity is not JSON"),
    ("a.jsonl", '{"a": ' + "[" * 100_000, "a.jsonl:1: nested too deeply to read"),
    ("a.jsonl", '{"a": 1}\n{"a": ' + "9" * 5000 + "}", "a.jsonl:2: Exceeds the limit (4300 digits) for integer …"),
    ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', "a.jsonl:2: not UTF-8 (byte 0xe9)"),
    ("a.jsonl", b'\xef\xbb\xbf{"a": "\xe9"}\n', "a.jsonl:1: not UTF-8 (byte 0xe9)"),
    ("a.jsonl", '{"a": 1}'.encode("utf-16")[:-1], "a.jsonl:1: not UTF-16 (byte 0x7d)"),
    ("a.csv", b"a,b\n1,\xe9\n", "a.csv:2: not UTF-8 (byte 0xe9)"),
    ("a.json", '[{"a": 1},\n{"a": }]', "a.json:2: not JSON: Expecting value (column 7)"),
    ("a.json", '[{"a": 1},\n{"a": NaN}]', "a.json:2: NaN is not JSON"),
    ("a.json", '[{"a": 1}, {"a": 2} {"a": 3}]', "a.json:1: not JSON: Expecting ',' delimiter (column 21)"),
    ("a.json", '[{"a": 1}] [{"a": 2}]', "a.json:1: not JSON: Extra data (column 12)"),
    ("a.json", '[{"a": 1}, ', "a.json:1: not JSON: Expecting value (column 12)"),
    ("a.json", '{"a": 1}', "a.json: an object, where a list of rows belongs"),
    ("a.json", '{"a": [], "b": []}', "a.json: an object, where a list of rows belongs"),
    ("a.json", '"text"', "a.json: str, where a list of rows belongs"),
    ("a.json", '[{"a": 1}, 2]', "a.json:2: int, where an object with columns belongs"),
    ("a.csv", "a,b\n1,2\n3\n", "a.csv:3: 1 cells, the header has 2"),
    ("a.csv", 'a,b\n"x\ny",2\n3,4,5\n', "a.csv:4: 3 cells, the header has 2"),
    ("a.csv", 'a,b\n"x,2\n', "a.csv:2: not CSV: unexpected end of data"),
    ("a.csv", "a,b,a\n1,2,3\n", "a.csv:1: the header has a twice"),
    ("a.tsv", 'a\tb\n"x" he said\ty\n', "a.tsv:2: not CSV: '\t' expected after '\"'"),
    ("a.jsonl.gz", GZIPPED[:-20], "a.jsonl.gz: not a whole gzip file (Compressed file ended before …"),
    ("a.jsonl.gz", GZIPPED[:-8] + bytes(8), "a.jsonl.gz: not a whole gzip file (CRC check failed…"),
    ("a.jsonl.gz", GZIPPED[:10] + b"\xff" * 99, "a.jsonl.gz: not a whole gzip file (Error -3 while …"),
    ("a.jsonl.gz", '{"a": 1}', "a.jsonl.gz: not a whole gzip file (Not a gzipped file …"),
    ("a.parquet", "", "a.parquet: not a whole Parquet file (Parquet file size is 0 bytes)"),
    ("a.parquet", b"PAR1" + bytes(100), "a.parquet: not a whole Parquet file (Parquet magic bytes not found …"),
    ("a.arrow", b"ARROW1" + bytes(100), "a.arrow: not a whole Arrow file (…"),
    ("a.txt", "x", "a.txt: unknown kind of file"),
    ("a.jsonl.zst", "x", "a.jsonl.zst: unknown kind of file"),
]


@pytest.mark.parametrize(("name", "data", "message"), BAD, ids=[message for *_, message in BAD])
def test_a_bad_file_is_said_to_be_bad_where_it_is(tmp_path, name, data, message):
    start, more, _ = message.partition("…")
    said = refused(tmp_path / name, data)
    assert said.startswith(start) if more else said == start


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_cut_table_is_no_table(tmp_path, kind):
    write_as(tmp_path / f"whole.{kind}", ROWS * 100)
    data = (tmp_path / f"whole.{kind}").read_bytes()
    assert f"a.{kind}: not a whole {kind.capitalize()} file" in refused(tmp_path / f"a.{kind}", data[:-10])


def test_rows_before_a_bad_line_are_not_all_there_is(tmp_path):
    # The error comes while reading, not after it: nobody can take the first rows for the file.
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a":\n')
    rows = read_rows(tmp_path / "a.jsonl", "a.jsonl")
    assert next(rows) == ("a.jsonl:1", {"a": 1})
    with pytest.raises(MoultError, match=r"a\.jsonl:2: not JSON"):
        next(rows)


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(MoultError, match=r"^a\.jsonl: cannot be read \(Is a directory\)"):
        read(tmp_path / "a.jsonl")


# --- folders and globs ------------------------------------------------------------------------------------------------


def test_paths_folders_and_globs_stand_for_sorted_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("d/b.jsonl", "d/a.csv", "d/deep/c.parquet.gz", "d/README.md", "d/.hidden.jsonl", "d/.old/a.jsonl"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("")
    assert list(map(str, expand("d/b.jsonl"))) == ["d/b.jsonl"]
    assert list(map(str, expand("d"))) == ["d/a.csv", "d/b.jsonl", "d/deep/c.parquet.gz"]
    assert list(map(str, expand("d/*.*"))) == ["d/README.md", "d/a.csv", "d/b.jsonl"]
    assert list(map(str, expand("d/**/c*"))) == ["d/deep/c.parquet.gz"]
    assert expand(f"{tmp_path}/d/[ab].*") == [tmp_path / "d/a.csv", tmp_path / "d/b.jsonl"]
    Path("x[1].jsonl").write_text("")
    assert list(map(str, expand("x[1].jsonl"))) == ["x[1].jsonl"]  # a file of that very name, not a pattern
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand("~/d/b.jsonl") == [tmp_path / "d/b.jsonl"]


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        ({}, "no/such.jsonl", "no/such.jsonl: no such file or folder"),
        ({}, "no/*.jsonl", "no/*.jsonl: no file matches"),
        ({"d/x/y.jsonl": ""}, "d/*", "d/*: no file matches"),
        ({"d/README.md": ""}, "d", "d: holds no data files"),
        ({"d/{a}.jsonl": ""}, "d", "d/{a}.jsonl: Snakemake takes { and } in a name for a wildcard"),
        ({"d/state.json": "{}"}, "d", "d/state.json: not what datasets.save_to_disk writes"),
        (
            {"d/state.json": '{"_data_files": [{"filename": "../x.arrow"}]}'},
            "d",
            "d/state.json: not what datasets.save_to_disk writes",
        ),
        ({"d/state.json": '{"_data_files": [5]}'}, "d", "d/state.json: not what datasets.save_to_disk writes"),
        ({"d/state.json": '{"_data_files": 5}'}, "d", "d/state.json: not what datasets.save_to_disk writes"),
        (
            {"d/dataset_dict.json": '{"splits": [["train"]]}'},
            "d",
            "d/dataset_dict.json: not what datasets.save_to_disk writes",
        ),
        ({"d/dataset_dict.json": '{"spl'}, "d", "d/dataset_dict.json: not what datasets.save_to_disk writes"),
    ],
)
def test_what_stands_for_no_file(tmp_path, monkeypatch, files, path, message):
    monkeypatch.chdir(tmp_path)
    for name, text in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
    with pytest.raises(MoultError) as error:
        expand(path)
    assert error.value.what == message
    assert error.value.fix


@pytest.mark.slow
def test_folders_of_save_to_disk(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = [{"prompt": f"q{index}", "completion": "a"} for index in range(10)]
    Dataset.from_list(rows).select([3, 1]).save_to_disk(tmp_path / "single")
    parts = DatasetDict({"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:1])})
    parts.save_to_disk(tmp_path / "dict", num_shards={"train": 2, "test": 1})

    def rows_of(path: str, split: str = "train") -> list[dict]:
        return [row for file in expand(str(tmp_path / path), split) for _, row in read(file)]

    assert rows_of("single") == [rows[3], rows[1]]
    assert len(expand(str(tmp_path / "dict"))) == 2
    assert rows_of("dict") == rows
    assert rows_of("dict", "test") == rows[:1]
    with pytest.raises(MoultError) as error:
        expand(str(tmp_path / "dict"), "validation")
    assert error.value.what == f"{tmp_path}/dict: has no split validation"
    assert error.value.fix == "set datasets.<name>.split to one of train, test"
