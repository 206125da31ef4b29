"""Two processes (gloo, on the CPU): the trial leaves no trace; the end of one ends both, with the first reason."""

import json
import time
from pathlib import Path

import gpus
import pytest
from finetuning import TORCHRUN, Run, settings

from moult.run.attempt import Attempt
from moult.workflow.failures import failures_since

pytestmark = pytest.mark.slow

TWO = {"gpu": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}


def go(run: Run, hook: str = "", code: int = 0, **arguments):
    """Run the stage in two processes of torchrun, with a hook of gpus.py in them."""
    return run.go(code=code, launcher=(*TORCHRUN, gpus.__file__, json.dumps([hook, arguments])))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base, tokens):
    made = Run(tmp_path_factory.mktemp("two") / "run", settings(**TWO), base, tokens)
    go(made)
    return made


def test_the_trial_leaves_no_trace(run, whole):
    without = run(settings(**TWO))
    go(without, "without_trial")
    assert without.adapter() == whole.adapter() and without.losses() == whole.losses()


def test_what_does_not_fit_on_one_gpu_is_decided_for_all(run, whole):
    """Rank 1 alone has too little memory: both take the smaller batch, and neither waits for the other for ever."""
    auto = run(settings(gpu=2, per_device_train_batch_size="auto", gradient_accumulation_steps=2))
    assert "a batch of 1 fits: 2 of them make a step" in go(auto, "small_memory", tokens=24, rank=1).stderr
    same = run(settings(gpu=2, per_device_train_batch_size=1, gradient_accumulation_steps=2), "same")
    go(same)
    assert auto.adapter() == same.adapter()


INSTANTS = {
    "before the group is there": ("moult.training.ranks:together", 1, 1),
    "while loading": ("moult.model.device:read_model", 1, 1),
    "in the trial": ("moult.training.first_batch:try_batch", 1, 1),
    "in a step": ("moult.training.trainer:Finetuner.compute_loss", 4, 1),
    "in a validation": ("moult.training.trainer:likelihood", 1, 1),
    "while a checkpoint is saved": ("moult.training.trainer:seal", 1, 0),
}


@pytest.mark.parametrize("instant", INSTANTS)
def test_the_death_of_one_process_ends_all_within_30_seconds(instant, run, tmp_path, whole):
    target, call, rank = INSTANTS[instant]
    killed, mark = run(settings(**TWO)), tmp_path / "died"
    began = time.time()
    done = go(killed, "die", code=1, target=target, call=call, rank=rank, mark=str(mark))
    took = time.time() - mark.stat().st_mtime
    assert took < 30, done.stderr[-3000:]
    (failure,) = failures_since(began, killed.folder)
    if instant == "before the group is there":
        assert failure.cause == "killed"
    else:
        other = (
            "" if rank == 0 else f"rank {rank}: ended without an error message (it was killed, usually out of memory)"
        )
        assert other in done.stderr and "usually out of memory" in failure.what
    go(killed)
    assert killed.adapter() == whole.adapter()


def test_a_wanted_stop_saves_a_checkpoint(run, whole):
    stopped = run(settings(**TWO))
    said = go(
        stopped, "stop_all", code=1, target="moult.training.trainer:Finetuner.compute_loss", call=4, rank=0
    ).stderr
    assert "stopped by SIGTERM at step 3 of 15; checkpoint saved" in said, said
    assert "continuing from" in go(stopped).stderr
    assert stopped.adapter() == whole.adapter()


def test_the_error_of_one_process_is_that_of_all(run):
    stopped = run(settings(**TWO))
    began = time.time()
    said = go(stopped, "run_out", code=1, target="moult.training.trainer:Finetuner.compute_loss", call=4, rank=1).stderr
    assert "finetune failed: out of memory while training step" in said and "(rank 1)" in said, said
    (failure,) = failures_since(began, stopped.folder)
    assert failure.cause == "failed" and "(rank 1): CUDA out of memory" in failure.what
    assert "lower train.per_device_train_batch_size" in failure.fix
    records = [Attempt.read(path) for path in (stopped.folder / "attempts").glob("*.json")]
    assert {(record.rank, record.outcome, record.again) for record in records} == {
        (0, "failed", False),
        (1, "failed", False),
    }


def test_an_error_of_the_main_process_reaches_the_others(run, whole):
    stopped = run(settings(**TWO))
    stopped.go(
        "--resume-from",
        str(stopped.folder / "nothing"),
        code=1,
        launcher=(*TORCHRUN, gpus.__file__, json.dumps(["", {}])),
    )
    log = (Path(stopped.folder) / "finetune.log").read_text()
    assert "nothing: no such folder" in log
