"""moult.workflow.slurm against a Slurm of three scripts; tests/integration/test_slurm.py has the real one."""

import os
import subprocess
import time

import pytest

from moult.workflow.slurm import Job, jobs_of, refusals, stop, watch

UUID = "c352fdd3-6442-42db-9870-eeead72ebd20"


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A folder with `queue` (what squeue prints), `calls` (what was asked of the others); `after` is run by each of them."""
    commands = tmp_path / "bin"
    commands.mkdir()
    scripts = {
        "squeue": f"cat {tmp_path}/queue",
        "scancel": f'echo scancel "$@" >> {tmp_path}/calls; . {tmp_path}/after',
        "scontrol": f'echo scontrol "$@" >> {tmp_path}/calls; . {tmp_path}/after',
    }
    for name, script in scripts.items():
        (commands / name).write_text(f"#!/bin/sh\n{script}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(commands), prepend=os.pathsep)
    for name in ("queue", "calls", "after"):
        (tmp_path / name).touch()
    return tmp_path


def line(id, state, where, name=UUID, what="rule_finetune_wildcards_demo", reason="None"):
    return f"{id}|{state}|{reason}|{name}|{where}|{what}\n"


def test_jobs_are_those_of_a_snakemake_in_the_folder(slurm):
    queue = [
        line(1, "RUNNING", slurm),
        line(2, "RUNNING", slurm / "elsewhere"),
        line(3, "RUNNING", slurm, name="bash"),
        line(4, "COMPLETED", slurm, name=f"prefix_{UUID}", what="rule_a|b"),
        line(5, "RUNNING", slurm, what="(null)"),
    ]
    (slurm / "queue").write_text("".join(queue))
    assert jobs_of(slurm) == [
        Job("1", "RUNNING", "None", "rule_finetune_wildcards_demo"),
        Job("4", "COMPLETED", "None", "rule_a|b"),
    ]


def test_a_slurm_that_does_not_answer_is_no_empty_queue(slurm):
    (slurm / "bin/squeue").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(subprocess.CalledProcessError):
        jobs_of(slurm)


def test_left_over_jobs_get_a_signal_and_are_waited_for(slurm):
    (slurm / "queue").write_text(line(1, "RUNNING", slurm) + line(2, "PENDING", slurm) + line(3, "FAILED", slurm))
    (slurm / "after").write_text(f'case "$*" in *TERM*) : > {slurm}/queue;; esac\n')
    said = []
    stop(jobs_of(slurm)[:2], slurm, said.append, every=0.01)
    assert len(said) == 1
    assert said[0].startswith(
        "Stopping 2 Slurm jobs of an earlier Snakemake in this folder: 1, 2. They have 15 minutes"
    )
    assert (slurm / "calls").read_text() == "scancel --state=PENDING 1 2\nscancel --signal=TERM 1 2\n"


def test_what_ignores_the_signal_is_killed(slurm):
    (slurm / "queue").write_text(line(1, "RUNNING", slurm))
    (slurm / "after").write_text(f'case "$*" in 1) : > {slurm}/queue;; esac\n')
    said = []
    stop(jobs_of(slurm), slurm, said.append, patience=0.1, every=0.01)
    assert (slurm / "calls").read_text().splitlines()[-1] == "scancel 1" and "killing them" in said[1]


def test_what_slurm_would_refuse_is_said_once_with_its_reason(slurm):
    (slurm / "bin/sbatch").write_text(
        f"#!/bin/sh\necho $* >> {slurm}/calls\n"
        'case "$*" in *=nope*) echo "allocation failure: Invalid partition name specified" >&2; exit 1;; esac\n'
        "echo sbatch: Job 7 to start at 2026-11-23T00:00:00 >&2\n"
    )
    (slurm / "bin/sbatch").chmod(0o755)
    fine = {"slurm_partition": "gpu", "runtime": 30, "mem_mb": 6002, "gpu": 1, "gpu_model": "h100", "tmpdir": "/tmp"}
    planned = {"slurm_partition": "nope", "mem_mb": "<TBD>", "runtime": "<TBD>"}
    assert refusals([fine, planned, planned]) == ["  --partition=nope: Invalid partition name specified"]
    assert sorted((slurm / "calls").read_text().splitlines()) == [
        "--test-only --partition=gpu --time=30 --mem=6002 --gpus=h100:1 --wrap=true",
        "--test-only --partition=nope --wrap=true",
    ]


@pytest.mark.parametrize(
    ("state", "reason", "said", "call"),
    [
        ("PREEMPTED", "None", "PREEMPTED", "scontrol requeue 2"),
        ("NODE_FAIL", "None", "NODE_FAIL", "scontrol requeue 2"),
        ("PENDING", "launch failed requeued held", "held (launch failed requeued held)", "scontrol release 2"),
    ],
)
def test_what_slurm_has_given_up_is_put_back(state, reason, said, call, slurm):
    old = line(1, state, slurm, reason=reason)  # of an earlier Snakemake
    (slurm / "queue").write_text(old)
    heard = []
    over = watch(slurm, True, heard.append, every=0.01)
    (slurm / "after").write_text(f"printf '%s' '{line(2, 'PENDING', slurm)}' > {slurm}/queue\n")
    others = line(3, "CANCELLED", slurm) + line(4, "PENDING", slurm, reason="JobHeldUser")
    (slurm / "queue").write_text(old + line(2, state, slurm, reason=reason) + others)
    wait_for(lambda: heard)
    over()
    assert heard == [f"Slurm job 2 (rule_finetune_wildcards_demo) is {said}, and Slurm does not restart it: requeued"]
    assert (slurm / "calls").read_text() == f"{call}\n"


def test_what_cannot_be_put_back_is_said_once(slurm):
    said = []
    over = watch(slurm, True, said.append, every=0.01)
    (slurm / "after").write_text("echo Job not allowed >&2; exit 1\n")
    (slurm / "queue").write_text(line(2, "PREEMPTED", slurm))
    wait_for(lambda: said)
    time.sleep(0.2)
    over()
    assert len(said) == 1 and "it cannot be requeued (Job not allowed): stop Snakemake and start it again" in said[0]


def test_a_lost_node_is_the_plugins_business_without_requeueing(slurm):
    over = watch(slurm, False, pytest.fail, every=0.01)
    (slurm / "queue").write_text(line(2, "NODE_FAIL", slurm))
    time.sleep(0.2)
    over()
    assert (slurm / "calls").read_text() == ""


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
