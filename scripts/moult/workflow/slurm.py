"""What snakemake-executor-plugin-slurm (2.8.0) does not do: stop jobs of a killed Snakemake, requeue jobs that Slurm gives up,
and say why Slurm refuses a job of several stages.

rules/cluster.smk calls this before the first job. It uses only Slurm's commands.
"""

import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

# The names of the plugin's jobs, with an optional prefix.
_NAME = re.compile(r"(.+_)?[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}")
# States in which the plugin waits for a requeue that never happens: if PreemptMode is CANCEL, and, with slurm-requeue, if Slurm
# does not requeue the job. (Without slurm-requeue the plugin submits a new job after a lost node.)
_GIVEN_UP = {True: ("PREEMPTED", "NODE_FAIL"), False: ("PREEMPTED",)}
# A requeued job that Slurm could not start stays in the queue until somebody releases it.
_HELD = "launch failed requeued held"
ENDED = (*_GIVEN_UP[True], "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "OUT_OF_MEMORY", "TIMEOUT")


class Job(NamedTuple):
    id: str
    state: str  # in full: RUNNING, PENDING, ...
    reason: str  # why it waits
    what: str  # the plugin's comment: rule_<rule or group>_...


def jobs_of(folder: Path) -> list[Job]:
    """This user's jobs that a Snakemake in `folder` has submitted, including ended jobs that Slurm still remembers (MinJobAge).

    Raises OSError or subprocess.SubprocessError if Slurm does not answer.
    """
    command = ["squeue", "--me", "--states=all", "--noheader", "--format=%i|%T|%r|%j|%Z|%k"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    jobs = []
    for line in answer.splitlines():
        id, state, reason, name, where, what = line.split("|", 5)
        if where == str(folder) and _NAME.fullmatch(name) and what.startswith("rule_"):
            jobs.append(Job(id, state, reason, what))
    return jobs


def stop(jobs: list[Job], folder: Path, warn: Callable[[str], None], patience: float = 900, every: float = 2) -> None:
    """Stop the jobs of a killed Snakemake in `folder`, and wait until they have ended.

    A new Snakemake does not know them and would start the same stages again (plugin issue 109). finetune gets SIGTERM, saves at
    the end of its step, and continues in its new job. After `patience` seconds Slurm kills the remaining jobs.
    """
    ids = [job.id for job in jobs]
    warn(
        f"Stopping {len(ids)} Slurm jobs of an earlier Snakemake in this folder: {', '.join(ids)}. They have "
        f"{patience / 60:.0f} minutes to save their state; press Ctrl-C to stop waiting"
    )
    _call("scancel", "--state=PENDING", *ids)
    _call("scancel", "--signal=TERM", *ids)
    began, killed = time.monotonic(), False
    while any(job.id in ids and job.state not in ENDED for job in jobs_of(folder)):
        if not killed and time.monotonic() - began > patience:
            killed = True
            warn(f"They are still running after {patience:,.0f} seconds: killing them")
            _call("scancel", *ids)
        time.sleep(every)


# sbatch options for the resources of a job (the plugin's submit_string.py has all of them).
_FLAGS = {
    "slurm_partition": "--partition",
    "slurm_account": "--account",
    "qos": "--qos",
    "constraint": "--constraint",
    "runtime": "--time",
    "mem_mb": "--mem",
    "nodes": "--nodes",
    "gres": "--gres",
}


def refusals(resources: Iterable[Mapping]) -> list[str]:
    """Requests of these jobs that Slurm would refuse, each with the reason. (Snakemake 9.27 does not show it for jobs of several
    stages.) Nothing is submitted. Resources that depend on a plan are left out. Slurm may still accept some of these jobs and
    let them wait, for example for nodes that are down."""
    found = []
    for flags in sorted({_flags(job) for job in resources}):
        fault = _call("sbatch", "--test-only", *flags, "--wrap=true")
        reason = re.sub(r"^(sbatch|allocation failure): (error: )?", "", fault.splitlines()[-1]) if fault else ""
        if reason:
            found.append(f"  {' '.join(flags)}: {reason}")
    return found


def _flags(resources: Mapping) -> tuple[str, ...]:
    asked = [f"{flag}={resources[name]}" for name, flag in _FLAGS.items() if isinstance(resources.get(name), int | str)]
    gpus = resources.get("gpu")
    if gpus:
        model = resources.get("gpu_model")
        asked.append(f"--gpus={f'{model}:' if model else ''}{gpus}")
    return tuple(flag for flag in asked if "TBD" not in flag)


def watch(folder: Path, requeue: bool, warn: Callable[[str], None], every: float = 20) -> Callable[[], None]:
    """From now on, requeue jobs that Slurm has given up. The plugin then sees them waiting, as it expects.

    `requeue` is the setting of the plugin. Runs in a thread until this process ends, or until the returned function is called.
    """
    known = {job.id for job in jobs_of(folder)}
    over = threading.Event()

    def work() -> None:
        while not over.wait(every):
            try:
                jobs = [job for job in jobs_of(folder) if job.id not in known]
            except (OSError, subprocess.SubprocessError):
                continue  # a controller that restarts
            for job in jobs:
                if job.state in _GIVEN_UP[requeue]:
                    state, fault = job.state, _call("scontrol", "requeue", job.id)
                elif job.reason.replace("_", " ") == _HELD:  # with underscores in newer versions
                    state, fault = f"held ({job.reason})", _call("scontrol", "release", job.id)
                else:
                    continue
                outcome = f"it cannot be requeued ({fault}): stop Snakemake and start it again" if fault else "requeued"
                warn(f"Slurm job {job.id} ({job.what}) is {state}, and Slurm does not restart it: {outcome}")
                if fault:
                    known.add(job.id)

    threading.Thread(target=work, daemon=True).start()
    return over.set


def _call(*command: str) -> str:
    """Run a command. Returns its stderr on failure, "" on success."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return answer.stderr.strip() if answer.returncode else ""
