"""What Snakemake itself costs, and what Moult adds: a start, a dry run over many datasets, and the demo.

    python tests/benchmark_workflow.py starts dry-run demo

Seconds of the processor, and medians, side by side: wall-clock time depends on what else the machine does. The bare Snakefile has
as many rules, jobs, inputs and outputs as Moult's, and nothing else: no functions, no settings, no limits for names. `demo` runs
the demo once and lets Python tell what each import takes, which makes imports some percent slower.
"""

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from workflow import checkout, environment

SNAKEMAKE = [sys.executable, "-m", "snakemake", "--cores", "1"]
# {rule: (inputs, outputs)} for each run. D is the dataset's folder, R the run's.
RULES = {
    "prepare": (["data.jsonl"], ["D/train.jsonl", "D/val.jsonl", "D/test.jsonl", "D/metadata.json"]),
    "encode": (
        ["D/train.jsonl", "D/val.jsonl", "D/test.jsonl", "model.json"],
        [
            "R/tokens/train",
            "R/tokens/val",
            "R/tokens/test",
            "R/tokens/template",
            "R/tokens/report",
            "R/tokens/preview",
            "R/tokens/rows",
        ],
    ),
    "plan": (["model.json", "R/tokens/train", "R/tokens/report"], ["R/plan.json"]),
    "finetune": (
        ["model.json", "R/plan.json", "R/tokens/train", "R/tokens/val", "R/tokens/report", "R/tokens/template"],
        ["R/adapter", "R/adapter.json", "R/training_log.jsonl"],
    ),
    "merge": (["model.json", "R/adapter", "R/adapter.json", "R/tokens/report"], ["R/merged", "R/merge.json"]),
    "evaluate_base": (
        ["model.json", "R/tokens/test", "R/tokens/report", "R/tokens/template"],
        ["R/base/likelihood", "R/base/answers", "R/base/general"],
    ),
    "evaluate_tuned": (
        [
            "model.json",
            "R/adapter",
            "R/merged",
            "R/merge.json",
            "R/tokens/test",
            "R/tokens/report",
            "R/tokens/template",
        ],
        ["R/tuned/likelihood", "R/tuned/answers", "R/tuned/general", "R/tuned/merge_check"],
    ),
    "score": (
        [
            "R/base/likelihood",
            "R/base/answers",
            "R/tuned/likelihood",
            "R/tuned/answers",
            "D/metadata.json",
            "R/merge.json",
        ],
        ["R/metrics.json", "R/samples.jsonl"],
    ),
    "model_card": (["R/metrics.json", "R/merge.json", "R/adapter"], ["R/card.json"]),
}


def bare(folder: Path, datasets: int) -> Path:
    """A Snakefile with Moult's rules for so many datasets, each of constant strings."""

    def strings(names: list[str]) -> str:
        filled = (re.sub("^R/", "results/{run}/", re.sub("^D/", "results/prepared/{run}/", name)) for name in names)
        return ", ".join(map(repr, filled))

    text = [
        f'runs = [f"d{{number}}" for number in range({datasets})]',
        'rule all:\n    input: expand(["results/{run}/metrics.json", "results/{run}/card.json"], run=runs)\n',
        'wildcard_constraints:\n    run="d[0-9]+"\n',
    ]
    for name, (inputs, outputs) in RULES.items():
        text.append(
            f"rule {name}:\n    input: {strings(inputs)}\n    output: {strings(outputs)}\n"
            f'    log: "logs/{{run}}/{name}.log"\n    benchmark: "benchmarks/{{run}}/{name}.jsonl"\n    threads: 4\n'
            f'    resources: mem_mb=8000, runtime=120\n    params: settings="{{}}", script="{name}.py", code="0"\n'
            '    shell: "python {params.script} --settings {params.settings} --out {output} --log-file {log}"\n'
        )
    folder.mkdir()
    (folder / "Snakefile").write_text("\n".join(text))
    for name in ("data.jsonl", "model.json"):
        (folder / name).touch()
    return folder


def processor(command: list[str], folder: Path) -> float:
    """Seconds of the processor of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def side_by_side(commands: dict[str, tuple[list[str], Path]], rounds: int) -> dict[str, float]:
    found: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, (command, folder) in commands.items():
            found[name].append(processor(command, folder))
    for name, seconds in found.items():
        print(f"{name:34} {statistics.median(seconds):6.2f} s ({min(seconds):.2f} to {max(seconds):.2f})", flush=True)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def starts(folder: Path, rounds: int) -> None:
    only = bare(folder / "bare-1", 1)
    side_by_side(
        {
            "importing Snakemake": ([sys.executable, "-c", "import snakemake.cli"], only),
            "dry run, bare Snakefile": ([*SNAKEMAKE, "-n", "results/d0/plan.json"], only),
            "dry run, Moult": ([*SNAKEMAKE, "-n", "results/demo/plan.json"], checkout(folder / "moult-1")),
        },
        rounds,
    )


def dry_run(folder: Path, datasets: int, rounds: int) -> None:
    ours = checkout(folder / "moult")
    many = {f"d{number}": {"source": "config/demo/data/house_format.jsonl"} for number in range(datasets)}
    config = {"model": {"name": "config/demo/base"}, "datasets": {**many, "demo": None}}
    (ours / "many.yaml").write_text(yaml.safe_dump(config))
    found = side_by_side(
        {
            f"{datasets:,} datasets, bare": ([*SNAKEMAKE, "-n"], bare(folder / "bare", datasets)),
            f"{datasets:,} datasets, Moult": ([*SNAKEMAKE, "-n", "--configfile", "many.yaml"], ours),
        },
        rounds,
    )
    floor, all = found.values()
    print(f"Snakemake alone: {floor / all:.0%}")


def demo(folder: Path) -> None:
    """Where the demo's wall-clock time goes: each stage, its imports, and what is left, which is Snakemake's."""
    ours = checkout(folder / "demo")
    begun = time.monotonic()
    variables = environment(ours) | {"PYTHONPROFILEIMPORTTIME": "1"}
    command = [*SNAKEMAKE, "results/demo/metrics.json"]
    subprocess.run(command, cwd=ours, env=variables, check=True, capture_output=True, text=True)
    elapsed = time.monotonic() - begun
    inside = imports = 0.0
    for path in sorted(ours.glob("benchmarks/*/*.jsonl"), key=lambda path: path.stat().st_mtime):
        seconds = json.loads(path.read_text().splitlines()[0])["s"]
        log = ours / "logs" / path.parent.name / f"{path.stem}.log"
        own = sum(map(int, re.findall(r"import time: +(\d+) \|", log.read_text()))) / 1e6
        print(f"| {path.stem} | {seconds:.1f} | {own:.1f} | {own / seconds:.0%} |", flush=True)
        inside, imports = inside + seconds, imports + own
    print(f"| all stages | {inside:.1f} | {imports:.1f} | {imports / inside:.0%} |")
    print(f"| Snakemake | {elapsed - inside:.1f} | | |")
    print(f"imports and Snakemake: {(elapsed - inside + imports) / elapsed:.0%} of {elapsed:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=["starts", "dry-run", "demo"])
    parser.add_argument("--datasets", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if "starts" in args.parts:
            starts(Path(folder), args.rounds)
        if "dry-run" in args.parts:
            dry_run(Path(folder), args.datasets, args.rounds)
        if "demo" in args.parts:
            demo(Path(folder))


if __name__ == "__main__":
    main()
