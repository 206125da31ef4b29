"""prepare writes the same bytes whatever the number of processes and the size of chunks, and those that it has always written.

FIRST was made by the first version with three parts. Until then, all rows were those of the version that held them in memory
(commit e695d3c); only the split was changed. If a rule changes what is written, say so in CHANGELOG.md, and take the hashes that
the test shows.
"""

import csv
import datetime
import gzip
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preparing import OUTPUTS, arguments, lines, pairs, stage_input, write, write_as
from workflow import ROOT

import prepare
from moult.data import first_pass, readers
from moult.files import canonical, sha256_text

ENGLISH = ("Could you please tell me more about the number {} now?", "It is one of the numbers that people like most.")
GERMAN = ("Kannst du mir bitte mehr über die Zahl {} erzählen?", "Das ist eine der Zahlen, die alle Leute gerne mögen.")
CHINESE = ("请告诉我更多关于数字{}的事情好吗？", "这是人们最喜欢的数字之一。")


def spoken(start: int, count: int) -> list[dict]:
    """Rows in three languages, some of them twice, some with one prompt and two answers."""
    rows = []
    for n in range(start, start + count):
        prompt, completion = (ENGLISH, ENGLISH, GERMAN, ENGLISH, CHINESE)[n % 5]
        rows.append({"prompt": prompt.format(n), "completion": completion})
        if n % 7 == 0:
            rows.append(rows[-1] | {"completion": f"{completion} {completion}"})
        if n % 11 == 0:
            rows.append(rows[n % len(rows)])
    return rows


CALL = {"name": "add", "arguments": {"x": 1e-07, "y": 1.0, "z": 10**30, "ß": None, "deep": [[{"a": [True, 1e300]}]]}}
TOOL = {
    "name": "add",
    "parameters": {"type": "object", "properties": {"x": {"minimum": -0.0}, "a": {"default": "\u2028"}}},
}


def odd(count: int) -> list:
    """Rows of every kind: with each reason to drop one, more often than examples are kept."""
    rows: list = []
    for n in range(count):
        user, answer = (
            {"role": "user", "content": f"quest\u2028ion {n % 40} 🎉"},
            {"role": "assistant", "content": f"a {n}"},
        )
        rows += [
            {"messages": [user, answer], "group": n % 5, "unread": n},
            {"messages": [user, answer], "group": str(n % 5), "tools": [TOOL]},
            {"conversations": [{"from": "human", "value": f"h {n}"}, {"from": "gpt", "value": "g", "mood": "calm"}]},
            {"messages": [user, {**answer, "content": " "}, user, {**answer, "weight": 0}, user, answer, user]},
            {"messages": [user, {"role": "assistant", "content": None, "tool_calls": [CALL], "thinking": 'hm\\"/'}]},
            {"messages": [user, {"role": "tool", "content": "7"}, answer], "tools": json.dumps([TOOL]), "system": "s"},
            {"instruction": f"i {n}", "input": "x" * n, "output": "o", "history": [["p", "q"]]},
            {"prompt": f"p {n // 2}", "completion": "c"},
            {"prompt": json.dumps([user]), "completion": [answer]},
            {"text": f"text {n}", "group": {"deep": [n % 3, 1.0]}},
            {"prompt": "q", "completion": ""},
            {"prompt": "q", "completion": 5 if n % 2 else None},
            {"prompt": "q \ud800", "completion": "a"},
            {"prompt": "q", "completion": f"surrogate group {n}", "group": "\ud800"},
            {"messages": [{"role": "alien", "content": "q"}]},
            {"messages": [answer]},
            {"messages": [{**user, "image": "a.png", "content": "<image>?"}, answer]},
            {"messages": [user, {**answer, "weight": 0.5}]},
            {"messages": [user, answer], "tools": "[{"},
            {"message_id": n, "parent_id": None, "text": "t"},
            {"\ud800": n},
            {},
        ]
    deep: dict = {}
    for _ in range(300):
        deep = {"properties": deep}
    return [*rows, {"prompt": "deep", "completion": "tools", "tools": [{"name": "f", "parameters": deep}]}]


def in_each_format(folder: Path) -> list[str]:
    """A file of each kind; some hold rows of others."""
    (folder / "a.jsonl").write_text("\n" + lines(*pairs(30)).replace("\n", "\r\n\n"), "utf-8")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines(*pairs(30, 20)).encode(), mtime=0))
    (folder / "c.json").write_text(json.dumps(pairs(30, 40), indent=1))
    (folder / "d.json").write_text(json.dumps({"version": 1, "data": pairs(30, 60)}))
    (folder / "e.json").write_text(lines(*pairs(30, 80)), "utf-16")
    for name, delimiter, encoding in (("f.csv", ",", "utf-8-sig"), ("g.tsv", "\t", "utf-32")):
        with (folder / name).open("w", encoding=encoding, newline="") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerows(
                [["prompt", "completion", "note"], *[[f"zwei\nZeilen {n}, ß", f"a\t{n}", ""] for n in range(30)]]
            )
    dates = pa.array([datetime.date(2024, 1, 1 + n % 5) if n % 3 else None for n in range(30)])
    table = pa.Table.from_pylist(pairs(30, 100)).append_column("group", dates)
    pq.write_table(table, folder / "h.parquet", row_group_size=7)
    numbers = pa.array([float(n % 4) if n % 5 else float("nan") for n in range(30)])
    table = table.set_column(2, "group", numbers).append_column(
        "tools", pa.array([json.dumps([TOOL])] * 30, pa.json_())
    )
    with pa.ipc.new_stream(folder / "i.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=8)
    with pa.ipc.new_file(folder / "j.arrow", table.schema) as writer:
        writer.write_table(table.slice(3, 20), max_chunksize=3)
    (folder / "k").mkdir()
    (folder / "k" / "a.jsonl").write_text(lines(*pairs(10, 200)))
    return [
        "a.jsonl",
        "b.jsonl.gz",
        "c.json",
        "d.json",
        "e.json",
        "f.csv",
        "g.tsv",
        "h.parquet",
        "i.arrow",
        "j.arrow",
        "k",
    ]


def lay_out(folder: Path) -> dict[str, dict]:
    """The inputs in `folder`, and {case: what the config says of the dataset}."""
    formats = in_each_format(folder)
    (folder / "odd.jsonl").write_text(lines(*odd(60)))
    (folder / "odd.json").write_text("[" + ",\n".join(json.dumps(row) for row in odd(9)) + "]")
    (folder / "spoken.jsonl").write_text(lines(*spoken(0, 300)))
    (folder / "more.jsonl").write_text(lines(*spoken(250, 100)))
    (folder / "given.jsonl").write_text(lines(*spoken(40, 60), {"prompt": "q", "completion": ""}))
    turned = {"path": "spoken.jsonl", "columns": {"prompt": "completion", "completion": "prompt"}, "weight": 0.3}
    cases = {
        "formats": {"source": [{"path": path, "weight": 0.5 + n / 4} for n, path in enumerate(formats)]},
        "odd rows": {"source": ["odd.jsonl", "odd.json"], "broken": "drop", "val_size": 0.2, "seed": 3},
        "sample": {"source": "spoken.jsonl", "sample_size": 123, "val_size": 20},
        "three parts": {"source": ["spoken.jsonl", "more.jsonl"], "val_size": 0.1, "test_size": 50},
        "ties": {"source": ["spoken.jsonl", turned], "sample_size": 200},
        "languages": {"source": ["spoken.jsonl", "more.jsonl"], "languages": ["en", "zh"], "val_size": 37},
        "sample of a language": {
            "source": [{"path": "spoken.jsonl", "weight": 2.5}, {"path": "more.jsonl", "weight": 0.1}],
            "languages": ["de"],
            "language_detector": "py3langid",
            "unknown_language": "keep",
            "sample_size": 30,
        },
        "given validation rows": {
            "source": "*o*e*.jsonl",
            "val_source": "given.jsonl",
            "languages": ["en"],
            "language_detector": "py3langid",
            "sample_size": 150,
        },
        "first rows": {
            "source": [*formats, "odd.json"],
            "max_rows": 13,
            "broken": "drop",
            "columns": {"group": "nowhere"},
        },
        "near copies": {
            "source": [{"path": "spoken.jsonl", "weight": 1.5}, "odd.jsonl"],
            "test_source": "given.jsonl",
            "near_duplicates": "group",
            "broken": "drop",
        },
        "dropped near copies": {"source": ["spoken.jsonl", "more.jsonl"], "near_duplicates": "drop", "test_size": 40},
    }
    return {name: {"near_duplicates": "ignore"} | case for name, case in cases.items()}


FIRST = {
    "formats": ["a4baf2799d8cb446", "ebeabe896acb36a9", "ebeabe896acb36a9", "12a093ac146943ac"],
    "odd rows": ["6566db632abfcb7f", "bf42d0e543f9842e", "bf42d0e543f9842e", "a7254202f8491f11"],
    "sample": ["7e82eb9b2c9f7f85", "bde9919ac39a067e", "bde9919ac39a067e", "be86fe527fb0efbf"],
    "three parts": ["feb74c25813bb5f7", "7a3765ef4f42879a", "5fcd6761485bc97b", "50a03d754452cbd9"],
    "ties": ["80aa14195962979c", "db928715d222a1fa", "db928715d222a1fa", "353b5602f7c05512"],
    "languages": ["7ffb5174849ce244", "683540f89415515e", "683540f89415515e", "9fa3913a67d11a25"],
    "sample of a language": ["68afa4ca60abbc1d", "d8303d9389d6a3d1", "d8303d9389d6a3d1", "921a64a1ff8afe9c"],
    "given validation rows": ["2dbfb6c81bba0975", "7e3e367b4cfd4cb4", "7e3e367b4cfd4cb4", "5e8bc5d8a953ed23"],
    "first rows": ["f0a4d7c362ccfcf2", "cc3ed2bc7abfab8b", "cc3ed2bc7abfab8b", "e8ca4a64436b8500"],
    "near copies": ["c8e04aca1c55ef43", "08938e6e9336268a", "de51c20b3f4f8d31", "4d5ae8db2ace7097"],
    "dropped near copies": ["8e31dcf61e2268ed", "d658374932e1d141", "0ffff91a0b12b7d0", "ed06ce1548d475e5"],
}


def outcome(folder: Path, threads: int, dataset: dict) -> list[str]:
    """Hashes of what is written. Of the metadata are left out: hashes of the files, which the libraries' versions change, and
    what is newer than FIRST."""
    paths = arguments(folder, threads)
    prepare.prepare(stage_input(**dataset), SimpleNamespace(**paths), logging.getLogger("test"))
    metadata = json.loads(Path(paths["metadata"]).read_text())
    for file in metadata["sources"] + metadata["val_sources"] + metadata["test_sources"]:
        del file["sha256"]
    del metadata["language_detector"]
    if metadata["near_duplicates"] is None:
        del metadata["near_duplicates"]
    texts = [Path(paths[part]).read_text() for part in ("train", "val", "test")]
    return [sha256_text(text)[:16] for text in (*texts, canonical(metadata))]


@pytest.mark.parametrize("case", FIRST)
def test_the_bytes_are_those_of_the_first_version(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    dataset = lay_out(tmp_path)[case]
    if case == "ties":
        monkeypatch.setattr(first_pass, "draw", lambda seed, *what: 0.5)
    for threads, size in ((1, readers.SIZE), (2, 300), (3, 5000)):
        monkeypatch.setattr(readers, "SIZE", size)
        assert outcome(tmp_path / "out", threads, dataset) == FIRST[case], (threads, size)


# --- killed, and large ------------------------------------------------------------------------------------------------

# Runs prepare, kills it where it adds up the third chunk or writes the third piece, and prints the most memory in kB.
CODE = """
import json, logging, os, signal, sys
from types import SimpleNamespace
import prepare
from moult.data.records import Rows

given, paths, victim = json.loads(sys.argv[1])
add, finished, left = prepare.Ledger.add, Rows.finished, 3

def count():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

if victim == "reading":
    prepare.Ledger.add = lambda *both: (count(), add(*both))
elif victim == "writing":
    Rows.finished = lambda *both: (count() or piece for piece in finished(*both))
prepare.prepare(given, SimpleNamespace(**paths), logging.getLogger())
print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0].split()[1])
"""


def go(folder: Path, victim: str = "", threads: int = 1, **dataset) -> subprocess.CompletedProcess:
    given = json.dumps([stage_input(**dataset), arguments(folder, threads), victim])
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    return subprocess.run([sys.executable, "-c", CODE, given], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("victim", ["reading", "writing"])
@pytest.mark.parametrize("threads", [1, 2])
def test_killed_in_either_pass_it_ends_with_the_same_bytes(tmp_path, victim, threads):
    row = {"completion": "a" * 3000}
    source = write(tmp_path / "rows.jsonl", [{"prompt": f"question {n}", **row} for n in range(2000)])  # 6 chunks
    out = tmp_path / "out"
    assert go(out, victim, threads, source=source).returncode == -signal.SIGKILL
    assert not {file.name for file in out.iterdir()} & {*OUTPUTS}
    assert go(out, threads=threads, source=source).returncode == 0
    assert {file.name for file in out.iterdir()} == {*OUTPUTS}
    assert go(tmp_path / "undisturbed", source=source).returncode == 0
    for name in OUTPUTS:
        assert (out / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the most memory that a process had")
@pytest.mark.parametrize(
    "kind",
    ["jsonl.gz", "json", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("jsonl", "csv", "parquet"))],
)
def test_memory_does_not_grow_with_the_text(tmp_path, kind):
    """60 MB more of it take less than 20 MB more, for what is being read at a time."""
    peak = []
    for count in (1_000, 4_000):
        rows = [{"prompt": f"question {n}", "completion": f"{n} " * 4_000} for n in range(count)]
        file = tmp_path / f"rows{count}.{kind}"
        if kind == "parquet":  # a page holds 1,024 rows, however long they are, unless its group has fewer
            pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=50)
        else:
            write_as(file, rows)
        done = go(tmp_path / "out", source=str(file))
        assert done.returncode == 0, done.stderr
        peak.append(int(done.stdout))
    assert peak[1] - peak[0] < 20_000
