"""A run that stops after some steps, and another that goes on from there: the same bytes as one run of all steps."""

import shutil

import pytest
from finetuning import settings

from moult.files import read_json, read_jsonl


def test_a_run_goes_on_from_the_bytes_of_the_one_before(run, undisturbed):
    """In two stops, of which the second is not at a step that is saved by itself."""
    rungs = [run({**settings(), "stop_after": stop}, f"rung{stop}") for stop in (5, 10, None)]
    for before, rung in zip([None, *rungs], rungs, strict=False):
        rung.go(*(("--start-from", str(before.folder / "state")) if before else ()))
    assert rungs[2].adapter() == undisturbed.adapter()
    for rung, stop in zip(rungs, (5, 10, 15), strict=True):
        summary = read_json(rung.folder / "adapter.json")
        assert summary["steps"] == 15 and summary["ended"]["step"] == stop
        assert summary["ended"]["because"] == ("last step" if stop == 15 else "stop_after")
        log = list(read_jsonl(rung.folder / "training_log.jsonl"))
        assert [row["resumed_from"] for row in log if "resumed_from" in row] == [5, 10][: stop // 5 - 1]
        assert [row["step"] for row in log if "eval_loss" in row] == list(range(5, stop + 1, 5))


def test_a_stopped_run_trains_no_step_more(run):
    stopped = run({**settings(), "stop_after": 5})
    stopped.go()
    before = stopped.adapter()
    assert "nothing to train" in stopped.go().stderr and stopped.adapter() == before


@pytest.mark.slow
@pytest.mark.parametrize("how", ["gone", "other"])
def test_without_the_bytes_before_it_starts_anew(how, run, undisturbed):
    """The state of the run before may have been deleted, or be that of other settings: never a wrong result."""
    before = run({**settings(**({"learning_rate": 1e-3} if how == "other" else {})), "stop_after": 5})
    before.go()
    if how == "gone":
        shutil.rmtree(before.folder / "state")
    last = run(name="last")
    said = last.go("--start-from", str(before.folder / "state")).stderr
    assert "has no checkpoint of this run: training starts at the first step" in said
    assert last.adapter() == undisturbed.adapter()
