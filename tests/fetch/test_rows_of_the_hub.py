"""Rows that come from the hub are those of the same file on this machine, whatever it is and whatever they hold."""

import gzip
import io
import json

import pytest
from fetching import jsonl

from moult.data.readers import expand, read_rows

# What Arrow, pandas and ujson would make something else of: dates, whole numbers beside others, long numbers, null in a tool,
# digits as text, columns that some rows lack, text beside blocks.
ODD = [
    {"prompt": "q", "completion": "2024-01-01", "tools": [{"name": "f", "parameters": {"x": {"default": None}}}]},
    {"prompt": "q", "completion": "2024-01-02T10:00:00Z", "score": 1, "note": None},
    {"messages": [{"role": "user", "content": "5"}, {"role": "assistant", "content": '{"a":  1}'}], "score": 2.5},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]},
    {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1, "y": 0.12345678901234567}}]},
            {"role": "tool", "content": "r"},
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 2.5, "y": None, "z": "2024-01-01"}}]},
        ]
    },
    {"prompt": "q", "completion": "half a \ud800 character"},
]
TABLE = 'prompt,completion\r\nq,007\r\nNA,1.50\r\n"",True\r\nnull,"two\nlines"\r\n'
# {file: (its contents, the rows)}
FILES = {
    "train.jsonl": jsonl(ODD),
    "train.json": json.dumps(ODD, indent=1).encode(),
    "train.jsonl.gz": gzip.compress(jsonl(ODD)),
    "train.csv": TABLE.encode(),
    "train.tsv": TABLE.replace(",", "\t").encode(),
}


def rows_of(file) -> list[dict]:
    return [row for path in expand(str(file)) for _, row in read_rows(path, path.name)]


def fetched(fetch, **settings) -> list[dict]:
    result = fetch.dataset(settings={"subset": None, **settings})
    assert result.returncode == 0, result.stderr
    return rows_of(fetch.folder / "results/math.parquet")


def same(found: list[dict], expected: list[dict]) -> bool:
    """Equal, and 1 is neither 1.0 nor true; columns may be in another order."""
    return json.dumps(found, sort_keys=True) == json.dumps(expected, sort_keys=True)


@pytest.mark.parametrize("name", FILES)
def test_text_files(hub, fetch, name):
    hub.add("dataset", "org/math", {name: FILES[name]})
    (fetch.folder / name).write_bytes(FILES[name])
    local = rows_of(fetch.folder / name)
    assert same(fetched(fetch), local)
    facts = fetch.json("math.json")
    assert facts["rows"] == len(local) == len(ODD if "json" in name else [1, 2, 3, 4])
    assert set(facts["columns"]) == {column for row in local for column in row}


def test_parquet_with_the_types_of_datasets(hub, fetch):
    import datasets
    from datasets import Features, Json, List, Value

    content = List({"role": Value("string"), "content": Json()})
    rows = [ODD[2] | {"score": 1.5}, ODD[3] | {"score": 2.5}]
    table = datasets.Dataset.from_list(rows, features=Features({"messages": content, "score": Value("float64")}))
    table.to_parquet(file := io.BytesIO())
    hub.add("dataset", "org/math", {"train.parquet": file.getvalue()})
    (fetch.folder / "local.parquet").write_bytes(file.getvalue())
    found = fetched(fetch)
    assert found == rows_of(fetch.folder / "local.parquet")
    assert [type(row["messages"][1]["content"]).__name__ for row in found] == ["JsonText", "JsonText"]


def test_parts_of_splits_and_several_files(hub, fetch):
    files = {
        f"{split}/{n}.jsonl": jsonl([{"text": f"{split} {n}{i}"} for i in range(5)])
        for split in ("train", "test")
        for n in (0, 1)
    }
    card = b"---\nconfigs:\n- config_name: default\n  data_files:\n"
    for split in ("train", "test"):
        card += f"  - {{split: {split}, path: [{split}/0.jsonl, {split}/1.jsonl]}}\n".encode()
    hub.add("dataset", "org/math", {"README.md": card + b"---\n", **files})
    found = [row["text"] for row in fetched(fetch, split="train[3:7]+test[-20%:]")]
    assert found == ["train 03", "train 04", "train 10", "train 11", "test 13", "test 14"]
    assert len(fetched(fetch, split="all")) == 20


def test_only_the_splits_that_are_asked_for_are_downloaded(hub, fetch):
    hub.add("dataset", "org/math", {f"{split}.jsonl": jsonl([{"text": split}]) for split in ("train", "test")})
    assert fetched(fetch, split="test") == [{"text": "test"}]
    assert not [path for path in hub.paths("GET") if path.endswith("train.jsonl")]


@pytest.mark.parametrize(
    ("card", "files", "rows"),
    [
        # The card says how to read it: `datasets` knows that.
        (b"sep: ';'", {"a.csv": b"prompt;completion\nq;a\n"}, [{"prompt": "q", "completion": "a"}]),
        # Python writes NaN, which is not JSON.
        (b"", {"a.jsonl": b'{"text": "a", "score": NaN}\n'}, [{"text": "a", "score": "nan"}]),
        (b"", {"a.txt": b"one\ntwo\n"}, [{"text": "one"}, {"text": "two"}]),
    ],
)
def test_what_datasets_reads(hub, fetch, card, files, rows):
    [name] = files
    config = b"---\nconfigs:\n- config_name: default\n  data_files: %s\n  %s\n---\n" % (name.encode(), card)
    hub.add("dataset", "org/math", {"README.md": config, **files})
    assert [{column: str(value) for column, value in row.items()} for row in fetched(fetch)] == rows
