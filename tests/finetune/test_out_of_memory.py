"""finetune, and what does not fit into the memory: the trial before the first step, and running out of it anywhere."""

import functools
import json
import signal

import gpus
import pytest
from finetuning import Run, settings
from forked import send_at

from moult.errors import HOPELESS
from moult.files import read_json

BATCH = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}


def hook(name: str, **arguments):
    return functools.partial(getattr(gpus, name), **arguments)


def records(run: Run) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((run.folder / "attempts").glob("*.json"))]


# --- the trial --------------------------------------------------------------------------------------------------------


def test_the_trial_leaves_no_trace(run, undisturbed):
    """With dropout, accumulation, and validations: the bytes, losses, norms and token counts of a run without it."""
    without = run()
    without.go(before=hook("without_trial"))
    assert without.adapter() == undisturbed.adapter()
    assert without.losses() == undisturbed.losses()


def test_checkpointing_is_turned_on_only_where_the_longest_batch_needs_it(run):
    """24 tokens are the longest row: a batch of 4 has 96."""
    tight = run(settings(**BATCH))
    done = tight.go(before=hook("small_memory", tokens=50))
    assert "turning gradient checkpointing on" in done.stderr
    roomy = run(settings(**BATCH), "roomy")
    assert "checkpointing" not in roomy.go(before=hook("small_memory", tokens=96)).stderr
    # Dropout is recomputed as it was.
    assert tight.adapter() == roomy.adapter() and tight.losses() == roomy.losses()


@pytest.mark.parametrize(
    ("checkpointing", "fitting", "even"),
    [("auto", 10, ", even with gradient checkpointing"), (True, 10, ", even"), (False, 50, ": CUDA out of memory")],
)
def test_a_batch_that_cannot_fit_is_refused_before_the_first_step(checkpointing, fitting, even, run):
    stopped = run(settings(**BATCH, gradient_checkpointing=checkpointing))
    said = stopped.go(code=HOPELESS, before=hook("small_memory", tokens=fitting)).stderr
    assert f"the longest batch (4 sequences of up to 24 tokens) does not fit into the memory of cpu{even}" in said
    assert "lower train.per_device_train_batch_size (raise gradient_accumulation_steps by as much)" in said
    assert "Traceback" not in said and not list((stopped.folder / "state").glob("checkpoint-*"))
    assert [(record["outcome"], record["again"]) for record in records(stopped)] == [("failed", False)]


def test_checkpointing_that_is_asked_for_is_on_in_the_trial(run):
    """It was tried without, and refused wherever only the checkpointed batch fits."""
    asked = run(settings(**BATCH, gradient_checkpointing=True, max_steps=2))
    asked.go(before=hook("small_memory", tokens=50))


# --- per_device_train_batch_size: auto ----------------------------------------------------------------------------------

AUTO = {"per_device_train_batch_size": "auto", "gradient_accumulation_steps": 4}


def test_the_largest_batch_that_fits_is_found_and_the_step_stays_the_same(run, undisturbed):
    """2 rows of 24 tokens fit. The undisturbed run has 2 x 2."""
    auto = run(settings(**AUTO))
    done = auto.go(before=hook("small_memory", tokens=48))
    assert "a batch of 2 fits: 2 of them make a step" in done.stderr
    assert auto.adapter() == undisturbed.adapter() and auto.losses() == undisturbed.losses()
    summary = read_json(auto.folder / "adapter.json")
    assert summary["batch"] == 2 and summary["steps"] == 15


@pytest.mark.slow
def test_a_smaller_batch_comes_before_checkpointing(run):
    auto = run(settings(**AUTO, max_steps=2))
    said = auto.go(before=hook("small_memory", tokens=24)).stderr
    assert "a batch of 1 fits" in said and "checkpointing on" not in said
    tighter = run(settings(**AUTO, max_steps=2), "tighter")
    said = tighter.go(before=hook("small_memory", tokens=12)).stderr
    assert "checkpointing on" in said and "a batch of 2 fits" in said


@pytest.mark.slow
def test_a_resumed_run_has_the_batch_that_was_found(run, undisturbed):
    """There is more memory now; another batch would round otherwise."""
    killed = run(settings(**AUTO))
    killed.go(code=-signal.SIGKILL, before=small_and_killed)
    assert "continuing from" in killed.go().stderr
    assert killed.adapter() == undisturbed.adapter()


def small_and_killed() -> None:
    gpus.small_memory(48)
    send_at("moult.training.watch:Watch.on_step_end", signal.SIGKILL, 8)


# --- out of memory ------------------------------------------------------------------------------------------------------

PLACES = {
    "while loading": (
        "moult.model.device:read_model",
        1,
        "out of memory while loading {base} to cpu: CUDA out of memory",
    ),
    "in a step": (
        "moult.training.trainer:Finetuner.compute_loss",
        6,
        "out of memory while training step 3 (a batch of ",
    ),
    "in the optimizer": ("torch.optim:AdamW.step", 2, "out of memory while training: CUDA out of memory"),
    "in a validation": (
        "moult.training.trainer:likelihood",
        2,
        "measuring the validation loss at step 10 (rows of up to 24 tokens): CUDA out of memory. Tried to allocate 2.00 GiB.",
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_running_out_of_memory_is_one_message_and_not_tried_again(place, run, base):
    target, call, message = PLACES[place]
    stopped = run()
    said = stopped.go(code=HOPELESS, before=hook("run_out", target=target, call=call)).stderr
    assert message.format(base=base) in said, said
    assert "what to do:" in said and "Of the allocated memory" not in said and "Traceback" not in said
    assert [record["again"] for record in records(stopped)] == [False]


def test_the_machines_own_memory_is_tried_again_with_more(run, base):
    from moult.errors import MoultError
    from moult.model.device import enough_memory

    with pytest.raises(MoultError, match="out of memory while loading") as raised, enough_memory("loading", "lower it"):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 8 bytes")
    assert raised.value.exit_code == 1
    with pytest.raises(RuntimeError, match="another"), enough_memory("loading", "lower it"):
        raise RuntimeError("another error")
