"""A checkout to run the workflow in, and Snakemake in it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import forked
import yaml

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("config", "profiles", "rules", "scripts")
# In the environment of the demo; nothing that looks like a real one.
SECRETS = {
    "HF_TOKEN": "a-token-of-the-tests-1",
    "MY_PASSWORD": 'a "password" of the tests',
    "SIGNING_KEY": "a-key-of-the-tests",
}
# The pages of the demo, which are looked at in a browser.
PAGES = ["results/demo/tokens/preview.html", "results/demo/report.html"]


def checkout(folder: Path) -> Path:
    """The parts of the repository that a run needs, as a user would have them."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Snakefile", folder)
    shutil.copy(ROOT / "slurm", folder, follow_symlinks=False)
    return folder


def environment(folder: Path) -> dict[str, str]:
    """Without the width of the terminal that the tests were started in, which xdist passes on: tables depend on it."""
    kept = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    return {**kept, "XDG_CACHE_HOME": str(folder / ".cache")}


def measured(folder: Path, run: str = "demo") -> dict:
    """What metrics.json says, without how fast the training was."""
    metrics = json.loads((folder / "results" / run / "metrics.json").read_text())
    del metrics["throughput"]
    return metrics


def snakemake(folder: Path, *arguments: str, code: int | None = 0, cores: int | None = 1, timeout: float = 600) -> str:
    """Run Snakemake in `folder`; returns what it prints on both streams. One that only looks runs in a fork."""
    command = ["snakemake", *(("--cores", str(cores)) if cores else ()), *arguments]
    if {"-n", "--dag", "--rulegraph"} & set(arguments):
        found, output = forked.run(command, folder, environment(folder))
    else:
        how = {"cwd": folder, "env": environment(folder), "capture_output": True, "text": True, "timeout": timeout}
        done = subprocess.run([sys.executable, "-m", *command], **how)
        found, output = done.returncode, done.stdout + done.stderr
    assert code in (None, found), output[-4000:]
    return output


def hear_sigint() -> None:
    """For `preexec_fn`: a shell ignores SIGINT for what runs in its background, and children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def planned(folder: Path, *arguments: str) -> set[str]:
    """The rules that a dry run would run."""
    output = snakemake(folder, "-n", *arguments)
    if "Nothing to be done" in output:
        return set()
    table = output[output.index("Job stats:") :].split("total")[0]
    return set(re.findall(r"^(\w+) +\d+$", table, re.MULTILINE))


def edit_config(folder: Path, change) -> None:
    path = folder / "config" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    change(config)
    path.write_text(yaml.safe_dump(config, sort_keys=False))


def set_key(*keys, value):
    def change(config):
        for key in keys[:-1]:
            config = config.setdefault(key, {})
        config[keys[-1]] = value

    return lambda folder: edit_config(folder, change)


def write_rows(folder: Path, rows: list, name: str = "rows.jsonl") -> None:
    (folder / name).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
