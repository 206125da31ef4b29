"""One Snakemake at work in a folder: its stages, its processes, the changes of its files."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from workflow import hear_sigint

TARGET = "results/demo/metrics.json"
# By the script that a process runs; "snakemake" is the time before the first one starts.
STAGES = {
    "fetch_model": "inspect_model",
    "prepare": "prepare",
    "encode": "encode",
    "plan": "plan",
    "finetune": "finetune",
    "merge": "merge",
    "evaluate_model": "evaluate",
    "score": "score",
}


class Command:
    """Snakemake at work in `folder`, in its own process group."""

    def __init__(self, folder: Path):
        self.folder = folder
        command = [sys.executable, "-m", "snakemake", "--cores", "1", "--configfile", "torture.yaml", "--", TARGET]
        environment = {**os.environ, "XDG_CACHE_HOME": str(folder / ".cache")}
        with (folder / "output.txt").open("ab") as output:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
                preexec_fn=hear_sigint,
            )
        self.started = time.time()
        self.looked = 0.0
        self.stage, self.stage_process, self.stage_started = "snakemake", None, self.started

    def look(self) -> str:
        """The stage that runs, or the last one that did."""
        if time.time() - self.looked > 0.05:
            self.looked = time.time()
            for child in children_of(self.process.pid):
                name, started = stage_of(child)
                if name and child != self.stage_process:
                    self.stage, self.stage_process, self.stage_started = name, child, started
        return self.stage

    def send(self, victim: str, number: signal.Signals) -> None:
        if victim == "both":
            os.killpg(self.process.pid, number)
        elif victim == "stage" and self.stage_process and self.stage_process.is_running():
            self.stage_process.send_signal(number)
        else:
            self.process.send_signal(number)


def children_of(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children()
    except psutil.NoSuchProcess:
        return []


def say(folder: Path, text: str) -> None:
    """Write into Snakemake's output what is done to it."""
    with (folder / "output.txt").open("a") as output:
        output.write(f"\n*** {text}\n")


def stage_of(process: psutil.Process) -> tuple[str, float]:
    try:
        found = re.search(r"scripts/(\w+)\.py", " ".join(process.cmdline()[:3]))
        return STAGES.get(found[1], "") if found else "", process.create_time()
    except psutil.Error:
        return "", 0.0


def processes_in(folder: Path) -> list[psutil.Process]:
    """Whatever works in `folder`, whoever has started it."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()) == folder:
                found.append(process)
        except psutil.Error:
            continue
    return found


class Changes:
    """How often files have changed since this was made, as far as can be seen by looking often."""

    def __init__(self, folder: Path):
        self.roots = [folder / name for name in ("results", "logs", "benchmarks", ".snakemake")]
        self.seen, self.count = self._look(), 0

    def update(self) -> int:
        found = self._look()
        self.count += found != self.seen
        self.seen = found
        return self.count

    def _look(self) -> dict[str, tuple[int, int]]:
        found = {}
        pending = list(map(str, self.roots))
        while pending:
            try:
                for entry in os.scandir(pending.pop()):
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    status = entry.stat(follow_symlinks=False)
                    found[entry.path] = (status.st_mtime_ns, status.st_size)
            except OSError:
                continue
        return found
