"""Tables with the types of `datasets`: each row as it was before it went into the file, whoever wrote that."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preparing import ANSWER, USER, run, write

from moult.data.conversation import find_format, normalise
from moult.data.readers import expand, read_rows
from moult.data.row_file import columns_of, write_rows
from moult.data.tables import JsonText

datasets = pytest.importorskip("datasets")
from datasets import Features, Json, LargeList, List, Value  # noqa: E402

TEXT = Value("string")
DECODED = {"picture": datasets.Image(), "sound": datasets.Audio()}
BLOCKS = [{"type": "text", "text": "It is "}, {"type": "text", "text": "4."}]
TOOL = {
    "name": "add",
    "parameters": {"type": "object", "properties": {"x": {"default": None}, "y": {"enum": [1, 2.5]}}},
}


def chat(answer, question="What is 2 + 2?") -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def pair(answer) -> dict:
    return {"prompt": "What is 2 + 2?", "completion": answer}


def of_messages(message) -> Features:
    return Features({"messages": message})


CONTENT_IN_JSON = of_messages(List({"role": TEXT, "content": Json()}))
# What local rows are and what `datasets` is told of them. Text that is JSON is as frequent as answers in JSON.
CASES = {
    "content in JSON": (CONTENT_IN_JSON, [chat('It is "4",\n\té/.'), chat(BLOCKS), chat(" 4\n")]),
    "content that is JSON already": (
        CONTENT_IN_JSON,
        [chat(text) for text in ("4", "4.50", "true", "[1, 2]", '{"answer":  4}', '[{"answer": 4}]', "{", "007")],
    ),
    "messages in JSON": (of_messages(List(Json())), [chat("4"), chat('{"answer": 4}'), chat(BLOCKS), chat("It is 4.")]),
    "all messages in one JSON": (of_messages(Json()), [chat("4"), chat("It is 4.")]),
    "a large list": (of_messages(LargeList({"role": TEXT, "content": Json()})), [chat("It is 4.")]),
    "plain structs": (of_messages(List({"role": TEXT, "content": TEXT})), [chat('"It is 4."'), chat("4")]),
    "answers in JSON": (
        Features({"prompt": TEXT, "completion": Json()}),
        [pair("It is 4."), pair("4"), pair([{"role": "assistant", "content": "It is 4."}]), pair('{"a": 1}')],
    ),
    "prompts in JSON": (
        Features({"prompt": Json(), "completion": Json()}),
        [{"prompt": [USER], "completion": [ANSWER]}, {"prompt": "q", "completion": "a"}],
    ),
    "tools in JSON": (
        Features({"prompt": TEXT, "completion": TEXT, "tools": Json()}),
        [pair("It is 4.") | {"tools": [TOOL]}, pair("It is 5.") | {"tools": [TOOL, {"name": "f"}]}],
    ),
    "a list of tools in JSON": (
        Features({"prompt": TEXT, "completion": TEXT, "tools": List(Json())}),
        [pair("It is 4.") | {"tools": [TOOL]}, pair("It is 5.") | {"tools": []}],
    ),
    "parameters in JSON": (
        Features({"prompt": TEXT, "completion": TEXT, "tools": List({"name": TEXT, "parameters": Json()})}),
        [pair("It is 4.") | {"tools": [TOOL]}],
    ),
    "arguments in JSON": (
        of_messages(
            List(
                {
                    "role": TEXT,
                    "content": TEXT,
                    "tool_calls": List({"type": TEXT, "function": {"name": TEXT, "arguments": Json()}}),
                }
            )
        ),
        [
            {
                "messages": [
                    {"role": "user", "content": "q", "tool_calls": None},
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}],
                    },
                ]
            }
            for arguments in ({"x": 1, "y": None}, {"x": 1.5}, '{"x": "1"}', {"x": [1, "1"]})
        ],
    ),
}

CALLS = [{"type": "function", "function": {"name": "f", "arguments": {"x": None}}}]
CASES["calls in JSON"] = (
    of_messages(List({"role": TEXT, "content": TEXT, "tool_calls": Json(), "function_call": Json(), "weight": Json()})),
    [
        {"messages": [USER, {**ANSWER, "tool_calls": calls, "function_call": call, "weight": weight}]}
        for calls, call, weight in ((CALLS, None, 1), ([], {}, True), (None, {"name": "f", "arguments": "{}"}, 1.0))
    ],
)


def saved(folder, rows: list[dict], features, how: str) -> str:
    """The source that these rows make, written by `datasets`."""
    table = datasets.Dataset.from_list(rows, features=features)
    for name, decoded in DECODED.items():  # to make these at once takes packages that decode them; reading must not
        if name in features:
            table = table.cast_column(name, decoded)
    if how == "save_to_disk":
        table.save_to_disk(folder / "saved")
        return str(folder / "saved")
    table.to_parquet(folder / "rows.parquet")
    return str(folder / "rows.parquet")


def normalised(source: str) -> list[dict]:
    rows = [row for file in expand(source) for _, row in read_rows(file, file.name)]
    return [normalise(row, {}, find_format(row, {}, "auto"))[0] for row in rows]


@pytest.mark.parametrize("how", ["save_to_disk", "to_parquet"])
@pytest.mark.parametrize("name", CASES)
def test_rows_in_json_columns_are_those_of_a_local_file(tmp_path, name, how):
    features, rows = CASES[name]
    local = normalised(write(tmp_path / "rows.jsonl", rows))
    assert normalised(saved(tmp_path, rows, features, how)) == local
    assert len(local) == len(rows)


def test_types_that_other_programs_give_to_json(tmp_path):
    """DuckDB and Polars write JSON columns without a word of `datasets`; dictionaries and maps hold JSON as well."""
    json_array = pa.array(['"a"', "[1]", None, "4"], pa.json_())
    table = pa.table(
        {
            "plain": json_array,
            "large": pa.array(['"a"', "[1]", None, "4"], pa.json_(pa.large_string())),
            "fixed": pa.FixedSizeListArray.from_arrays(json_array, 1),
            "map": pa.MapArray.from_arrays([0, 1, 2, 3, 4], pa.array(list("kkkk")), json_array),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    rows = [row for _, row in read_rows(tmp_path / "a.parquet", "a")]
    assert rows[0] == {"plain": "a", "large": "a", "fixed": ["a"], "map": [("k", "a")]}
    assert rows[2] == {"plain": None, "large": None, "fixed": [None], "map": [("k", None)]}
    for index, text in ((1, "[1]"), (3, "4")):
        assert (
            rows[index]["plain"] == rows[index]["large"] == rows[index]["fixed"][0] == rows[index]["map"][0][1] == text
        )
        assert isinstance(rows[index]["plain"], JsonText)


def test_damaged_json_is_text(tmp_path):
    storage = pa.array(['{"a"', "[" * 100_000])
    table = pa.table({"text": pa.ExtensionArray.from_storage(pa.json_(), storage)})
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    assert [row["text"] for _, row in read_rows(tmp_path / "a.arrow", "a")] == storage.to_pylist()


FILE = {"bytes": Value("binary"), "path": TEXT}
# Everything but Json is in the file as it is.
PLAIN_TYPES = {
    "label": (datasets.ClassLabel(names=["no", "yes"]), 1),
    "matrix": (datasets.Array2D((2, 2), "int64"), [[1, 2], [3, 4]]),
    "translation": (datasets.Translation(["de", "en"]), {"de": "Wort", "en": "word"}),
    "numbers": (List(Value("float32"), length=2), [0.5, 1.0]),
    "large": (Value("large_string"), "text"),
    "flag": (Value("bool"), True),
    "bytes": (Value("binary"), b"\0\xff"),
    "picture": (FILE, {"bytes": b"no picture", "path": "a.png"}),
    "sound": (FILE, {"bytes": b"no sound", "path": "a.wav"}),
    "turns": (datasets.Sequence({"role": TEXT, "n": Value("int8")}), {"role": ["a", "b"], "n": [1, 2]}),
}


@pytest.mark.parametrize("how", ["save_to_disk", "to_parquet"])
@pytest.mark.parametrize("name", PLAIN_TYPES)
def test_other_types_are_what_datasets_makes_of_them(tmp_path, name, how):
    kind, value = PLAIN_TYPES[name]
    source = saved(tmp_path, [{name: value}], Features({name: kind}), how)
    [found] = [found for file in expand(source) for _, found in read_rows(file, "a")]
    assert found == {name: value}


def test_messages_of_a_sequence_are_a_list_again(tmp_path):
    """`Sequence` of a dict is a dict of lists to `datasets`, as to TensorFlow's."""
    features = of_messages(datasets.Sequence({"role": TEXT, "content": TEXT}))
    rows = [{"messages": {"role": ["user", "assistant"], "content": ["q", f"answer {n}"]}} for n in range(3)]
    found = normalised(saved(tmp_path, rows, features, "to_parquet"))
    assert found == [{"messages": [USER, {**ANSWER, "content": f"answer {n}"}]} for n in range(3)]


def test_a_group_in_json_is_the_value(tmp_path):
    """Of the topics 1, "1" and "a" the first two are one, as in a local file."""
    rows = [{"prompt": f"q {n}", "completion": f"a {n}", "topic": [1, "1", "a", [1]][n % 4]} for n in range(40)]
    features = Features({"prompt": TEXT, "completion": TEXT, "topic": Json()})
    sources = [write(tmp_path / "rows.jsonl", rows), saved(tmp_path, rows, features, "to_parquet")]
    groups = []
    for source in sources:
        found = run(tmp_path, source=source, columns={"group": "topic"}, val_size=8)
        groups.append(found.train_summary["groups"] + found.val_summary["groups"])
    assert groups == [3, 3]


# --- rows of any values in one file (moult/data/row_file.py) ----------------------------------------------------------

ODD_ROWS = [
    {"a": "2024-01-01", "b": 1, "c": None, "d": {"x": 1}},
    {"a": "007", "b": 2.5, "d": {"y": None}, "é": "\ud800"},
    {"a": "", "c": "5", "d": [0.12345678901234567, 10**30, "null"], "é": "x"},
    {},
]


def test_rows_come_back_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr("moult.data.row_file.BATCH", 3)
    columns, count = columns_of(ODD_ROWS)
    assert (columns, count) == ({"a": True, "b": False, "c": False, "d": False, "é": False}, 4)
    assert write_rows(tmp_path / "a.parquet", iter(ODD_ROWS), columns) == 4
    found = [row for _, row in read_rows(tmp_path / "a.parquet", "a")]
    assert json.dumps(found) == json.dumps(ODD_ROWS)  # 1 is not 1.0, nor true
    assert pq.read_table(tmp_path / "a.parquet").column("a").to_pylist() == ["2024-01-01", "007", "", None]
