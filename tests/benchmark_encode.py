"""What encode costs: seconds of the processor per row by the number of turns, and memory by the number of rows.

    python tests/benchmark_encode.py /tmp/encode --turns 1 10 40 80 160 300 --rows 10000 100000 --threads 1
    python tests/benchmark_encode.py /tmp/encode --beside /tmp/old --prepared results/prepared/gsm8k/train.jsonl

The time to start is measured apart and taken off. `--checkout` measures the scripts of another checkout. `--beside` measures
those of another one, too, in turns, on the rows of a prepared file.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent


def conversation(turns: int, seed: int) -> list[dict]:
    return [
        message
        for step in range(turns)
        for message in (
            {"role": "user", "content": f"Step {step} of job {seed}: output was {'line of text ' * 40}"},
            {"role": "assistant", "content": f"Run command {step} then look."},
        )
    ]


def write(path: Path, rows: int, turns: int) -> None:
    with path.open("w") as file:
        for number in range(rows):
            row = {"id": str(number), "group": str(number), "source": 0, "messages": conversation(turns, number)}
            file.write(json.dumps(row) + "\n")


def encode(
    folder: Path, args, max_length: int, train: Path | None = None, checkout: Path | None = None
) -> tuple[float, float, int]:
    """(wall-clock seconds, seconds of the processor, peak memory in bytes over all processes) of one run of the stage."""
    settings = {
        "chat_template": args.template,
        "chat_template_kwargs": {},
        "trust_remote_code": False,
        "unrenderable": "drop",
    }
    settings |= {"max_length": max_length, "overlength": "truncate", "max_token_loss": 1.0}
    script = (checkout or args.checkout) / "scripts" / "encode.py"
    command = [sys.executable, script, "--settings", json.dumps(settings)]
    command += ["--model", args.model, "--templates", ROOT / "config/chat_templates"]
    command += ["--train", train or folder / "train.jsonl", "--val", folder / "val.jsonl", "--out", folder / "tokens"]
    if '"--test"' in script.read_text():  # an older checkout has no third part
        command += ["--test", folder / "val.jsonl"]
    command += ["--threads", args.threads, "--log-file", folder / "log"]
    began, peak, spent = time.monotonic(), 0, {}
    process = psutil.Popen([str(part) for part in command], stderr=subprocess.DEVNULL)
    while process.poll() is None:
        now = 0
        for one in [process, *process.children(recursive=True)]:
            try:
                # What forked processes share is counted once.
                now += one.memory_full_info().pss
                spent[one.pid] = sum(one.cpu_times()[:2])
            except psutil.Error:
                continue
        peak = max(peak, now)
        time.sleep(0.1)
    assert process.returncode == 0, (folder / "log").read_text()[-2000:]
    return time.monotonic() - began, sum(spent.values()), peak


def beside(args) -> None:
    """Microseconds of the processor per row of a prepared file, in two checkouts in turns."""
    rows = sum(1 for _ in args.prepared.open("rb"))
    found: dict[Path, list[float]] = {args.beside: [], args.checkout: []}
    for _ in range(args.rounds):
        for checkout, times in found.items():
            start = encode(args.folder, args, 10**7, checkout=checkout)[1]
            times.append(1e6 * (encode(args.folder, args, 10**7, args.prepared, checkout)[1] - start) / rows)
    for checkout, times in found.items():
        print(
            f"{checkout}: {statistics.median(times):,.0f} µs a row ({min(times):,.0f} to {max(times):,.0f})", flush=True
        )
    print(f"{statistics.median(found[args.beside]) / statistics.median(found[args.checkout]):.2f} times as fast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--turns", type=int, nargs="*", default=[])
    parser.add_argument("--rows", type=int, nargs="*", default=[], help="numbers of rows of two turns, 1 kB each")
    parser.add_argument("--per-turns", type=int, default=4, help="rows of each number of turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", type=Path, default=ROOT / "config/demo/base")
    parser.add_argument("--template", default="chatml", help='"" for the model\'s own')
    parser.add_argument("--checkout", type=Path, default=ROOT)
    parser.add_argument("--beside", type=Path, help="an older checkout")
    parser.add_argument("--prepared", type=Path, help="with --beside: prepared rows (.jsonl)")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    args.template = args.template or None
    args.folder.mkdir(parents=True, exist_ok=True)
    write(args.folder / "val.jsonl", 1, 1)
    write(args.folder / "train.jsonl", 1, 1)
    start = encode(args.folder, args, 10**7)[1]
    print(f"start: {start:.1f} s of the processor")
    if args.beside:
        beside(args)
    found = {}
    for turns in args.turns:
        count = max(args.per_turns, 2000 // turns**2)
        write(args.folder / "train.jsonl", count, turns)
        whole, over = (max(encode(args.folder, args, limit)[1] - start, 0) / count for limit in (10**7, 512))
        found[turns] = whole
        print(f"{turns:4} turns: {1e3 * whole:9.1f} ms a row, cut to 512 tokens {1e3 * over:9.1f}", flush=True)
    sizes = sorted(found)[-2:]
    if len(sizes) == 2 and all(found[size] for size in sizes):
        growth = math.log(found[sizes[1]] / found[sizes[0]]) / math.log(sizes[1] / sizes[0])
        print(f"from {sizes[0]} to {sizes[1]} turns it grows with the turns to the power of {growth:.2f}")
    for rows in args.rows:
        write(args.folder / "train.jsonl", rows, 2)
        wall, spent, peak = encode(args.folder, args, 10**7)
        print(
            f"{rows:9,} rows: {wall:.0f} s, {1e3 * (spent - start) / rows:.2f} ms of the processor a row, "
            f"peak {peak / 2**20:,.0f} MiB in all processes",
            flush=True,
        )


if __name__ == "__main__":
    main()
