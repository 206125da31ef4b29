"""What snakemake-executor-plugin-slurm (2.8.0) leaves open: jobs that outlive their Snakemake, jobs that Slurm gives up, and
why it refuses a job of several stages.

rules/cluster.smk calls this before the first job. It speaks to Slurm through its commands only.
"""

import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

# The plugin names its jobs so, behind a prefix of the user's if there is one.
_NAME = re.compile(r"(.+_)?[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}")
# States in which the plugin waits for a requeue that never comes: where PreemptMode is CANCEL, and with slurm-requeue where
# Slurm does not put the job back. (Without slurm-requeue it sends a new one for a lost node.)
_GIVEN_UP = {True: ("PREEMPTED", "NODE_FAIL"), False: ("PREEMPTED",)}
# A job that Slurm has put back and could not start stays in the queue for ever, if nobody releases it.
_HELD = "launch failed requeued held"
ENDED = (*_GIVEN_UP[True], "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "OUT_OF_MEMORY", "TIMEOUT")


class Job(NamedTuple):
    id: str
    state: str  # in full: RUNNING, PENDING, ...
    reason: str  # why it waits
    what: str  # the plugin's comment: rule_<rule or group>_...


def jobs_of(folder: Path) -> list[Job]:
    """This user's jobs that a Snakemake in `folder` has submitted, ended ones too while Slurm remembers them (MinJobAge).

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
    """End the jobs that a Snakemake left in `folder` when it was killed, and wait until they are gone.

    A new Snakemake does not know them, and would start the same stages beside them (plugin issue 109). A finetune gets SIGTERM,
    saves at the end of its step, and goes on in its new job. After `patience` seconds Slurm kills what is left.
    """
    ids = [job.id for job in jobs]
    warn(
        f"Stopping {len(ids)} Slurm jobs of an earlier Snakemake in this folder: {', '.join(ids)}. They have "
        f"{patience / 60:.0f} minutes to save what they have; Ctrl-C does not wait"
    )
    _call("scancel", "--state=PENDING", *ids)
    _call("scancel", "--signal=TERM", *ids)
    began, killed = time.monotonic(), False
    while any(job.id in ids and job.state not in ENDED for job in jobs_of(folder)):
        if not killed and time.monotonic() - began > patience:
            killed = True
            warn(f"They still run after {patience:,.0f} seconds: killing them")
            _call("scancel", *ids)
        time.sleep(every)


# What sbatch is told of a job's resources (the plugin's submit_string.py has all of it).
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
    """What Slurm would refuse, of the resources of these jobs, each with its reason, which Snakemake (9.27) does not show for
    jobs of several stages. Nothing is submitted. What a plan will say is left out. Some of it Slurm may take all the same, and
    let it wait: for nodes that are down."""
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
    """From now on, put back into the queue what Slurm has given up; the plugin then sees it waiting, as it expects.

    `requeue` is the plugin's setting. Runs in a thread until this process ends, or what is returned is called.
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
                outcome = (
                    f"cannot be put back ({fault}): stop Snakemake and start it again"
                    if fault
                    else "put back into the queue"
                )
                warn(f"Slurm job {job.id} ({job.what}) is {state}, and Slurm leaves it at that: {outcome}")
                if fault:
                    known.add(job.id)

    threading.Thread(target=work, daemon=True).start()
    return over.set


def _call(*command: str) -> str:
    """What was wrong, or nothing."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return answer.stderr.strip() if answer.returncode else ""
