"""Prepare rows of 1.26 kB: seconds of the processor, and the most memory of all its processes together.

    python tests/benchmark_prepare.py /tmp/prepare --rows 200000 1000000 --threads 1 2
    python tests/benchmark_prepare.py /tmp/prepare --rows 200000 --near-duplicates ignore
    python tests/benchmark_prepare.py /tmp/prepare --rows 200000 --checkout ../older

`--checkout` is another checkout, whose prepare is measured instead. The last column is a hash of what is written.
"""

import argparse
import contextlib
import hashlib
import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import psutil

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "scripts")]

from preparing import OUTPUTS, arguments, stage_input  # noqa: E402 (behind the path that it is on)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--near-duplicates", default="group", choices=["group", "drop", "ignore"])
    parser.add_argument("--checkout", type=Path, default=TESTS.parent)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    print("| rows | processes | seconds | of the processor | rows per such second | peak, MB | bytes |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    for rows in args.rows:
        file = make(args.folder / f"{rows}.jsonl", rows)
        for threads in args.threads:
            seconds, of_processor, peak = measure(args, file, threads)
            digest = hashlib.sha256(b"".join((args.folder / "out" / name).read_bytes() for name in OUTPUTS))
            speed = f"{rows / of_processor:,.0f} | {peak / 1e6:,.0f} | {digest.hexdigest()[:8]}"
            print(f"| {rows:,} | {threads} | {seconds:.1f} | {of_processor:.1f} | {speed} |", flush=True)


def make(file: Path, count: int) -> Path:
    """Conversations of one or two exchanges, of made-up words; every third with a system prompt."""
    if file.exists():
        return file
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(5000)]

    def turn(role: str, low: int, high: int) -> dict:
        return {"role": role, "content": " ".join(draw.choices(words, k=draw.randint(low, high))).capitalize() + "."}

    with file.open("w") as out:
        for number in range(count):
            messages = [] if number % 3 else [{"role": "system", "content": "You are a helpful assistant."}]
            answer = (30, 80) if number % 2 else (60, 160)
            for _ in range(1 + number % 2):
                messages += [turn("user", 20, 60), turn("assistant", *answer)]
            out.write(json.dumps({"messages": messages, "id": number}) + "\n")
    return file


def measure(args, file: Path, threads: int) -> tuple[float, float, int]:
    """(seconds, seconds of the processor, most bytes of memory), shared memory counted once."""
    out = args.folder / "out"
    options = [str(option) for name, value in arguments(out, threads).items() for option in (f"--{name}", value)]
    given = json.dumps(stage_input(source=str(file), near_duplicates=args.near_duplicates))
    command = [
        sys.executable,
        args.checkout / "scripts/prepare.py",
        "--settings",
        given,
        *options,
        "--log-file",
        out / "log",
    ]
    started, before, peak = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN), 0
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        me = psutil.Process(process.pid)
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):  # one of them has just ended
                peak = max(peak, sum(each.memory_full_info().pss for each in [me, *me.children(recursive=True)]))
            time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"prepare failed; the log is {out / 'log'}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - started, used, peak


if __name__ == "__main__":
    main()
