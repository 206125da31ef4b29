"""What a stage computes on: the GPU of its own that it loads to, and a GPU that torch cannot use."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import gpus
import pytest
import torch
from tiny import make_model

from moult.errors import HOPELESS, MoultError
from moult.model import device

ROOT = Path(__file__).resolve().parent.parent

SETTINGS = {"dtype": "bfloat16", "attn_implementation": None, "trust_remote_code": False}


@pytest.fixture
def base(tmp_path):
    return str(make_model(tmp_path / "base", kind="qwen3"))


@pytest.mark.parametrize(("rank", "place"), [(None, "cuda:0"), ("0", "cuda:0"), ("3", "cuda:3")])
def test_each_process_loads_the_base_once_and_straight_to_its_own_gpu(rank, place, base, machine):
    """Under DDP it was loaded on the CPU, and therefore in float32, and stayed so on the GPU."""
    gpus.pretend(machine, 4)
    calls = gpus.record_loading(machine)
    if rank:
        machine.setenv("LOCAL_RANK", rank)
    device.load_model(base, device.pick(), SETTINGS)
    assert [(call["device_map"], call["dtype"]) for call in calls] == [({"": place}, torch.bfloat16)]


def test_the_evaluation_spreads_a_model_over_several_gpus(base, machine):
    gpus.pretend(machine, 4)
    calls = gpus.record_loading(machine)
    device.load_model(base, device.pick(3), SETTINGS, gpus=3)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1,2"
    assert [(call["device_map"], call["max_memory"]) for call in calls] == [("balanced", {0: 9000, 1: 9000, 2: 9000})]


def test_too_few_gpus_for_the_evaluation_are_named(machine):
    gpus.pretend(machine, 2)
    with pytest.raises(MoultError, match=r"eval\.gpu \(or train\.gpu, with train\.shard\) needs 3 GPUs .* but 2 are"):
        device.pick(3)


def test_what_does_not_fit_over_the_gpus_is_not_put_elsewhere(base, machine):
    gpus.pretend(machine, 2)
    made = SimpleNamespace(hf_device_map={"model.layers.0": 0, "model.layers.1": "disk"})
    machine.setattr(device, "read_model", lambda *_: made)
    with pytest.raises(
        MoultError, match="does not fit into the memory of 2 GPUs: part of it would be on disk"
    ) as error:
        device.load_model(base, device.pick(2), SETTINGS, gpus=2)
    assert error.value.exit_code == HOPELESS


def test_a_model_on_a_cpu_is_in_float32_and_has_no_hooks(base, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    model = device.load_model(base, "cpu", SETTINGS)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("cpu", torch.float32)}
    assert not hasattr(model, "hf_device_map")


# --- a GPU that torch cannot use ----------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine without a GPU, and nothing that says otherwise."""
    before = dict(os.environ)
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE", "SLURM_JOB_ID", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(device, "_held", [])
    yield monkeypatch
    for lock in device._held:
        lock.close()
    os.environ.clear()
    os.environ.update(before)


def old_driver() -> bool:
    warnings.warn(
        "CUDA initialization: The NVIDIA driver on your system is too old (found version 12040).\nPlease update",
        stacklevel=1,
    )
    return False


@pytest.mark.parametrize(
    ("name", "value"), [("CUDA_VISIBLE_DEVICES", "0"), ("SLURM_JOB_GPUS", "3"), ("SLURM_GPUS_ON_NODE", "1")]
)
def test_a_gpu_that_torch_cannot_use_is_no_silent_cpu(name, value, machine):
    machine.setenv(name, value)
    machine.setattr(torch.cuda, "is_available", old_driver)
    machine.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(MoultError) as raised:
        device.pick()
    said = str(raised.value)
    assert (
        f"there is a GPU ({name} is {value}), but torch cannot use it: CUDA initialization: The NVIDIA driver" in said
    )
    assert "built for CUDA 13.0" in said and "NVIDIA driver" in said and "update the driver" in said
    assert "to compute on the CPU, set ACCELERATE_USE_CPU" in said
    assert raised.value.exit_code == HOPELESS


def test_the_device_file_tells_of_a_gpu_too(machine):
    machine.setattr(device, "Path", lambda path: SimpleNamespace(exists=lambda: path == "/dev/nvidiactl"))
    assert device.sign_of_gpu() == "/dev/nvidiactl exists"


@pytest.mark.parametrize(
    ("name", "value"),
    [("CUDA_VISIBLE_DEVICES", ""), ("CUDA_VISIBLE_DEVICES", "-1"), ("ACCELERATE_USE_CPU", "true")],
)
def test_the_cpu_can_be_asked_for(name, value, machine):
    machine.setenv("SLURM_JOB_GPUS", "0")
    machine.setenv(name, value)
    gpus.pretend(machine, 1)
    assert device.pick() == "cpu"


def test_a_machine_without_a_gpu_computes_on_the_cpu(machine):
    machine.setenv("SLURM_GPUS_ON_NODE", "0")
    assert device.pick() == "cpu"
    machine.setenv("CUDA_VISIBLE_DEVICES", "NoDevFiles")
    assert device.pick() == "cpu"


def test_a_gpu_that_is_too_old_for_torch_is_named(machine):
    gpus.pretend(machine, 1, capability=(7, 0))
    machine.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_100a", "compute_120"])
    with pytest.raises(
        MoultError, match=r"Pretended GPU has compute capability 7\.0, and torch .* needs 7\.5 or higher"
    ):
        device.pick()


def test_too_few_gpus_are_named_before_anything_is_loaded(machine):
    gpus.pretend(machine, 2)
    machine.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(MoultError, match=r"needs 4 GPUs on this machine, but 2 are visible"):
        device.pick()


def test_a_missing_compiler_is_named_before_anything_is_loaded(machine, tmp_path):
    machine.setattr(device.sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "Python.h").touch()
    machine.setattr(device.shutil, "which", lambda name: f"/usr/bin/{name}" if name == "cc" else None)
    machine.delenv("CC", raising=False)
    device.check_compiler()
    machine.setattr(device.shutil, "which", lambda name: None)
    with pytest.raises(MoultError, match="training on a GPU needs a C compiler: Triton"):
        device.check_compiler()
    (tmp_path / "Python.h").unlink()
    with pytest.raises(MoultError, match=r"needs a C compiler and Python's header files \(.*/Python\.h\)"):
        device.check_compiler()


# --- which GPU ----------------------------------------------------------------------------------------------------------

TAKES = """
import os, sys
sys.path[:0] = ["scripts", "tests"]
from pytest import MonkeyPatch
import gpus
gpus.pretend(MonkeyPatch(), int(sys.argv[1]))
from moult.model import device
assert device.pick() == "cuda"
print(os.environ["CUDA_VISIBLE_DEVICES"], device.own_device("cuda"), flush=True)
input()
"""


@pytest.fixture
def stage():
    """`stage(gpus, **variables)` starts a stage that takes a GPU and holds it; returns its GPUs and its process."""
    running = []

    def start(count: int, **variables) -> tuple[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA_", "SLURM_"))}
        # The job's id keeps it apart from stages that run beside these tests.
        environment = {**kept, "SLURM_JOB_ID": f"test-{os.getpid()}", **{name: str(v) for name, v in variables.items()}}
        process = subprocess.Popen(
            [sys.executable, "-c", TAKES, str(count)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        visible, own = process.stdout.readline().split()
        return visible, own

    start.running = running
    yield start
    for process in running:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_stages_beside_each_other_have_different_gpus(stage):
    """With --resources gpu=4, all took the first one."""
    assert [stage(3) for _ in range(3)] == [("0", "cuda:0"), ("1", "cuda:0"), ("2", "cuda:0")]
    stage.running[1].kill()
    stage.running[1].communicate()
    assert stage(3) == ("1", "cuda:0")
    # Another job of Slurm has other GPUs, which have the same numbers there.
    assert stage(3, SLURM_JOB_ID=f"test-{os.getpid()}-2") == ("0", "cuda:0")
    assert stage(2, CUDA_VISIBLE_DEVICES="5,0") == ("5", "cuda:0")
    # More stages than GPUs share one.
    assert stage(3) == ("0", "cuda:0")


@pytest.mark.slow
def test_processes_of_one_run_have_different_gpus_and_see_them_all(stage):
    stage(3)
    visible = [stage(3, LOCAL_WORLD_SIZE=2, LOCAL_RANK=rank) for rank in (0, 1)]
    assert visible == [("1,0,2", "cuda:0"), ("0,2,1", "cuda:1")]


def test_the_allocator_can_extend_its_segments(machine):
    gpus.pretend(machine, 1)
    device.pick()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        machine.delenv("PYTORCH_ALLOC_CONF", raising=False)
        machine.setenv(name, "max_split_size_mb:64")
        device.pick()
        assert os.environ.get("PYTORCH_ALLOC_CONF") in (None, "max_split_size_mb:64")
        machine.delenv(name)
