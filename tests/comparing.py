"""Made-up runs, with all the files that summary and compare read."""

import json
import random
import re
from html import unescape
from pathlib import Path

import scoring

from moult.files import read_json, write_json, write_jsonl

OPTIONS = {"confidence": 0.95, "resamples": 400, "seed": 0}
PART = {"sequences": 9, "tokens": 90, "trained_tokens": 45}
LEDGER = {
    "sources": [{"path": "one.jsonl", "rows": 50, "sha256": "1" * 64, "source": 0}],
    "val_sources": [],
    "test_sources": [],
    "near_duplicates": {"policy": "group"},
    "seed": 0,
    "thresholds": {"val": 0.1, "test": 0.1},
    "language_detector": "langdetect",
    "measured_on": "test",
    "ledger": {"read": 50, "dropped": {"empty": 1}},
    **{part: {"written": 9} for part in ("train", "val", "test")},
}


def make_dataset(results: Path, name: str, rows: list[dict], **changes) -> None:
    """`rows`: those to train on. The measured rows are r0, r1 …"""
    folder = results / "prepared" / name
    folder.mkdir(parents=True)
    write_json(folder / "metadata.json", {**LEDGER, **changes})
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(folder / "test.jsonl", [row(f"r{index}", f"question {index}") for index in range(40)])


def row(id: str, text: str) -> dict:
    return {
        "id": id,
        "group": "g",
        "language": "en",
        "source": 0,
        "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}],
    }


def make_run(
    results: Path, name: str, settings: dict | None = None, gpu: int = 0, seconds: float = 3600.0, **measured
) -> Path:
    """`settings`: of finetune, laid over those of the others. `gpu`: how many, 0 is a CPU. `measured`: for scoring.make_sides."""
    folder = results / name
    scoring.make_sides(folder, **measured)
    scoring.run(folder)
    write_json(
        folder / "adapter.json",
        {
            **scoring.ADAPTER,
            "batch": 8,
            "settings": {
                **scoring.SETTINGS,
                "train": {"learning_rate": 1e-3, "num_train_epochs": 2, "max_steps": -1, "gpu": max(1, gpu)},
                **(settings or {}),
            },
            "versions": {"moult": "1"},
            "hardware": {"device": "cuda" if gpu else "cpu"},
            "throughput": {**scoring.ADAPTER["throughput"], "seconds": seconds, "tokens_per_second": 100.0},
        },
    )
    metrics = read_json(folder / "metrics.json")
    write_json(folder / "metrics.json", {**metrics, "run": name})
    write_json(
        folder / "merge.json",
        {
            "base": {"name": "base", "commit": None, "files": {"model.safetensors": "2" * 64}},
            "versions": {"moult": "1"},
            "how": "streamed",
        },
    )
    write_json(
        folder / "plan.json", {"parameters": {"trainable": 8}, "steps": {"total": 9}, "merge": {"how": "streamed"}}
    )
    write_json(
        folder / "tokens" / "report.json",
        {
            "max_length": 256,
            "template": {"origin": "the model's own", "sha256": "3" * 64},
            "contaminated_rows": {"count": 0},
            **dict.fromkeys(("train", "val", "test"), PART),
        },
    )
    return folder


def edit(path: Path, change) -> None:
    """`change`, called with the content of a JSON file, edits it in place."""
    content = read_json(path)
    change(content)
    write_json(path, content)


def edit_rows(path: Path, change) -> None:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for index, one in enumerate(rows):
        change(index, one)
    write_jsonl(path, rows)


# --- what is measured of a model, and what a page says ----------------------------------------------------------------------

ATTACK = "</td><script>alert(1)</script>\u202e\x00<img src=x onerror=alert(1)>"


def rows(loss, count: int = 60, tokens: int = 10, size: int = 40, per_group: int = 1) -> list[dict]:
    """`loss`: of a row by its number, in nats per token."""
    return [
        {
            "id": f"r{index}",
            "group": f"g{index // per_group}",
            "source": 0,
            "nll": tokens * loss(index),
            "tokens": tokens,
            "correct": 1,
            "bytes": size,
        }
        for index in range(count)
    ]


def noisy(seed: int, mean: float = 1.0, spread: float = 0.2):
    generator = random.Random(seed)
    return lambda index: generator.gauss(mean, spread)


def samples(passed: list[bool], kind: str = "row", **fields) -> list[dict]:
    return [
        {
            "kind": kind,
            "id": f"q{index}",
            "group": f"q{index}",
            "prompt": "?",
            "reference": "yes" if kind == "row" else None,
            "base": {"answer": "", "stopped": True, "checks": {"exact": False}},
            "tuned": {"answer": "", "stopped": True, "checks": {"exact": value}},
            **fields,
        }
        for index, value in enumerate(passed)
    ]


def words(page: str) -> str:
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", page)))


def cells(page: str, label: str) -> list[list[str]]:
    """The body of a table, as text."""
    body = re.search(rf'aria-label="{label}">.*?<tbody>(.*?)</tbody>', page, re.DOTALL)[1]
    return [
        [words(cell).strip() for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line, re.DOTALL)]
        for line in re.findall(r"<tr[^>]*>(.*?)</tr>", body, re.DOTALL)
    ]
