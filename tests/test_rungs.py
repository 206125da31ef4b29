"""Successive halving: what a sweep's rungs make, what does not go with them, and a whole sweep on the demo."""

import json
import re

import pytest
import yaml
from workflow import ROOT, checkout, snakemake

from moult.workflow.config import ConfigError, load_schema, resolve
from moult.workflow.rungs import MEASURED
from moult.workflow.sweeps import asked_for, sweep_settings

SCHEMA = load_schema(str(ROOT / "config"))
TRAIN = {"max_steps": 60, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5, "eval_steps": 10}


def config(train: dict | None = None, runs: dict | None = None, **sweep) -> dict:
    made = {
        "dataset": "a",
        "over": {"train.learning_rate": [1e-4, 1e-3]},
        "rungs": [20, 40],
        "train": {**TRAIN, **(train or {})},
        **sweep,
    }
    return {
        "model": {"name": "./m"},
        "datasets": {"a": {"source": "a.jsonl"}},
        "sweeps": {"lr": made},
        "runs": runs or {},
    }


def resolved(*arguments, **sweep) -> dict:
    return resolve(config(*arguments, **sweep), SCHEMA)


def problems(*arguments, **sweep) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        resolved(*arguments, **sweep)
    return raised.value.problems


def test_each_run_goes_on_from_its_rung_before():
    runs = resolved(seeds=[3, 4], eval={"answer_rows": 7})["runs"]
    names = [f"lr-learning_rate1e-4{rung}" for rung in ("-rung20", "-rung40", "")]
    assert [runs[name].get("start_from") for name in names] == [None, *names[:2]]
    assert [runs[name].get("stop_after") for name in names] == [20, 40, None]
    assert [runs[name]["eval"]["answer_rows"] for name in names] == [0, 0, 7]
    assert all(runs[names[0]]["eval"][key] == value for key, value in MEASURED.items())
    seeded = [f"{name}-seed4" for name in names]
    assert [runs[name].get("start_from") for name in seeded] == [None, *seeded[:2]]
    assert {runs[name]["seed"] for name in seeded} == {4}


def test_the_workflow_reads_its_own_config_again():
    once = resolved(seeds=[0, 1])
    assert resolve(once, SCHEMA) == once
    assert asked_for(once) == ["a"]
    assert sweep_settings(once, "lr")["rungs"] == [20, 40]
    assert list(sweep_settings(once, "lr")["runs"]) == ["lr-learning_rate1e-4", "lr-learning_rate1e-3"]


@pytest.mark.parametrize(
    ("train", "rungs", "said"),
    [
        ({}, [40, 20], "each step must be larger than the one before"),
        ({}, [20, 20], "each step must be larger than the one before"),
        ({}, [20, 60], "they end before the training does; set train.max_steps to more than 60"),
        ({"max_steps": -1}, [20], "they end before the training does; set train.max_steps to more than 20"),
        ({"lr_scheduler_type": "cosine"}, [20], "train.lr_scheduler_type cosine falls towards the last step"),
        (
            {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 30}},
            [20, 40],
            "the learning rate falls from step 30 on; compare at steps before",
        ),
        ({"early_stopping_patience": 2}, [20], "train.early_stopping_patience ends runs at other steps"),
        ({}, [20, 25], "make 25 a multiple of 10, the steps between validations"),
        ({"eval_steps": 0.25}, [20, 45], "make 20 a multiple of 15, the steps between validations"),
        ({"eval_strategy": "epoch", "save_strategy": "epoch"}, [20], "set train.eval_strategy: steps"),
    ],
)
def test_what_rungs_do_not_go_with(train, rungs, said):
    found = problems(train, rungs=rungs)
    assert any(problem.startswith("sweeps.lr.rungs: ") and said in problem for problem in found)


def test_a_schedule_that_falls_after_the_last_rung_is_fine():
    decay = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 20}}
    assert "lr-learning_rate1e-4-rung40" in resolved(decay)["runs"]
    assert resolved({"eval_strategy": "no", "load_best_model_at_end": False}, rungs=[7])["runs"]


@pytest.mark.parametrize(
    ("first", "then", "said"),
    [
        ({"stop_after": 20}, {"start_from": "x"}, "no run is named x"),
        ({}, {"start_from": "one"}, "one has no stop_after before the end of two"),
        ({"stop_after": 20}, {"start_from": "one", "stop_after": 20}, "one has no stop_after before the end of two"),
        ({"stop_after": 20}, {"start_from": "one", "lora": {"r": 4}}, "one has another lora; make them the same"),
        ({"stop_after": 20}, {"start_from": "one", "seed": 4}, "one has another seed; make them the same"),
        (
            {"stop_after": 7},
            {"start_from": "one"},
            "a run validates where it stops; make 7 a multiple of 10, the steps between validations",
        ),
    ],
)
def test_what_a_run_cannot_go_on_from(first, then, said):
    made = config()
    del made["sweeps"]
    made["runs"] = {name: {"dataset": "a", "train": TRAIN, **own} for name, own in (("one", first), ("two", then))}
    with pytest.raises(ConfigError) as raised:
        resolve(made, SCHEMA)
    assert raised.value.problems == [f"runs.two.start_from: {said}"]


@pytest.mark.slow
def test_a_sweep_drops_what_is_clearly_worse_and_trains_no_step_twice(tmp_path):
    folder = checkout(tmp_path)
    demo = yaml.safe_load((folder / "config/config.yaml").read_text())["runs"]["demo"]
    sweep = config(
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 30, "logging_steps": 5},
        over={"train.learning_rate": [1e-6, 3e-3]},
        rungs=[10, 20],
        dataset="demo",
        model=demo["model"],
        eval={"answer_rows": 2, "forgetting": False, "row_expect": {"json": True}},
    )["sweeps"]
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"sweeps": sweep}))
    command = ["results/sweeps/lr.html", "--configfile", "sweep.yaml"]
    snakemake(folder, *command, cores=2)
    results = folder / "results"
    found = json.loads((results / "sweeps/lr.json").read_text())
    assert found["winner"] == "lr-learning_rate3e-3" and [place["run"] for place in found["places"]] == [
        found["winner"]
    ]
    assert [(rung["step"], [place["run"] for place in rung["dropped"]]) for rung in found["rungs"]] == [
        (10, ["lr-learning_rate1e-6"]),
        (20, []),
    ]
    assert not (results / "lr-learning_rate1e-6-rung20").exists()
    # The first run by name keeps the measurement of the base, which all share.
    assert [path.name for path in (results / "lr-learning_rate1e-6").iterdir()] == ["base"]
    log = [json.loads(line) for line in (results / "lr-learning_rate3e-3/training_log.jsonl").read_text().splitlines()]
    assert [row["resumed_from"] for row in log if "resumed_from" in row] == [10, 20]
    page = (results / "sweeps/lr.html").read_text()
    assert "each other run was clearly worse at a rung before" in page and "Dropped on the way" in page
    assert re.search(r'class="number">10</td><th scope="row" class="whole">lr-learning_rate1e-6<', page)
    assert "Nothing to be done" in snakemake(folder, "-n", *command)
