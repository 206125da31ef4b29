"""What a stage computes on: the GPU of its own that it loads to, and a GPU that torch cannot use."""

import gpus
import pytest
import torch
from tiny import make_model

from moult.model import device

SETTINGS = {"dtype": "bfloat16", "attn_implementation": None, "trust_remote_code": False}


@pytest.fixture
def base(tmp_path):
    return str(make_model(tmp_path / "base", kind="qwen3"))


@pytest.mark.parametrize(("rank", "place"), [(None, "cuda:0"), ("0", "cuda:0"), ("3", "cuda:3")])
def test_each_process_loads_the_base_once_and_straight_to_its_own_gpu(rank, place, base, monkeypatch):
    """Under DDP it was loaded on the CPU, and therefore in float32, and stayed so on the GPU."""
    gpus.pretend(monkeypatch, 4)
    calls = gpus.record_loading(monkeypatch)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank:
        monkeypatch.setenv("LOCAL_RANK", rank)
    device.load_model(base, device.pick(), SETTINGS)
    assert [(call["device_map"], call["dtype"]) for call in calls] == [({"": place}, torch.bfloat16)]


def test_a_model_on_a_cpu_is_in_float32_and_has_no_hooks(base, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    model = device.load_model(base, "cpu", SETTINGS)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("cpu", torch.float32)}
    assert not hasattr(model, "hf_device_map")
