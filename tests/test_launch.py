"""What the rules ask of a machine, and the command that they start: golden lines for 1, 4 and 2 x 4 GPUs."""

import re

import pytest
from workflow import checkout, snakemake

TORCHRUN = "--shutdown-timeout ${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}"

# Name: (train section, threads of the rule, its resources, the command before the script, threads of a process)
LAUNCHES = {
    "1": ({"gpu": 1}, 4, "gpu=1, slurm_extra=--signal=TERM@300, nodes=1", "python", 4),
    "4": (
        {"gpu": 4},
        16,
        "gpu=4, slurm_extra=--signal=TERM@300, nodes=1",
        f"torchrun --standalone --nproc-per-node 4 {TORCHRUN}",
        4,
    ),
    "2 x 4": (
        {"gpu": 8, "nodes": 2},
        16,
        "gpu=8, slurm_extra=--signal=TERM@300, nodes=2, gres=gpu:4, mpi=srun, tasks=2, tasks_per_gpu=0",
        "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=16 --kill-on-bad-exit=1 sh -c 'exec torchrun --nnodes=2 "
        f"--nproc-per-node=4 {TORCHRUN} --rdzv-backend=c10d --rdzv-id=$SLURM_JOB_ID "
        '--rdzv-endpoint=$SLURM_LAUNCH_NODE_IPADDR:$((20000 + SLURM_JOB_ID % 10000)) "$@"\' finetune',
        4,
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkout(tmp_path_factory.mktemp("launch") / "checkout")


def block(output: str, rule: str) -> dict[str, str]:
    """What a dry run with -p tells of a rule's job."""
    text = output[output.index(f"rule {rule}:") :].split("rule ", 2)[1]
    found = dict(re.findall(r"^    (\w+): (.*)$", text, re.MULTILINE))
    return {**found, "command": text.split("Shell command:")[1].strip()}


@pytest.mark.parametrize("gpus", LAUNCHES)
def test_finetune_asks_for_its_processes_and_their_cpus(gpus, folder):
    train, threads, resources, launch, own = LAUNCHES[gpus]
    section = ", ".join(f"{key}: {value}" for key, value in train.items())
    job = block(
        snakemake(folder, "-n", "-p", "results/demo/adapter.json", "--config", f"train={{{section}}}", cores=64),
        "finetune",
    )
    assert job["threads"] == str(threads)
    asked = [part for part in job["resources"].split(", ") if not part.startswith(("tmpdir", "mem", "runtime"))]
    assert ", ".join(asked) == resources
    before, _, after = job["command"].partition(" scripts/finetune.py ")
    assert before == launch
    assert f"--threads {own} " in after


def test_on_few_cores_the_processes_share_them(folder):
    output = snakemake(folder, "-n", "-p", "results/demo/adapter.json", "--config", "train={gpu: 4}", cores=2)
    assert "--threads 1 " in block(output, "finetune")["command"]


def test_evaluate_asks_for_memory_by_the_size_of_the_weights(folder):
    """It asked for 16 GB, whatever the model."""
    import json

    manifest = folder / "results" / "models" / "big.json"
    manifest.parent.mkdir(parents=True, exist_ok=True)
    weights = folder / "big"
    weights.mkdir()
    with (weights / "model.safetensors").open("wb") as file:
        file.truncate(28_000_000_000)  # 14 B in bfloat16; a file of holes
    manifest.write_text(json.dumps({"folder": str(weights), "files": {"model.safetensors": "", "config.json": ""}}))
    script = (
        'include: "rules/cluster.smk"\n'
        'print("asked", [sized(None, type("Input", (), {"model": "results/models/big.json"}), n) for n in (1, 2, 3)])\n'
    )
    (folder / "Sized").write_text(script)
    output = snakemake(folder, "-n", "-s", "Sized", code=None)
    assert "asked [36000, 54000, 72000]" in output, output


def test_prepare_asks_for_memory_by_the_size_of_its_files(folder):
    sizes = {"a.jsonl": 3_000_000_000, "b.jsonl.gz": 200_000_000, "c.parquet": 100_000_000}
    for name, size in sizes.items():
        with (folder / name).open("wb") as file:
            file.truncate(size)
    script = (
        'include: "rules/cluster.smk"\n'
        f'print("asked", [growing_with_input(1000, 1)(None, {list(sizes)}, n) for n in (1, 2, 3)])\n'
    )
    (folder / "Grown").write_text(script)
    assert "asked [5500, 8250, 11000]" in snakemake(folder, "-n", "-s", "Grown", code=None)


def test_a_model_that_is_yet_to_be_fetched_is_no_error(folder):
    output = snakemake(folder, "-n", "-p", "results/demo/metrics.json", "--config", "model={name: some/model}")
    assert "mem_mb=<TBD>" in block(output, "evaluate_tuned")["resources"]
