"""Measurements of a made-up base and tuned model, for the tests of score."""

import random
from argparse import Namespace

from planning import Log

import score
from moult.files import read_json, write_json, write_jsonl
from moult.measuring.forgetting import instructions
from moult.training.throughput import summary

SETTINGS = {
    "lora": {"r": 4},
    "train": {"learning_rate": 1.0},
    "dtype": "bfloat16",
    "quantization": None,
    "seed": 3,
    "trust_remote_code": False,
}
ADAPTER = {
    "validation_loss": {"published": 0.5, "last": 0.5},
    "adapter_sha256": "a",
    "versions": {},
    "hardware": {},
    "step": 7,
    "chosen": "lowest validation loss",
    "steps": 9,
    "ended": {"step": 9, "because": "last step"},
    "throughput": summary([]),
}
MEASURED = {"measured_on": "test", "no_test_part_because": None}
EVAL = {
    "perplexity": True,
    "confidence": 0.95,
    "resamples": 500,
    "merge_kl_limit": 0.05,
    "merge_top1_limit": 0.95,
    "quantization_kl_limit": 0.05,
    "benchmarks": {},
    "contamination": "exclude",
    "prompts": [{"id": "a", "prompt": "?", "expect": {"contains": "yes"}}, {"id": "b", "prompt": "?"}],
    "row_expect": {"exact": True, "json": True},
    "forgetting": True,
    "forgetting_limit": 0.1,
}


INSTRUCTION = next(entry for entry in instructions() if entry["id"] == "capital-france")


def make_sides(
    folder,
    better: float = 1.0,
    noise: float = 0.5,
    rows: int = 40,
    right: float = 1.0,
    forgot: float = 0.0,
    obeyed: tuple[int, int] = (12, 12),
) -> None:
    """Measurements in which the tuned model is `better` nats per token better, give or take `noise`, and answers the share
    `right` of the rows as they should be. It predicts the general text worse by `forgot` nats per token, and of 24
    instructions base and tuned follow the numbers `obeyed`."""
    generator = random.Random(1)
    for side in ("base", "tuned"):
        gain = better if side == "tuned" else 0.0
        measured = []
        for index in range(rows):
            tokens = 5 + index % 7
            nll = tokens * (3.0 - gain + generator.gauss(0, noise))
            group = f"g{index // 2}"
            measured.append(
                {
                    "id": f"r{index}",
                    "group": group,
                    "source": index % 2,
                    "nll": nll,
                    "tokens": tokens,
                    "correct": 2,
                    "bytes": tokens * 4,
                }
            )
        answers = [
            {
                "kind": "prompt",
                "id": name,
                "group": name,
                "prompt": "?",
                "reference": None,
                "answer": "yes",
                "stopped": True,
                "prompt_ids": [ord(name)],
            }
            for name in "ab"
        ]
        for index in range(rows):
            good = side == "tuned" and index < right * rows
            answer = '{"a": 1}' if good else "nothing"
            answers.append(
                {
                    "kind": "row",
                    "id": f"r{index}",
                    "group": f"r{index}",
                    "prompt": "?",
                    "reference": '{"a": 1}',
                    "answer": answer,
                    "stopped": side == "base",
                    "prompt_ids": [index],
                }
            )
        for index in range(24):
            expect = INSTRUCTION["expect"]["contains"] if index < obeyed[side == "tuned"] else "nothing"
            answers.append(
                {
                    "kind": "instruction",
                    "id": INSTRUCTION["id"],
                    "group": str(index),
                    "prompt": "?",
                    "reference": None,
                    "answer": expect,
                    "stopped": True,
                    "prompt_ids": [index],
                }
            )
        lost = forgot if side == "tuned" else 0.0
        general = [
            {"id": f"en-{index}", "nll": 50 * (3 + lost * (0.9 + 0.02 * (index % 11))), "tokens": 50, "correct": 9}
            for index in range(32)
        ]
        write_jsonl(folder / side / "general.jsonl", general)
        write_jsonl(folder / side / "likelihood.jsonl", measured)
        write_jsonl(folder / side / "answers.jsonl", answers)
    merge_check = {
        "mean_kl": 1e-7,
        "max_kl": 1e-6,
        "top1_agreement": 1.0,
        "positions": 50,
        "rows": 8,
        "dtype": "float32",
    }
    write_json(folder / "tuned" / "merge_check.json", merge_check)
    sources = [{"path": f"{name}.jsonl", "sha256": "0", "source": number} for number, name in enumerate(("one", "two"))]
    write_json(
        folder / "metadata.json",
        {"overlap": {"rows": 0}, "sources": sources, "val_sources": [], "test_sources": [], **MEASURED},
    )
    write_json(
        folder / "tokens" / "report.json", {"template": {"sha256": "t"}, "vocabulary": 1000, "val": {"sequences": rows}}
    )
    write_json(folder / "adapter.json", {**ADAPTER, "settings": SETTINGS})
    write_json(folder / "merge.json", {"base": {"name": "b", "commit": None, "files": {}}, "files": {}})


def run(folder, log=None, benchmark_files=(), contamination_files=(), **settings) -> dict:
    arguments = {name: str(folder / name) for name in ("base", "tuned", "tokens")}
    arguments |= {"run": "demo", "prepared": str(folder / "metadata.json")}
    arguments |= {name: str(folder / f"{name}.json") for name in ("adapter", "merge", "metrics")}
    arguments |= {
        "samples": str(folder / "samples.jsonl"),
        "benchmarks": list(benchmark_files),
        "contamination": list(contamination_files),
    }
    arguments["seed_tuned"] = []
    score.score({"eval": {**EVAL, **settings}, "seed": 0}, Namespace(**arguments), log or Log())
    return read_json(folder / "metrics.json")
