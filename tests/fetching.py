"""fetch_model and fetch_dataset as their rules run them, with what a hub of ours holds for them."""

import json
import struct
import subprocess
import sys
from pathlib import Path

from fake_hub import TOKEN, FakeHub, environment
from workflow import ROOT

ROWS = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(20)]
README = b"""---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train.jsonl}
  - {split: test, path: main/test.jsonl}
- config_name: socratic
  data_files:
  - {split: train, path: socratic/train.jsonl}
---
"""


def weights(size: int = 1000, name: str = "w", fill: bytes = b"\1") -> bytes:
    header = json.dumps({name: {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + fill * size


def model(**files: bytes) -> dict[str, bytes]:
    return {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}", "model.safetensors": weights(), **files}


def jsonl(rows: list[dict]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def dataset() -> dict[str, bytes]:
    train, test = jsonl(ROWS), jsonl(ROWS[:3])
    return {"README.md": README, "main/train.jsonl": train, "main/test.jsonl": test, "socratic/train.jsonl": train}


class Fetch:
    """Runs a stage as its rule does: a command line in an empty folder, with an environment of its own."""

    def __init__(self, folder: Path, hub: FakeHub):
        self.folder = folder
        self.environment = environment(folder / "home", HF_ENDPOINT=hub.url)

    def command(self, stage: str, *arguments: str) -> list[str]:
        return [sys.executable, str(ROOT / "scripts" / f"{stage}.py"), *arguments, "--log-file", "logs/fetch.log"]

    def run(self, command: list[str], **variables: str) -> subprocess.CompletedProcess:
        how = {"cwd": self.folder, "env": {**self.environment, **variables}, "capture_output": True, "text": True}
        return subprocess.run(command, **how, timeout=60)

    def model_command(self, name: str = "org/tiny", tls: str = "verify", **settings) -> list[str]:
        out = ("--out", "results/tiny", "--manifest", "results/tiny.json")
        return self.command("fetch_model", "--name", name, "--settings", json.dumps(settings), "--tls", tls, *out)

    def model(self, name: str = "org/tiny", tls: str = "verify", settings: dict | None = None, **variables: str):
        return self.run(self.model_command(name, tls, **(settings or {})), **variables)

    def dataset(self, name: str = "org/math", tls: str = "verify", settings: dict | None = None, **variables: str):
        settings = json.dumps({"id": name, "subset": "main", **(settings or {})})
        out = ("--out", "results/math.parquet", "--metadata", "results/math.json")
        return self.run(self.command("fetch_dataset", "--settings", settings, "--tls", tls, *out), **variables)

    def json(self, name: str) -> dict:
        return json.loads((self.folder / "results" / name).read_text())

    def files(self, folder: str) -> set[str]:
        root = self.folder / folder
        return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def assert_fails(result, what: str, fix: str = "") -> None:
    assert result.returncode == 1, result.stderr
    assert f"failed: {what}\n" in result.stderr
    assert f"what to do: {fix}" in result.stderr


def assert_written_nowhere(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert [path for path in files if "log" in path.name]
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []
