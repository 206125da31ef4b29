"""What encode costs: seconds of the processor per row by the number of turns, and memory by the number of rows.

    python tests/benchmark_encode.py /tmp/encode --turns 1 10 40 80 160 300 --rows 10000 100000 --threads 1

The time to start is measured apart and taken off. `--checkout` measures the scripts of another checkout.
"""

import argparse
import json
import math
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


def encode(folder: Path, args, max_length: int) -> tuple[float, float, int]:
    """(wall-clock seconds, seconds of the processor, peak memory in bytes over all processes) of one run of the stage."""
    settings = {
        "chat_template": "chatml",
        "chat_template_kwargs": {},
        "trust_remote_code": False,
        "unrenderable": "error",
    }
    settings |= {"max_length": max_length, "overlength": "truncate", "max_token_loss": 1.0}
    command = [sys.executable, args.checkout / "scripts" / "encode.py", "--settings", json.dumps(settings)]
    command += ["--model", ROOT / "config/demo/base", "--templates", ROOT / "config/chat_templates"]
    command += ["--train", folder / "train.jsonl", "--val", folder / "val.jsonl", "--test", folder / "val.jsonl"]
    command += ["--out", folder / "tokens"]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--turns", type=int, nargs="*", default=[])
    parser.add_argument("--rows", type=int, nargs="*", default=[], help="numbers of rows of two turns, 1 kB each")
    parser.add_argument("--per-turns", type=int, default=4, help="rows of each number of turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkout", type=Path, default=ROOT)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    write(args.folder / "val.jsonl", 1, 1)
    write(args.folder / "train.jsonl", 1, 1)
    start = encode(args.folder, args, 10**7)[1]
    print(f"start: {start:.1f} s of the processor")
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
