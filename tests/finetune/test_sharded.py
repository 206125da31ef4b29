"""train.shard: the base split over two processes trains as one process does, and as two that hold it whole."""

import re
import signal

import pytest
from finetuning import TORCHRUN, kill_at, settings

from moult.files import read_jsonl


def config(**train) -> dict:
    """Without dropout, for which each process draws other zeros."""
    made = settings(**{"gradient_accumulation_steps": 1, "gradient_checkpointing": False, **train})
    return {**made, "lora": {**made["lora"], "lora_dropout": 0.0}}


def split(**train) -> dict:
    return config(gpu=2, shard=True, **train)


def logged(run, name: str) -> list[float]:
    return [entry[name] for entry in read_jsonl(run.folder / "training_log.jsonl") if name in entry]


@pytest.mark.slow
def test_a_split_base_trains_as_a_whole_one(run):
    # Steps before the first batch that is not full: several processes fill it up.
    few = {"max_steps": 4, "logging_steps": 1, "eval_steps": 2}
    one = run(config(per_device_train_batch_size=4, **few), "one")
    whole, parts = run(config(gpu=2, **few), "whole"), run(split(**few), "parts")
    one.go()
    whole.go(launcher=TORCHRUN)
    said = parts.go(launcher=TORCHRUN).stderr
    held = int(re.search(r"split over 2 processes \((\d+)% of it in this one\)", said).group(1))
    assert 49 <= held <= 56  # the norms and the adapter are whole
    assert parts.adapter() == whole.adapter()
    for name in ("loss", "eval_loss"):
        assert logged(parts, name) == logged(whole, name)
        assert logged(parts, name) == pytest.approx(logged(one, name), rel=1e-6)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bytes(run):
    settings = split(gradient_checkpointing=True)
    whole, killed = run(settings, "whole"), run(settings, "killed")
    whole.go(launcher=TORCHRUN)
    assert kill_at(killed, 6, signal.SIGTERM, TORCHRUN) == 1
    assert "continuing from" in killed.go(launcher=TORCHRUN).stderr
    assert killed.adapter() == whole.adapter()
    assert killed.losses() == whole.losses()
    names = {path.name for path in max((killed.folder / "state").glob("checkpoint-*")).iterdir()}
    assert "adapter_model.safetensors" in names and not any(
        "model-" in name or name == "model.safetensors" for name in names
    )
