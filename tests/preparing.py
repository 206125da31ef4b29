"""prepare, run in this process on rows made on the spot."""

import csv
import gzip
import io
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
from workflow import ROOT

import prepare
from moult.workflow.config import load_schema, resolve
from moult.workflow.stages import stage_settings

SCHEMA = load_schema(str(ROOT / "config"))
OUTPUTS = ("train.jsonl", "val.jsonl", "test.jsonl", "metadata.json")
SPOKEN = {"prompt": "What is the weather like in the city today?", "completion": "It is sunny and very warm outside."}
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def stage_input(seed: int = 0, **dataset) -> dict:
    """What the rule passes for a dataset of these settings."""
    config = {"seed": seed, "model": {"name": "m"}, "datasets": {"d": dataset}}
    return stage_settings(resolve(config, SCHEMA), "prepare", "d")


def arguments(folder, threads: int = 1) -> dict:
    return {name.partition(".")[0]: str(folder / name) for name in OUTPUTS} | {"threads": threads}


def run(folder, threads: int = 1, **dataset) -> SimpleNamespace:
    """Prepare in this process: the rows of the parts and the metadata."""
    prepare.prepare(stage_input(**dataset), SimpleNamespace(**arguments(folder, threads)), logging.getLogger("test"))
    parts = {name.partition(".")[0]: (folder / name).read_text().split("\n")[:-1] for name in OUTPUTS[:3]}
    metadata = json.loads((folder / "metadata.json").read_text())
    summaries = {f"{part}_summary": metadata.pop(part) for part in parts}
    rows = {part: [json.loads(line) for line in lines] for part, lines in parts.items()}
    return SimpleNamespace(**rows, **summaries, **metadata)


def pairs(count: int, start: int = 0) -> list[dict]:
    return [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(start, start + count)]


def lines(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(file, rows) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(lines(*rows))
    return str(file)


def write_as(file: Path, rows: list[dict]) -> None:
    """`rows` in the form that the file's name asks for."""
    kind = Path(file.name.removesuffix(".gz")).suffix
    if kind in (".csv", ".tsv"):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]), delimiter="\t" if kind == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
        data = text.getvalue().encode()
    elif kind in (".parquet", ".arrow"):
        table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
        if kind == ".parquet":
            pq.write_table(table, sink)
        else:
            with pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
        data = sink.getvalue().to_pybytes()
    elif kind == ".json":
        data = json.dumps(rows, indent=1).encode()
    else:
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    file.write_bytes(gzip.compress(data) if file.name.endswith(".gz") else data)


def prompts(rows: list[dict]) -> list[str]:
    return [row["messages"][0]["content"] for row in rows]
