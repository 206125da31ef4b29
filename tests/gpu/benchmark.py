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

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"

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


def make_tokens(args, base: Path) -> Path:
    source = {"path": str(args.data / "datasets/gsm8k/train.jsonl"), "weight": 1, "format": "auto"}
    source["columns"] = {"prompt": "question", "completion": "answer"}
    prepared = args.out / "prepared"
    rows = {
        "sources": [source],
        "val_sources": [],
        "split": "train",
        "max_rows": 100 if args.tiny else None,
        "languages": [],
        "language_detector": "langdetect",
        "unknown_language": "drop",
        "broken": "error",
        "sample_size": "full",
        "val_size": 0.02,
        "seed": 0,
    }
    tokens = {
        "max_length": 1024,
        "overlength": "drop",
        "max_token_loss": 0.1,
        "unrenderable": "error",
        "chat_template": None,
        "chat_template_kwargs": {"enable_thinking": False},
        "trust_remote_code": False,
    }
    files = ("--train", prepared / "train.jsonl", "--val", prepared / "val.jsonl")
    log = ("--log-file", args.out / "stage.log")
    stage("prepare", "--settings", json.dumps(rows), *files, "--metadata", prepared / "metadata.json", *log)
    out = ("--out", args.out / "tokens")
    stage("encode", "--settings", json.dumps(tokens), "--model", base, *files, *out, "--threads", 4, *log)
    return args.out / "tokens"


def settings_of(changes: dict, args) -> dict:
    train = {
        "gpu": 1,
        "learning_rate": 2e-4,
        "num_train_epochs": 2,
        "max_steps": args.steps,
        "per_device_train_batch_size": 1 if args.tiny else 8,
        "gradient_accumulation_steps": 1 if args.tiny else 2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "max_grad_norm": 1.0,
        "packing": False,
        "packing_strategy": "bfd",
        "gradient_checkpointing": "auto",
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 0.5,
        "save_strategy": "steps",
        "save_steps": 0.25,
        "save_total_limit": 2,
        "logging_steps": 1 if args.tiny else 5,
        "report_to": "none",
        **changes,
    }
    lora = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
    model = {"dtype": "bfloat16", "attn_implementation": None, "trust_remote_code": False}
    return {"seed": 0, "lora": lora, "train": train, **model}


def finetune_arguments(folder: Path, settings: dict, base: Path, tokens: Path) -> list:
    plan = {name: value for name, value in settings.items() if name != "seed"} | {"chat_template_kwargs": {}}
    log = ("--log-file", folder / "stage.log")
    stage(
        "plan", "--settings", json.dumps(plan), "--model", base, "--tokens", tokens, "--out", folder / "plan.json", *log
    )
    return [
        *("--settings", json.dumps(settings), "--model", base, "--tokens", tokens, "--plan", folder / "plan.json"),
        *("--state", folder / "state", "--adapter", folder / "adapter", "--summary", folder / "adapter.json"),
        *("--training-log", folder / "training_log.jsonl", "--threads", 8, *log),
    ]


def run_case(name: str, changes: dict, args, base: Path, tokens: Path) -> dict:
    folder = args.out / name.replace(" ", "-")
    seconds = stage("finetune", *finetune_arguments(folder, settings_of(changes, args), base, tokens))
    history = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    speeds = sorted(entry["tokens_per_second"] for entry in history[1:] if "tokens_per_second" in entry)
    memory = json.loads((folder / "plan.json").read_text())["memory"]
    kind = "total_with_gradient_checkpointing" if changes.get("gradient_checkpointing") else "total"
    return {
        "tokens_per_second": speeds[len(speeds) // 2],
        "seconds": seconds,
        "peak_gib": max((entry.get("peak_gpu_bytes", 0) for entry in history), default=0) / 2**30,
        "planned_gib": memory[kind] / 2**30,
        "losses": [entry["loss"] for entry in history if "loss" in entry],
    }


def resume_case(args, base: Path, tokens: Path) -> str:
    """Stop the packed run in the middle, go on, and compare with the undisturbed one."""
    folder = args.out / "resumed"
    arguments = finetune_arguments(folder, settings_of(CASES["packed"], args), base, tokens)
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
