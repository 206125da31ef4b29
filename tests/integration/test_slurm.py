"""The workflow on a real Slurm: `MOULT_TEST_SLURM=1 pytest tests/integration/test_slurm.py`.

Only with that variable, because jobs are submitted to whatever cluster `sbatch` speaks to; it must be one for tests, of several
nodes with (fake) GPUs, where this user may set nodes down. .ci/run starts one.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from workflow import checkout, environment, measured, snakemake

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("slurm"),  # they cancel all jobs of this user, and set nodes down
    pytest.mark.skipif(
        os.environ.get("MOULT_TEST_SLURM") != "1" or shutil.which("sbatch") is None,
        reason="needs a Slurm for tests, and MOULT_TEST_SLURM=1",
    ),
]


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    """The cluster's GPUs are none, and a stage that is given one and cannot use it stops."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield


# The profile's waits are for real clusters.
QUICK = ("--profile", "slurm", "--latency-wait", "5", "--slurm-init-seconds-before-status-checks", "3")
TARGET = "results/demo/metrics.json"
# Sums differ in their last digits with the number of threads, and where Snakemake has one core there is one.
ONE_THREAD = ("--set-threads", "finetune=1")
LONG = "runs: {demo: {train: {max_steps: 1600, eval_steps: 200, save_steps: 50, logging_steps: 50}}}"


def call(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def jobs(folder: Path, what: str, form: str = "%i", states: str = "PENDING,RUNNING") -> list[str]:
    """The folder's jobs in these states, or `form` of them (squeue's format)."""
    queue = call("squeue", "--me", "-h", f"-t{states}", f"-o%Z|%k|{form}")
    lines = [line.split("|", 2) for line in queue.splitlines()]
    return [line[2] for line in lines if line[0] == str(folder) and what in line[1]]


def steps_done(folder: Path) -> int:
    """Steps of the newest checkpoint."""
    return max(
        (int(path.name.split("-")[1]) for path in folder.glob("results/demo/trainer_state/checkpoint-*")), default=0
    )


def wait_for(condition, seconds=180):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.3)
    return found


@pytest.fixture
def started():
    """Start Snakemake in the background: `started(folder, *arguments)`; what is left of it is ended with the test."""
    running = []

    def start(folder: Path, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "snakemake", *QUICK, *arguments]
        output = (folder / "snakemake.out").open("a")
        running.append(subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, env=environment(folder)))
        return running[-1]

    yield start
    for process in running:
        process.kill()
    call("scancel", "--me")


def adapter(folder: Path) -> str:
    return json.loads((folder / "results/demo/adapter.json").read_text())["adapter_sha256"]


def test_the_demo_on_the_cluster_is_the_demo_here(demo, tmp_path):
    folder = checkout(tmp_path)
    others = [f"{stage}=1" for stage in ("merge", "evaluate_base", "evaluate_tuned")]
    output = snakemake(folder, TARGET, *QUICK, *ONE_THREAD, *others, cores=None)
    assert adapter(folder) == adapter(demo)
    here, there = measured(demo), measured(folder)
    assert {**here, "provenance": None} == {**there, "provenance": None}
    # Ten stages: one here, three jobs of the small ones and of the measurement, two of their own.
    submitted = re.findall(r"submitted with SLURM jobid (\d+)", output)
    assert len(submitted) == 5
    asked = {}
    for job in submitted:
        facts = call("scontrol", "show", "job", "--oneliner", job)
        what = re.search(r"Comment=rule_([a-z]+)", facts)[1]
        gpus = re.search(r"TresPerJob=\S*gpu:(\d+)", facts)
        minutes, memory = re.search(r"TimeLimit=(\S+)", facts)[1], re.search(r"MinMemoryNode=(\S+)", facts)[1]
        asked[what] = (int(gpus[1]) if gpus else 0, minutes, memory)
    plan = json.loads((folder / "results/demo/plan.json").read_text())["job"]
    assert plan == {"mem_mb": 6002, "runtime": 31}
    assert asked["finetune"] == (1, "00:31:00", "6002M")
    assert asked["data"][0] == asked["tokens"][0] == 0 and asked["evaluate"][0] == 1 and asked["measure"][0] == 1
    assert "Nothing to be done" in snakemake(folder, *QUICK, TARGET, cores=None)
    assert "Nothing to be done" in snakemake(folder, TARGET)


def test_a_finetune_survives_what_a_cluster_does_to_it(tmp_path, started):
    """Its time limit, a cancelled attempt, preemption either way, a dead node, and the death of Snakemake itself."""
    undisturbed, folder = checkout(tmp_path / "undisturbed"), checkout(tmp_path / "disturbed")
    for place in (undisturbed, folder):
        (place / "long.yaml").write_text(LONG)
    goal = ("results/demo/adapter.json", "--configfile", "long.yaml", *ONE_THREAD)
    snakemake(undisturbed, *goal)

    partition = ("--set-resources", "finetune:slurm_partition=scavenge")
    # Far too short; and it is warned 40 seconds before.
    process = started(folder, *goal, *partition, "finetune:runtime=1", "finetune:slurm_extra='--signal=TERM@40'")

    def further(after: str) -> str:
        """Wait until a job has brought it further, and return that job."""
        job = wait_for(lambda: jobs(folder, "finetune", states="RUNNING"))[0]
        before = steps_done(folder)
        wait_for(lambda: steps_done(folder) > before or not jobs(folder, "finetune", states="RUNNING"))
        assert process.poll() is None, f"ended after {after}: {said()[-3000:]}"
        return job if jobs(folder, "finetune", states="RUNNING") == [job] else further(after)

    def said() -> str:
        return (folder / "snakemake.out").read_text()

    job = further("nothing")
    wait_for(lambda: jobs(folder, "finetune") not in ([], [job]))  # its time is over, and another goes on

    further("its time limit")
    process.kill()
    process.wait()
    left = jobs(folder, "finetune")
    process = started(folder, *goal, *partition, "--retries", "1")
    wait_for(lambda: f"Stopping 1 Slurm jobs of an earlier Snakemake in this folder: {left[0]}" in said())

    job = further("the death of Snakemake")
    call("scancel", job)
    wait_for(lambda: jobs(folder, "finetune") not in ([], [job]))

    # All else Slurm or Moult requeues: it does not use up the attempt that is left.
    job = further("scancel")
    call("scontrol", "requeue", job)
    go_on(job)

    job = further("a requeue")
    node = jobs(folder, "finetune", "%N")[0]
    call("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    call(
        "scontrol", "update", f"nodename={node}", "state=drain", "reason=test"
    )  # its daemon lives, and would bring it back
    kill_processes(job)
    go_on(job)

    further("the death of its node")
    call("scontrol", "update", f"nodename={node}", "state=resume")
    crowd = ("--partition=high", "--nodes=3", "--exclusive", "--time=5", f"--chdir={tmp_path}", "--wrap=sleep 8")
    crowd = call("sbatch", "--parsable", *crowd).strip()
    job = wait_for(lambda: re.search(r"Slurm job (\d+) .* is PREEMPTED, .*: requeued", said()))[1]
    call("scancel", crowd)
    go_on(job)

    assert wait_for(lambda: process.poll() is not None, 400) and process.returncode == 0
    assert adapter(folder) == adapter(undisturbed)
    log = [json.loads(line) for line in (folder / "results/demo/training_log.jsonl").read_text().splitlines()]
    steps = [entry["step"] for entry in log if "loss" in entry]
    assert steps == sorted(set(steps)) and steps[-1] == 1600


def kill_processes(job: str) -> None:
    """All that the job has on its node, Slurm's own included: a node that is only set down would let them live."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            ours = f"SLURM_JOB_ID={job}\0" in (folder / "environ").read_text(errors="replace")
            if ours or f"slurmstepd: [{job}." in (folder / "cmdline").read_text():
                os.kill(int(folder.name), signal.SIGKILL)
        except OSError:
            continue


def go_on(job: str) -> None:
    """Slurm lets a requeued job wait for two minutes."""
    wait_for(lambda: "PENDING" in call("squeue", "-h", "-o%T", "-j", job))
    call("scontrol", "update", f"jobid={job}", "StartTime=now")


def test_what_slurm_refuses_is_told_with_its_reason(tmp_path):
    """First, and last. Snakemake (9.27) has no word of it for a job of several stages."""
    folder = checkout(tmp_path)
    refused = ("--default-resources", "slurm_partition=nope", "--retries", "1")
    output = snakemake(folder, *QUICK, TARGET, *refused, code=1, cores=None)
    assert output.count("--partition=nope --time=120 --mem=8000: Invalid partition name specified") == 2
    assert output.index("Slurm refuses the resources that some jobs request:") < output.index(
        "Error in group data-demo"
    )
    assert output.rindex("Slurm refuses the resources that some jobs request:") > output.rindex(
        "Error in group data-demo"
    )


def test_two_nodes_train_as_one(demo, tmp_path):
    """The processes of a run on several nodes, started by srun, against as many on one machine."""
    folders = {}
    for nodes in (1, 2):
        folders[nodes] = shutil.copytree(demo, tmp_path / f"on-{nodes}", copy_function=shutil.copy2, symlinks=True)
        train = f"{{gpu: 2, nodes: {nodes}, max_steps: 20, per_device_train_batch_size: 4}}"
        (folders[nodes] / "two.yaml").write_text(f"runs: {{demo: {{train: {train}}}}}")
    goal = ("results/demo/adapter.json", "--configfile", "two.yaml")
    snakemake(folders[1], *goal)
    output = snakemake(folders[2], *QUICK, *goal, *ONE_THREAD, cores=None)
    job = re.search(r"submitted with SLURM jobid (\d+) \(log: \S*rule_finetune", output)[1]
    assert "NumNodes=2 " in call("scontrol", "show", "job", job)
    assert "finetune.log.rank1" in {path.name for path in folders[2].glob("logs/demo/*")}
    assert adapter(folders[1]) == adapter(folders[2]) != adapter(demo)


def test_several_nodes_need_slurm(tmp_path):
    folder = checkout(tmp_path)
    (folder / "two.yaml").write_text("runs: {demo: {train: {gpu: 2, nodes: 2}}}")
    goal = ("results/demo/adapter.json", "--configfile", "two.yaml")
    assert "train.nodes is 2: several nodes need --profile slurm" in snakemake(folder, *goal, code=1)
    command = snakemake(folder, *QUICK, "-n", "-p", *goal, cores=None)
    assert "srun --nodes=2 --ntasks=2" in command and "--nnodes=2 --nproc-per-node=1 --shutdown-timeout ${" in command


@pytest.mark.skipif(not shutil.which("apptainer"), reason="Apptainer is not installed")
def test_containers_on_the_cluster(folder):
    """What a container sees is worked out on the node where it runs."""
    kept = "--slurm-keep-successful-logs"
    snakemake(folder, "--use-singularity", *QUICK, kept, "results/demo/plan.json", cores=None)
    logs = [path.read_text() for path in (folder / "logs/slurm").rglob("*.log")]
    assert sum(text.count("Activating singularity image") for text in logs) == 3  # prepare, encode, plan
    assert json.loads((folder / "results/demo/plan.json").read_text())["steps"]["total"] == 200
