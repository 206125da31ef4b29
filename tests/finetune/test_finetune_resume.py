"""finetune: the same result however often it is interrupted, and never a step from the state of another run."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from finetuning import TORCHRUN, copy_state, kill_at, settings

from moult.files import read_json
from moult.training.checkpoints import checkpoint_folders, seal


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 8])
def test_a_killed_run_ends_with_the_same_bytes(step, run, undisturbed):
    killed = run()
    assert kill_at(killed, step, signal.SIGKILL) == -signal.SIGKILL
    assert not (killed.folder / "adapter").exists()
    done = killed.go()
    assert ("continuing from" in done.stderr) == (step > 3)
    assert killed.adapter() == undisturbed.adapter()
    assert killed.losses() == undisturbed.losses()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_next_attempt_goes_on(number, run, undisturbed):
    stopped = run()
    assert kill_at(stopped, 4, number) == 75
    log = (stopped.folder / "finetune.log").read_text()
    assert "checkpoint saved" in log and "run the same command again to go on" in log
    assert not (stopped.folder / "adapter").exists()
    assert "continuing from" in stopped.go().stderr
    assert stopped.adapter() == undisturbed.adapter()
    assert stopped.losses() == undisturbed.losses()


@pytest.mark.slow
def test_a_signal_to_torchrun_saves_too(run):
    config = settings(gpu=2)
    whole, stopped = run(config, "whole"), run(config, "stopped")
    whole.go(launcher=TORCHRUN)
    assert kill_at(stopped, 4, signal.SIGTERM, TORCHRUN) == 1
    assert "checkpoint saved" in (stopped.folder / "finetune.log").read_text()
    assert "continuing from" in stopped.go(launcher=TORCHRUN).stderr
    assert stopped.adapter() == whole.adapter()


@pytest.mark.slow
def test_packed_runs_resume_to_the_same_bytes_too(run):
    config = settings(packing=True)
    whole, killed = run(config, "whole"), run(config, "killed")
    whole.go()
    kill_at(killed, 4, signal.SIGKILL)
    killed.go()
    assert killed.adapter() == whole.adapter()


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(run, undisturbed):
    damaged = run()
    copy_state(undisturbed, damaged)
    newest = damaged.folder / "state" / "checkpoint-15"
    (newest / "optimizer.pt").write_bytes((newest / "optimizer.pt").read_bytes()[:-100])
    done = damaged.go()
    assert f"{newest} cannot be resumed: optimizer.pt has" in done.stderr
    assert "continuing from" in done.stderr
    assert damaged.adapter() == undisturbed.adapter()


class Evil:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_brings_code_runs_none(name, run, undisturbed):
    """Sealed as if it were ours, in a file that only holds numbers, and in the one that is never opened."""
    attacked = run()
    copy_state(undisturbed, attacked)
    state, mark = attacked.folder / "state", attacked.folder / "code has run"
    oldest, *others = checkpoint_folders(state)
    for folder in others:
        shutil.rmtree(folder)
    torch.save(Evil(mark), oldest / name)
    torch.save(Evil(mark), oldest / "training_args.bin")
    (oldest / "manifest.json").unlink()
    staged = state / "staging" / oldest.name
    staged.parent.mkdir()
    oldest.rename(staged)
    seal(staged, state, read_json(state / "fingerprint.json"))
    done = attacked.go(code=1)
    assert "continuing from" in done.stderr and "Weights only load failed" in done.stderr
    assert not mark.exists()
    torch.load(state / oldest.name / name, weights_only=False)
    assert mark.exists(), "the code is real"


def test_another_learning_rate_never_resumes_the_old_weights(run, undisturbed):
    changed = run(settings(learning_rate=2e-3))
    copy_state(undisturbed, changed)
    done = changed.go()
    assert "settings.train.learning_rate" in done.stderr and "moved to old-1" in done.stderr
    fresh = run(settings(learning_rate=2e-3), "fresh")
    fresh.go()
    assert changed.adapter() == fresh.adapter() != undisturbed.adapter()


def test_what_does_not_change_the_weights_does_not_start_anew(run, undisturbed):
    other = run(settings(logging_steps=5, save_total_limit=4))
    copy_state(undisturbed, other)
    assert "nothing to train" in other.go().stderr


def test_resume_from_a_checkpoint_of_another_run_says_what_differs(run, undisturbed):
    changed = run(settings(learning_rate=2e-3))
    checkpoint = next((undisturbed.folder / "state").glob("checkpoint-*"))
    done = changed.go("--resume-from", str(checkpoint), code=1)
    assert "it belongs to another run (differs in: settings.train.learning_rate)" in done.stderr
    assert "choose a checkpoint with the same settings" in done.stderr


def test_resume_from_a_checkpoint_of_its_own_with_other_settings_moves_nothing(run, undisturbed):
    changed = run(settings(learning_rate=2e-3))
    copy_state(undisturbed, changed)
    checkpoint = next((changed.folder / "state").glob("checkpoint-*"))
    done = changed.go("--resume-from", str(checkpoint), code=1)
    assert "it belongs to another run (differs in: settings.train.learning_rate)" in done.stderr
    assert checkpoint.is_dir() and "moved" not in done.stderr


def test_resume_from_a_checkpoint_elsewhere(run, undisturbed):
    again = run()
    checkpoint = min((undisturbed.folder / "state").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    done = again.go("--resume-from", str(checkpoint))
    assert f"continuing from {again.folder / 'state' / checkpoint.name}" in done.stderr
    assert again.adapter() == undisturbed.adapter()


@pytest.mark.slow
def test_two_trainers_never_share_a_folder(run):
    from moult.training.checkpoints import locked

    taken = run()
    with locked(taken.folder / "state"):
        second = subprocess.Popen(taken.command(), stderr=subprocess.PIPE, text=True)
        waiting = second.stderr.readline()
        assert "waiting" in waiting and f"process {os.getpid()}" in waiting
        assert not (taken.folder / "state" / "fingerprint.json").exists()
    assert second.wait(timeout=120) == 0
    second.stderr.close()
