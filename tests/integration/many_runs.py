"""Many tiny runs on a Slurm: do all finish, are GPUs never given twice, what does a run cost beside its stages.

    python tests/integration/many_runs.py --runs 200 --out /tmp/many      # the cluster that `sbatch` speaks to, with sacct

Prints a Markdown table for BENCHMARKS.md. Each run is a variant of the demo with a learning rate of its own and 5 steps, so
that most of the time is start-up, the worst case for overhead. `--here 20` makes as many on this machine without Slurm, which
tells what Slurm and the jobs' own Snakemakes cost where the cluster is this machine.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from workflow import checkout, environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--gpus-per-node", type=int, default=2)
    parser.add_argument("--here", type=int, default=0, help="runs to make without Slurm, on all cores (default: none)")
    parser.add_argument("--out", type=Path, required=True, help="folder to work in")
    args = parser.parse_args()
    folder, now = args.out / "checkout", datetime.now().strftime("%Y-%m-%dT%H:%M:%S")
    done, wall = run_all(folder, args.runs, "--profile", "slurm")
    finished = len(list(folder.glob("results/run*/metrics.json")))
    jobs = slurm_jobs(now)
    print("| | |\n| --- | ---: |")
    rows = {
        "runs that finished": f"{finished} of {args.runs} (exit code {done.returncode})",
        "wall clock": f"{wall / 60:.0f} min",
        "Slurm jobs": f"{len(jobs)}, {len(jobs) / args.runs:.2f} per run",
        "most GPUs in use on a node at a time": f"{most_in_use(jobs)} of {args.gpus_per_node}",
        **overhead(folder, jobs),
    }
    if args.here:
        one_core = [f"{stage}=1" for stage in ("prepare", "finetune", "merge", "evaluate_base", "evaluate_tuned")]
        cores = ("--cores", str(os.cpu_count()), "--set-threads", *one_core)
        local, seconds = run_all(args.out / "here", args.here, *cores)
        local.check_returncode()
        rows["wall clock per run: on Slurm, and here without it"] = (
            f"{wall / args.runs:.1f} s, {seconds / args.here:.1f} s"
        )
    print("\n".join(f"| {name} | {value} |" for name, value in rows.items()))
    sys.exit(done.returncode or finished != args.runs or most_in_use(jobs) > args.gpus_per_node)


def run_all(folder: Path, runs: int, *how: str) -> tuple[subprocess.CompletedProcess, float]:
    """Make the runs in `folder`, a checkout; how Snakemake has ended, and after how many seconds."""
    if not folder.exists():
        folder.mkdir(parents=True)
        checkout(folder)
        (folder / "many.yaml").write_text(json.dumps(config(runs)))
    began = time.time()
    command = [sys.executable, "-m", "snakemake", *how, "--configfile", "many.yaml", "--quiet", "all"]
    return subprocess.run(command, cwd=folder, env=environment(folder), check=False), time.time() - began


def config(runs: int) -> dict:
    tiny = {"max_steps": 5, "eval_steps": 5, "save_steps": 5}
    variants = {
        f"run{index:03}": {
            "dataset": "demo",
            "model": {"name": "config/demo/base"},
            "lora": {"r": 8, "lora_alpha": 16},
            "train": {**tiny, "learning_rate": 1e-4 * (index + 1)},
            "eval": {"answer_rows": 2, "max_new_tokens": 8, "merge_check_rows": 2, "resamples": 200},
        }
        for index in range(runs)
    }
    demo = {"train": tiny, "eval": {"answer_rows": 2, "max_new_tokens": 8}}
    return {"datasets": {"demo": {"max_rows": 100}}, "runs": {**variants, "demo": demo}}


def slurm_jobs(since: str) -> list[dict]:
    """Each job of this Snakemake: node, GPUs, begin and end in seconds, what it was."""
    command = ["sacct", "-X", "-n", "-P", "-S", since, "--format=JobID,NodeList,AllocTRES,Start,End,State"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    jobs = []
    for line in lines:
        _, node, tres, start, end, _ = line.split("|")
        gpus = re.search(r"gres/gpu=(\d+)", tres)
        begin, stop = (datetime.fromisoformat(text).timestamp() for text in (start, end))
        jobs.append({"node": node, "gpus": int(gpus[1]) if gpus else 0, "begin": begin, "end": stop})
    return jobs


def most_in_use(jobs: list[dict]) -> int:
    """The largest sum of GPUs of jobs that run on one node at one time."""
    most = 0
    for one in jobs:
        others = [job for job in jobs if job["node"] == one["node"] and job["begin"] <= one["begin"] < job["end"]]
        most = max(most, sum(job["gpus"] for job in others))
    return most


def overhead(folder: Path, jobs: list[dict]) -> dict[str, str]:
    """Seconds of Slurm jobs and seconds of stages, for each run."""
    stages: dict[str, float] = {}
    for path in folder.glob("logs/run*/*.log"):
        if done := re.search(r"done in ([\d.]+) s", path.read_text()):
            stages[path.parent.name] = stages.get(path.parent.name, 0) + float(done[1])
    in_jobs = sum(job["end"] - job["begin"] for job in jobs) / len(stages)
    in_stages = statistics.mean(stages.values())
    return {
        "in Slurm jobs, per run": f"{in_jobs:.1f} s",
        "of this in stages": f"{in_stages:.1f} s",
        "overhead per run (Snakemake's two starts in each job, imports of Python)": f"{in_jobs - in_stages:.1f} s",
    }


if __name__ == "__main__":
    main()
