"""Early stopping: where it ends, that it ends there after any interruption, and that all processes end there."""

import json
import random
import signal
from types import SimpleNamespace

import pytest
from finetuning import TORCHRUN, Run, copy_state, kill_at, settings

from moult.files import read_json, read_jsonl
from moult.training.checkpoints import checkpoint_folders
from moult.training.early_stopping import EarlyStopping, without_gain

# The tiny model learns random tokens by heart: its validation loss rises from a certain step on.
EARLY = {
    "early_stopping_patience": 2,
    "eval_steps": 2,
    "logging_steps": 1,
    "num_train_epochs": 6,
    "lr_scheduler_type": "constant",
}


def losses_of(*losses: float) -> list[dict]:
    """A log with these validations, and other lines between them."""
    return [entry for loss in losses for entry in ({"loss": 1.0}, {"eval_loss": loss})]


@pytest.mark.parametrize(
    ("losses", "threshold", "count"),
    [
        ((), 0.0, 0),
        ((3.0,), 0.0, 0),
        ((3.0, 2.0, 2.5), 0.0, 1),
        ((3.0, 2.0, 2.0), 0.0, 1),
        ((3.0, 2.0, 2.5, 1.9), 0.0, 0),
        ((3.0, 2.95, 2.9, 2.85), 0.1, 3),  # each is the lowest, and none by more than the threshold
        ((3.0, 2.0, 1.95, 1.8), 0.1, 0),
    ],
)
def test_validations_since_the_last_gain(losses, threshold, count):
    assert without_gain(losses_of(*losses), threshold) == count


def test_it_ends_where_that_of_transformers_does():
    """Their callback, with the best as Trainer keeps it, on random losses."""
    from transformers import EarlyStoppingCallback

    generator, ended = random.Random(0), 0
    for _ in range(500):
        patience, threshold = generator.randint(1, 4), generator.choice([0.0, 0.3])
        theirs, ours = EarlyStoppingCallback(patience, threshold), EarlyStopping(patience, threshold)
        args = SimpleNamespace(metric_for_best_model="eval_loss", greater_is_better=False)
        state, control = SimpleNamespace(best_metric=None), SimpleNamespace(should_training_stop=False)
        history: list[dict] = []
        for _ in range(12):
            loss = round(generator.gauss(2.0, 0.5), 1)
            history += losses_of(loss)
            theirs.on_evaluate(args, state, control, {"eval_loss": loss})
            state.best_metric = min(loss, state.best_metric or loss)
            assert ours.ends(history) == control.should_training_stop
            if control.should_training_stop:
                ended += 1
                break
    assert 100 < ended < 500
    assert not EarlyStopping(None, 0.0).ends(history)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, base, tokens):
    made = Run(tmp_path_factory.mktemp("stopped") / "run", settings(**EARLY), base, tokens)
    made.go()
    return made


def end_of(run: Run) -> int:
    return read_json(run.folder / "adapter.json")["ended"]["step"]


def test_it_stops_and_the_best_is_published(stopped):
    summary = read_json(stopped.folder / "adapter.json")
    history = list(read_jsonl(stopped.folder / "training_log.jsonl"))
    validations = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    end = end_of(stopped)
    assert summary["ended"] == {"step": end, "because": "early stopping"} and end < summary["steps"] == 30
    assert summary["step"] == min(validations, key=validations.get) == end - 4
    assert summary["validation_loss"] == {"published": min(validations.values()), "last": validations[end]}
    assert history[-1]["step"] == end and history[-1]["stopped_early"] is True
    assert checkpoint_folders(stopped.folder / "state")[-1].name == f"checkpoint-{end}"


def test_a_stopped_run_trains_no_step_more(stopped):
    before = stopped.adapter(), stopped.losses()
    assert "nothing to train" in stopped.go().stderr
    assert (stopped.adapter(), stopped.losses()) == before and end_of(stopped) < 30


@pytest.mark.slow
def test_enough_patience_trains_to_the_last_step(run):
    patient = run(settings(**{**EARLY, "early_stopping_patience": 99, "num_train_epochs": 3}))
    patient.go()
    assert read_json(patient.folder / "adapter.json")["ended"] == {"step": 15, "because": "last step"}
    assert not any("stopped_early" in line for line in read_jsonl(patient.folder / "training_log.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "number"),
    # SIGTERM lets the step end that follows the line of the log: one later, that is the one at which training ends.
    [(1, signal.SIGKILL), (2, signal.SIGKILL), (3, signal.SIGKILL), (2, signal.SIGTERM), (3, signal.SIGTERM)],
)
def test_a_run_that_was_interrupted_between_validations_stops_at_the_same_step(before, number, run, stopped):
    """After the first validation without a gain too: what was counted before the interruption counts."""
    killed = run(settings(**EARLY))
    assert kill_at(killed, end_of(stopped) - before, number) == (75 if number == signal.SIGTERM else -number)
    assert not (killed.folder / "adapter").exists()
    assert "continuing from" in killed.go().stderr
    assert killed.adapter() == stopped.adapter() and killed.losses() == stopped.losses()
    assert end_of(killed) == end_of(stopped)


@pytest.mark.slow
def test_a_run_whose_last_checkpoint_is_lost_stops_there_again(run, stopped):
    again = run(settings(**EARLY))
    copy_state(stopped, again)
    newest = checkpoint_folders(again.folder / "state")[-1]
    (newest / "optimizer.pt").unlink()
    assert "continuing from" in again.go().stderr
    assert again.adapter() == stopped.adapter() and again.losses() == stopped.losses()


@pytest.mark.slow
def test_another_patience_starts_anew_as_any_other_setting_does(run, stopped):
    changed = run(settings(**{**EARLY, "early_stopping_patience": 3}))
    copy_state(stopped, changed)
    assert "settings.train.early_stopping_patience" in changed.go().stderr
    assert end_of(changed) > end_of(stopped)


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step(run, tmp_path):
    config = settings(**EARLY, gpu=2)
    whole, killed = run(config, "whole"), run(config, "killed")
    whole.go(launcher=TORCHRUN)
    assert end_of(whole) < read_json(whole.folder / "adapter.json")["steps"]
    kill_at(killed, end_of(whole) - 3, signal.SIGTERM, TORCHRUN)
    assert "continuing from" in killed.go(launcher=TORCHRUN).stderr
    assert killed.adapter() == whole.adapter() and json.dumps(killed.losses()) == json.dumps(whole.losses())
