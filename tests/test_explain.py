"""Which stages would run again, and why, in words."""

import base64
import fcntl
import json
from pathlib import Path

import forked
import pytest
from workflow import checkout, environment, set_key

from moult.workflow.explain import Record, Stage, changes, explanation, own_reasons

CODE = "0123456789abcdef"


def record(settings=None, code: str = CODE, command: str = "python x.py", inputs=("a",), others=()) -> Record:
    """As Snakemake keeps it."""
    params = [json.dumps(settings or {"x": 1}, sort_keys=True), code, *others]
    return Record(tuple(sorted(map(repr, params))), command, tuple(inputs))


@pytest.mark.parametrize(
    "old, new, told",
    [
        ({"a": 1}, {"a": 1}, []),
        ({"train": {"lr": 2e-4, "r": 8}}, {"train": {"lr": 1e-4, "r": 8}}, ["train.lr 0.0002 -> 0.0001"]),
        ({"a": None, "b": "x"}, {"a": True, "b": "y"}, ["a null -> true", "b x -> y"]),
        ({"a": 1}, {"b": {"c": 2}}, ["a 1 -> (not there)", 'b (not there) -> {"c": 2}']),
        ({"a": [1, 2]}, {"a": [2, 1]}, ["a [1, 2] -> [2, 1]"]),
        ({"a": []}, {"a": [{"id": "x"}]}, ['a [] -> [{"id": "x"}]']),
        ({"a": ""}, {"a": "one\ntwo"}, ['a "" -> one two']),
        ({"a": "x" * 100}, {"a": 1}, [f"a {'x' * 59}… -> 1"]),
        (
            {"eval": {"prompts": [{"id": "p", "prompt": "1"}, {"id": "q", "prompt": "2"}]}},
            {"eval": {"prompts": [{"id": "p", "prompt": "3"}, {"id": "r", "prompt": "2"}]}},
            [
                "eval.prompts.p.prompt 1 -> 3",
                "eval.prompts no longer has q",
                "eval.prompts has r, which is new",
            ],
        ),
        ({"p": [{"id": "p"}, {"id": "q"}]}, {"p": [{"id": "q"}, {"id": "p"}]}, ["p has another order"]),
    ],
)
def test_what_differs_in_settings(old, new, told):
    assert list(changes("", old, new)) == told


@pytest.mark.parametrize(
    "before, now, changed, told",
    [
        ({}, {}, [], []),
        ({"settings": {"x": 1}}, {"settings": {"x": 2}}, [], ["x 1 -> 2"]),
        ({}, {"code": "f" * 16}, [], ["its code or its container image has changed"]),
        ({}, {"command": "python y.py"}, [], ["its rule has changed"]),
        ({"inputs": ("a", "b")}, {"inputs": ("a", "c", "d")}, [], ["it now reads c, d", "it no longer reads b"]),
        ({"others": (["1"],)}, {"others": (["2"],)}, [], ["its inputs have changed"]),
        ({"others": (["1"],)}, {"others": (["2"],)}, ["rows.jsonl"], ["rows.jsonl has changed"]),
    ],
)
def test_what_a_job_would_do_differently(before, now, changed, told):
    assert own_reasons(record(**before), record(**now), changed) == told


def test_runs_in_which_all_is_fresh_share_a_line():
    stale = [Stage("prepare"), Stage("encode", ("x 1 -> 2", "its rule has changed")), Stage("plan", ("after encode",))]
    fresh = [Stage("prepare")]
    assert explanation({"a": fresh, "b": stale, "c": fresh}).splitlines() == [
        "b",
        "  encode  x 1 -> 2; its rule has changed",
        "  plan    after encode",
        "  fresh: prepare",
        "all is fresh: a, c",
    ]


def test_of_a_long_line_each_reason_gets_a_line():
    reasons = ("a" * 60, "b" * 60, "after encode")
    assert explanation({"x": [Stage("plan", reasons)]}).splitlines() == [
        "x",
        f"  plan  {'a' * 60}",
        f"        {'b' * 60}",
        "        after encode",
    ]


# --- the whole --------------------------------------------------------------------------------------------------------

METRICS = "results/demo/metrics.json"


def explain(folder: Path, *arguments: str, code: int = 0) -> list[str]:
    """Its lines, after Snakemake's own about the profile."""
    found, output = forked.run(["scripts/tools/explain.py", *arguments], folder, environment(folder))
    assert found == code, output
    return [line for line in output.splitlines() if not line.startswith("Using ")]


def add(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def everything(folder: Path) -> dict[str, tuple[int, int]]:
    """Times and sizes of all files that a run depends on or Snakemake remembers."""
    files = [path for name in ("results", ".snakemake") for path in (folder / name).rglob("*") if path.is_file()]
    # Every Snakemake writes its machine into that one (rules/lock.smk).
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in files if path.name != "moult.lock"}


def test_before_the_first_run(tmp_path):
    lines = explain(checkout(tmp_path), METRICS)
    assert lines[0] == "demo"
    assert {line.split("  ")[-1].strip() for line in lines[1:]} == {"not made yet"}
    assert [line.split()[0] for line in lines[1:]][:2] == ["inspect_model", "prepare"]
    assert not (tmp_path / "results").exists()


def test_nothing_is_edited(again):
    before = everything(again)
    assert explain(again, METRICS) == ["all is fresh: demo"]
    assert everything(again) == before


@pytest.mark.slow
def test_edits_are_told_where_they_matter(again):
    set_key("runs", "demo", "train", "learning_rate", value=1e-3)(again)
    after = [
        "  merge           after finetune",
        "  evaluate_tuned  after merge",
        "  score           after evaluate_tuned, finetune, merge",
    ]
    assert explain(again, METRICS) == [
        "demo",
        "  finetune        train.learning_rate 0.003 -> 0.001",
        *after,
        "  fresh: inspect_model, prepare, contamination, encode, evaluate_base, plan",
    ]
    # A stage that comes after others is asked for reasons of its own, too.
    add(again / "config/demo/data/house_format.jsonl", '{"prompt": "Is it so?", "completion": "It is."}\n')
    add(again / "scripts/encode.py", "# an edit\n")
    lines = explain(again, METRICS)
    assert "  prepare         config/demo/data/house_format.jsonl has changed" in lines
    assert "  encode          its code or its container image has changed; after prepare" in lines
    assert "  finetune        train.learning_rate 0.003 -> 0.001; after encode, plan" in lines
    assert lines[-1] == "  fresh: inspect_model"


@pytest.mark.slow
def test_outputs_that_are_gone_or_half_written(again):
    (again / METRICS).unlink()
    assert f"  score  {METRICS} is not there" in explain(again, METRICS)
    # As Snakemake marks a job that has begun (persistence/file.py).
    adapter = "results/demo/adapter.json"
    mark = again / ".snakemake/incomplete" / base64.urlsafe_b64encode(adapter.encode()).decode()
    mark.write_text('{"external_jobid": null}')
    assert "  finetune        it was cut short" in explain(again, METRICS)


@pytest.mark.slow
def test_while_snakemake_is_at_work(again):
    """Its lock stays, and is told: the lock of an operating system that rules/lock.smk looks at is held here."""
    with (again / ".snakemake/moult.lock").open("a+") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        lock = again / ".snakemake/locks/0.output.lock"
        lock.parent.mkdir(exist_ok=True)
        lock.write_text(f"{METRICS}\n")
        lines = explain(again, METRICS)
        assert lines[0] == "all is fresh: demo" and lines[1].startswith("Snakemake is at work in this folder")
        assert lock.exists()


def test_a_config_that_is_refused(tmp_path):
    folder = checkout(tmp_path)
    set_key("train", "learning_rat", value=1)(folder)
    lines = explain(folder, code=1)
    assert any("learning_rat" in line and "learning_rate" in line for line in lines), lines
