"""QLoRA: the base quantized, the adapter not; the same bytes however often it is interrupted, on one process and on two."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from finetuning import TORCHRUN, kill_at, settings
from safetensors.torch import load_file
from workflow import ROOT

from moult.files import read_jsonl


def quantized(kind: str = "nf4", **train) -> dict:
    return {**settings(**train), "quantization": kind}


def training_losses(run) -> list[float]:
    return [entry["loss"] for entry in read_jsonl(run.folder / "training_log.jsonl") if "loss" in entry]


@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_quantized_base_trains_and_validation_does_not_change_it(kind, run):
    often, once = run(quantized(kind, eval_steps=2), "often"), run(quantized(kind, eval_steps=15), "once")
    for each in (often, once):
        assert f"base in {kind}, adapter in float32" in each.go().stderr
    weights = load_file(often.folder / "adapter" / "adapter_model.safetensors").values()
    assert all(tensor.dtype == torch.float32 for tensor in weights)
    # Values that bfloat16 does not have: nothing has rounded them on the way.
    assert any((tensor != tensor.bfloat16().float()).any() for tensor in weights)
    assert training_losses(often) == training_losses(once)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        quantized(optim="paged_adamw_8bit"),
        quantized("int8"),
        quantized(gradient_checkpointing=True, packing=True),
        settings(optim="adamw_8bit"),
    ],
    ids=["nf4, paged_adamw_8bit", "int8", "nf4, checkpointed, packed", "8 bits for the optimizer only"],
)
def test_a_killed_run_ends_with_the_same_bytes(config, run):
    whole, killed = run(config, "whole"), run(config, "killed")
    whole.go()
    kill_at(killed, 6, signal.SIGKILL)
    assert "continuing from" in killed.go().stderr
    assert killed.adapter() == whole.adapter()
    assert killed.losses() == whole.losses()


@pytest.mark.slow
def test_two_processes_train_as_one(run):
    # Four of them before the first batch that is not full: several processes fill it up.
    few = {"max_steps": 4, "logging_steps": 1, "eval_steps": 4}
    one = quantized(gradient_accumulation_steps=2, **few)
    two = quantized(gpu=2, gradient_accumulation_steps=1, **few)
    for config in (one, two):  # the processes draw other zeros for dropout
        config["lora"] = {**config["lora"], "lora_dropout": 0.0}
    one, two = run(one, "one"), run(two, "two")
    one.go()
    two.go(launcher=TORCHRUN)
    assert training_losses(two) == pytest.approx(training_losses(one), rel=1e-5)


@pytest.mark.slow
def test_what_needs_no_bitsandbytes_does_not_import_it():
    """It takes a second, in every stage that imports peft."""
    code = (
        "import sys; from moult.model.quantization import bitsandbytes_for\nbitsandbytes_for({settings})\nimport peft\n"
    )
    code += "print(sys.modules.get('bitsandbytes') is not None)"
    for config, imported in (
        ({}, False),
        ({"train": {"optim": "adamw_torch_8bit"}}, False),
        ({"quantization": "nf4"}, True),
    ):
        command = [sys.executable, "-c", code.replace("{settings}", repr(config))]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
        )
        assert (done.stdout.strip(), done.stderr) == (str(imported), ""), config
