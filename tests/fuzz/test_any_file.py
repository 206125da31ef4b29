"""Any file gives its rows, or one error that names it and, where there are lines, the line."""

import csv
import gzip
import io
import json
import logging
import re
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from examples import examples
from fuzz.anything import ANY_ROW, COLUMNS, TEXTS, dumped, nested, one_error
from hypothesis import given
from hypothesis import strategies as st

import prepare
from moult.data import readers
from moult.data.first_pass import to_row
from moult.data.ledger import Ledger
from moult.data.readers import read_rows
from moult.errors import MoultError
from moult.files import read_jsonl

ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "cp1252")
PLACE = re.compile(r"^odd\.\w+(\.gz)?(:\d+)?: ")


def rows_or_error(folder, name: str, data: bytes) -> list | str:
    """What the reader makes of a file; asserts that it is rows with places, or an error that begins with a place."""
    file = folder / name
    file.write_bytes(data)
    try:
        found = list(read_rows(file, name))
    except MoultError as error:
        assert PLACE.match(one_error(error)), error.what
        return error.what
    for place, row in found:
        assert re.fullmatch(rf"{re.escape(name)}:\d+", place)
        assert isinstance(row, dict) and all(isinstance(key, str) for key in row)
    assert len({place for place, _ in found}) == len(found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "SIZE", 7)
        assert repr(list(read_rows(file, name))) == repr(found)  # NaN is not itself
    return found


@examples(150)
@given(
    data=st.binary(max_size=200),
    kind=st.sampled_from(["jsonl", "ndjson", "json", "csv", "tsv", "zip"]),
    gz=st.booleans(),
)
def test_any_bytes(tmp_path, data, kind, gz):
    rows_or_error(tmp_path, f"odd.{kind}{'.gz' if gz else ''}", gzip.compress(data) if gz else data)


@examples(100)
@given(data=st.data())
def test_any_damage_to_gzip(tmp_path, data):
    whole = gzip.compress(b'{"prompt": "a", "completion": "b"}\n' * 20)
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = data.draw(st.sampled_from([whole[:at], whole[:at] + b"\xff" + whole[at + 1 :], whole + whole[:at]]))
    rows_or_error(tmp_path, "odd.jsonl.gz", damaged)


ODD_LINES = st.one_of(
    nested().map(dumped),
    st.dictionaries(TEXTS, nested(), max_size=4).map(dumped),
    st.sampled_from(
        [
            "NaN",
            "[Infinity]",
            '{"a": 1e999}',
            '{"a": ' + "9" * 5000 + "}",
            "[" * 3000,
            '{"a": "\\ud800"}',
            "{'a': 1}",
            "\0",
            "\x85",
            '{"a":1}{"b":2}',
        ]
    ),
)


@examples(250)
@given(
    lines=st.lists(ODD_LINES, max_size=6),
    ending=st.sampled_from(["\n", "\r\n", "\n\n", "\r"]),
    encoding=st.sampled_from(ENCODINGS),
    kind=st.sampled_from(["jsonl", "json"]),
)
def test_any_json(tmp_path, lines, ending, encoding, kind):
    text = ending.join(lines)
    found = rows_or_error(
        tmp_path, f"odd.{kind}", text.encode(encoding, "surrogatepass" if "utf" in encoding else "replace")
    )
    if kind == "jsonl" and encoding in ("utf-8", "utf-8-sig") and "\n" in ending and isinstance(found, list):
        assert len(found) == sum(bool(line.strip()) for line in text.split("\n"))


@examples(60)
@given(rows=st.lists(st.dictionaries(TEXTS, nested(), max_size=4), max_size=6), kind=st.sampled_from(["jsonl", "json"]))
def test_json_is_read_as_it_was_written(tmp_path, rows, kind):
    """What Python's own parser reads of each line, and no row more or fewer."""
    lines = [dumped(row) for row in rows]
    try:
        expected = [json.loads(line) for line in lines]
        assert all(isinstance(row, dict) for row in expected)
    except (RecursionError, ValueError, AssertionError):
        return
    text = "\n".join(lines) if kind == "jsonl" else f"[{', '.join(lines)}\n]"
    found = rows_or_error(tmp_path, f"odd.{kind}", text.encode())
    if isinstance(found, str):
        assert "nested too deeply" in found
    else:
        assert repr([row for _, row in found]) == repr(expected)


CELLS = st.one_of(
    TEXTS, st.sampled_from(['"', 'a"b', "a,b", "a\tb", "a\nb", "a\r\nb", "\r", "=1+1", "\ufeffx"])
).filter(lambda text: "\ud800" not in text)


@examples(150)
@given(
    table=st.integers(1, 3).flatmap(
        lambda width: st.lists(st.lists(CELLS, min_size=width, max_size=width), max_size=5)
    ),
    delimiter=st.sampled_from([",", "\t"]),
    ending=st.sampled_from(["\n", "\r\n"]),
    bom=st.booleans(),
)
def test_csv_is_read_as_it_was_written(tmp_path, table, delimiter, ending, bom):
    header = [f"c{index}" for index in range(len(table[0]) if table else 1)]
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, lineterminator=ending, quoting=csv.QUOTE_ALL).writerows([header, *table])
    name = "odd.tsv" if delimiter == "\t" else "odd.csv"
    found = rows_or_error(tmp_path, name, text.getvalue().encode("utf-8-sig" if bom else "utf-8"))
    assert [list(row.values()) for _, row in found] == table
    assert all(list(row) == header for _, row in found)


@examples(100)
@given(text=st.text(st.sampled_from("ab\",\t\r\n\0'\\é\ufeff "), max_size=40), kind=st.sampled_from(["csv", "tsv"]))
def test_any_csv(tmp_path, text, kind):
    rows_or_error(tmp_path, f"odd.{kind}", text.encode())


EXTREMES = [
    pa.array([2**62], pa.timestamp("s")),
    pa.array([-(2**62)], pa.timestamp("us")),
    pa.array([1], pa.timestamp("ns", tz="Nowhere/Atall")),
    pa.array([1], pa.timestamp("ns")),
    pa.array([2**31 - 1], pa.date32()),
    pa.array([2**62], pa.date64()),
    pa.array([2**62], pa.duration("s")),
    pa.array([1], pa.time64("ns")),
    pa.array([b"\xff\xfe"], pa.binary()),
    pa.array([b"\xff\xfe"], pa.binary()).view(pa.string()),
    pa.array([b"\xff\xfe"], pa.large_binary()).view(pa.large_string()),
    pa.array([float("nan")], pa.float32()),
    pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int8())),
    pa.array([{"a": {"b": None}}]),
    pa.array(["a"]).dictionary_encode(),
    pa.nulls(1),
    pa.array([None], pa.decimal128(38, 0)),
]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("column", EXTREMES, ids=lambda column: str(column.type))
def test_any_type_of_column(tmp_path, kind, column):
    """Read, counted, and prepared: a value that Python has no word for is no crash."""
    table = pa.table({"prompt": ["q"], "completion": ["a"], "group": column, "tools": column, "system": column})
    sink = io.BytesIO()
    try:
        if kind == "parquet":
            pq.write_table(table, sink)
        else:
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
    except pa.ArrowException:
        return  # Parquet has no such value
    found = rows_or_error(tmp_path, f"odd.{kind}", sink.getvalue())
    if isinstance(found, list):
        ledger = Ledger(read=1)
        source = {"columns": {}, "format": "auto"}
        row = to_row(*found[0], source, ledger)
        assert ledger.dropped.total() == (row is None)


@examples(60)
@given(
    rows=st.lists(
        st.fixed_dictionaries({"text": TEXTS.filter(lambda t: "\ud800" not in t)}, optional={"n": st.integers(-9, 9)}),
        min_size=1,
        max_size=5,
    ),
    at=st.floats(0, 1),
    kind=st.sampled_from(["parquet", "arrow"]),
)
def test_any_cut_table(tmp_path, rows, at, kind):
    sink = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    if kind == "parquet":
        pq.write_table(table, sink)
    else:
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    whole = sink.getvalue()
    cut = whole[: int(at * (len(whole) - 1))]
    if kind == "parquet":
        assert isinstance(rows_or_error(tmp_path, "odd.parquet", cut), str)
    rows_or_error(tmp_path, f"odd.{kind}", cut)
    assert len(rows_or_error(tmp_path, f"odd.{kind}", whole)) == len(rows)


# --- the ledger -------------------------------------------------------------------------------------------------------

GOOD = [{"prompt": f"How many is {n} and {n}, please tell me?", "completion": f"It is {n}."} for n in range(6)]


@pytest.mark.slow
@examples(200)
@given(
    rows=st.lists(ANY_ROW, min_size=1, max_size=6),
    columns=st.dictionaries(st.sampled_from(COLUMNS), st.sampled_from(COLUMNS), max_size=2),
    languages=st.sampled_from([[], ["en"]]),
)
def test_any_row_is_written_or_counted(tmp_path, rows, columns, languages):
    """Read = written + dropped, by reason; no row is in both parts."""
    lines = [dumped(row) for row in [*GOOD, *rows]]
    try:
        if not all(isinstance(json.loads(line), dict) for line in lines):
            return
    except (RecursionError, ValueError):
        return
    (tmp_path / "odd.jsonl").write_text("\n".join(lines), encoding="utf-8")
    source = {"path": str(tmp_path / "odd.jsonl"), "weight": 1, "columns": {}, "format": "auto"}
    settings = {
        "sources": [source, {**source, "columns": columns}],
        "val_sources": [],
        "test_sources": [],
        "split": "train",
        "max_rows": 10**9,
        "languages": languages,
        "language_detector": "py3langid",
        "unknown_language": "drop",
        "broken": "drop",
        "sample_size": "full",
        "near_duplicates": "group",
        "val_size": 0.3,
        "test_size": 0.3,
        "seed": 0,
    }
    outputs = ("train.jsonl", "val.jsonl", "test.jsonl", "metadata.json")
    paths = {name.partition(".")[0]: str(tmp_path / name) for name in outputs}
    try:
        prepare.prepare(settings, SimpleNamespace(**paths, threads=1), logging.getLogger("test"))
    except MoultError as error:
        one_error(error)
        return
    metadata = json.loads((tmp_path / "metadata.json").read_text())
    train, val = (read_jsonl(tmp_path / name) for name in outputs[:2])
    train, val = list(train), list(val)
    ledger = metadata["ledger"]
    assert ledger["read"] == 2 * len(lines) == len(train) + len(val) + sum(ledger["dropped"].values())
    assert not {row["group"] for row in train} & {row["group"] for row in val}
    contents = [
        json.dumps({key: row.get(key) for key in ("messages", "tools", "text")}, sort_keys=True)
        for row in [*train, *val]
    ]
    assert len(set(contents)) == len(contents)
