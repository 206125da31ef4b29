"""The pipeline on a GPU: a Qwen2.5-0.5B-shaped model of random weights, Qwen3's tokenizer, GSM8K, bfloat16.

    python tests/gpu/benchmark.py --data ../shared/data --out /tmp/gpu            # on a machine with a GPU
    python tests/gpu/benchmark.py --data ../shared/data --out /tmp/cpu --tiny     # the same script on a CPU, in a minute

Calls the stages by hand, as their docstrings say, so it needs no Snakemake. For each case (plain, packed, gradient
checkpointing) it reports tokens per second, peak memory against the plan's estimate, and whether a run that is stopped
and resumed ends with the same adapter; prints a Markdown table for BENCHMARKS.md and writes figures.json.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from moult.files import canonical
from moult.workflow.config import load_schema, resolve
from moult.workflow.stages import stage_settings

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"

SHAPE = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
}
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
}
CASES = {
    "plain": {},
    "packed": {"packing": True},
    "gradient checkpointing": {"gradient_checkpointing": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with datasets/gsm8k and tokenizers/qwen3")
    parser.add_argument("--out", type=Path, required=True, help="folder to work in")
    parser.add_argument("--steps", type=int, default=60, help="training steps of each case")
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model and few rows: to try the script itself on a CPU"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    base = make_base(args.out / "base", args.data, TINY if args.tiny else SHAPE)
    tokens = make_tokens(args, base)
    figures = {name: run_case(name, changes, args, base, tokens) for name, changes in CASES.items()}
    figures["packed"]["resume"] = resume_case(args, base, tokens)
    (args.out / "figures.json").write_text(json.dumps(figures, indent=2))
    print(table(figures))


def stage(script: str, *arguments) -> float:
    """Run a stage; returns its wall time in seconds. Stops the benchmark if it fails."""
    started = time.monotonic()
    subprocess.run([sys.executable, SCRIPTS / f"{script}.py", *map(str, arguments)], check=True)
    return time.monotonic() - started


def make_base(folder: Path, data: Path, shape: dict) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if not (folder / "config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(data / "tokenizers" / "qwen3")
        tokenizer.save_pretrained(folder)
        ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        config = AutoConfig.for_model("qwen2", vocab_size=151936, tie_word_embeddings=True, **ids, **shape)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def settings(stage_name: str, args, train: dict) -> str:
    """What the rule of a stage would pass it, for a config with these differences from the defaults."""
    dataset = {
        "source": str(args.data.resolve() / "datasets/gsm8k/train.jsonl"),
        "columns": {"prompt": "question", "completion": "answer"},
        "max_length": 1024,
        "val_size": 0.02,
    }
    config = {
        "model": {"name": str(args.out.resolve() / "base"), "chat_template_kwargs": {"enable_thinking": False}},
        "datasets": {"gsm8k": dataset},
        "train": {
            "max_steps": args.steps,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 2,
            "eval_steps": 0.5,
            "save_steps": 0.25,
            "logging_steps": 5,
            **train,
        },
    }
    if args.tiny:
        dataset["max_rows"] = 100
        config["train"] |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "logging_steps": 1}
    return canonical(stage_settings(resolve(config, load_schema(str(ROOT / "config"))), stage_name, "gsm8k"))


def make_tokens(args, base: Path) -> Path:
    prepared = args.out / "prepared"
    files = ("--train", prepared / "train.jsonl", "--val", prepared / "val.jsonl")
    log = ("--log-file", args.out / "stage.log")
    stage(
        "prepare", "--settings", settings("prepare", args, {}), *files, "--metadata", prepared / "metadata.json", *log
    )
    out = ("--out", args.out / "tokens")
    stage("encode", "--settings", settings("encode", args, {}), "--model", base, *files, *out, "--threads", 4, *log)
    return args.out / "tokens"


def finetune_arguments(folder: Path, train: dict, args, base: Path, tokens: Path) -> list:
    read, plan, log = ("--model", base, "--tokens", tokens), folder / "plan.json", ("--log-file", folder / "stage.log")
    stage("plan", "--settings", settings("plan", args, train), *read, "--out", plan, *log)
    return [
        *("--settings", settings("finetune", args, train), *read, "--plan", plan),
        *("--state", folder / "state", "--adapter", folder / "adapter", "--summary", folder / "adapter.json"),
        *("--training-log", folder / "training_log.jsonl", "--threads", 8, *log),
    ]


def run_case(name: str, changes: dict, args, base: Path, tokens: Path) -> dict:
    folder = args.out / name.replace(" ", "-")
    seconds = stage("finetune", *finetune_arguments(folder, changes, args, base, tokens))
    history = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    speeds = sorted(entry["tokens_per_second"] for entry in history[1:] if "tokens_per_second" in entry)
    memory = json.loads((folder / "plan.json").read_text())["memory"]
    kind = "total_with_gradient_checkpointing" if changes.get("gradient_checkpointing") else "total"
    return {
        "tokens_per_second": speeds[len(speeds) // 2],
        "seconds": seconds,
        "peak_gib": max((entry.get("peak_memory_allocated", 0) for entry in history), default=0) / 2**30,
        "planned_gib": memory[kind] / 2**30,
        "losses": [entry["loss"] for entry in history if "loss" in entry],
    }


def resume_case(args, base: Path, tokens: Path) -> str:
    """Stop the packed run in the middle, go on, and compare with the undisturbed one."""
    folder = args.out / "resumed"
    arguments = finetune_arguments(folder, CASES["packed"], args, base, tokens)
    process = subprocess.Popen([sys.executable, SCRIPTS / "finetune.py", *map(str, arguments)])
    log = folder / "state" / "training_log.jsonl"
    while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    stopped = process.wait()
    stage("finetune", *arguments)
    files = [args.out / name / "adapter" / "adapter_model.safetensors" for name in ("packed", "resumed")]
    same = files[0].read_bytes() == files[1].read_bytes()
    return (
        f"stopped with {stopped}, then {'the same bytes' if same else f'largest difference {difference(*files):.1e}'}"
    )


def difference(one: Path, other: Path) -> float:
    from safetensors.torch import load_file

    a, b = load_file(one), load_file(other)
    return max((a[name] - b[name]).abs().max().item() for name in a)


def table(figures: dict) -> str:
    lines = ["| case | tokens/s | peak GiB | planned GiB | seconds |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, f in figures.items():
        lines.append(
            f"| {name} | {f['tokens_per_second']:,.0f} | {f['peak_gib']:.1f} | {f['planned_gib']:.1f} | {f['seconds']:.0f} |"
        )
    return "\n".join([*lines, "", f"Resume: {figures['packed']['resume']}."])


if __name__ == "__main__":
    main()
