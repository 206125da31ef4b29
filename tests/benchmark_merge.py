"""Merge a 2.2 GB model of random bfloat16 weights, streamed and with peft: wall time and peak memory of the process.

    python tests/benchmark_merge.py /tmp/merge --rounds 3

The two run in turn, each in a process of its own; medians and ratios are printed as a Markdown table.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "scripts")]

LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}

WITH_PEFT = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3], max_shard_size="600MB")
"""

WATCH = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    base, adapter = make(args.folder)
    out = args.folder / "merged"
    streamed = [
        sys.executable,
        TESTS.parent / "scripts" / "merge.py",
        "--model",
        base,
        "--adapter",
        adapter,
        "--merged",
        out,
    ]
    streamed += ["--plan", args.folder / "plan.json", "--tokens", args.folder / "tokens"]
    streamed += ["--summary", args.folder / "merge.json", "--log-file", args.folder / "merge.log"]
    ways = {"streamed": streamed, "peft": [sys.executable, "-c", WITH_PEFT, base, adapter, out]}
    found = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, command in ways.items():
            found[name].append(measure(command))
    medians = {name: [statistics.median(values) for values in zip(*runs, strict=True)] for name, runs in found.items()}
    print("| way | seconds | peak MiB |\n| --- | ---: | ---: |")
    for name, (seconds, peak) in medians.items():
        print(f"| {name} | {seconds:.1f} | {peak:,.0f} |")
    ratios = [a / b for a, b in zip(*medians.values(), strict=True)]
    print(f"| streamed / peft | {ratios[0]:.2f} | {ratios[1]:.2f} |")


def make(folder: Path) -> tuple[Path, Path]:
    from merging import make_large_adapter, make_large_model, make_plan
    from transformers import AutoConfig

    from moult.files import read_json

    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 20, "vocab_size": 32000}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4}
    base = make_large_model(folder / "base", AutoConfig.for_model("llama", **sizes, **heads))
    make_plan(base, folder, LORA)
    return base, make_large_adapter(read_json(folder / "plan.json")["targets"], folder / "adapter", LORA)


def measure(command: list) -> tuple[float, float]:
    """(seconds, peak MiB of resident memory) of a command."""
    started = time.monotonic()
    # A small process in between: a forked child begins with the peak of its parent.
    done = subprocess.run([sys.executable, "-c", WATCH, *map(str, command)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[1]} failed: {done.stderr[-500:]}")
    return time.monotonic() - started, int(done.stdout.split()[-1]) / 1024


if __name__ == "__main__":
    main()
