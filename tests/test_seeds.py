"""seeds: the runs that they make, and what they do to the verdict."""

import math
import random
import re
from argparse import Namespace
from pathlib import Path
from statistics import mean, stdev

import pytest
from configs import SCHEMA, config
from jsonschema import Draft202012Validator
from workflow import checkout, planned, set_key, snakemake

import score
from moult.errors import MoultError
from moult.files import read_json, read_jsonl, write_json, write_jsonl
from moult.measuring import comparison
from moult.measuring.seeds import is_larger, spread, student, with_seeds
from moult.measuring.table import between_seeds
from moult.workflow.config import ConfigError, resolve
from moult.workflow.seeds import seed_runs
from moult.workflow.stages import STAGES, encoded_as, measured_as, places_of, stage_settings
from moult.workflow.sweeps import asked_for

# --- the runs ---------------------------------------------------------------------------------------------------------

SEVERAL = "runs: {a: {seeds: [3, 1, 0], lora: {r: 8}}, v: {dataset: a, seed: 7}}"


def test_each_further_seed_is_a_run_beside_the_first():
    resolved = config(SEVERAL)
    runs = resolved["runs"]
    assert {name: run["seed"] for name, run in runs.items()} == {"a": 3, "a-seed1": 1, "a-seed0": 0, "b": 0, "v": 7}
    assert [name for name, run in runs.items() if "seeds" in run] == ["a"]
    for name in seed_runs("a", runs["a"]):
        assert runs[name] | {"seed": 3, "seeds": [3, 1, 0]} == runs["a"]
    assert asked_for(resolved) == ["a", "b", "v"] and seed_runs("b", runs["b"]) == []


def test_what_is_resolved_can_be_resolved_again():
    resolved = config(SEVERAL)
    assert resolve(resolved, SCHEMA) == resolved


def test_only_training_score_and_the_page_know_of_the_seed():
    """prepare is the dataset's: another seed does not split the rows in another way."""
    resolved = config(SEVERAL)
    differ = {
        stage for stage in STAGES if stage_settings(resolved, stage, "a") != stage_settings(resolved, stage, "a-seed1")
    }
    assert differ == {"finetune", "score", "score_export", "report"}


def test_they_share_tokens_and_the_measurement_of_the_base():
    resolved = config(SEVERAL)
    for owners in (encoded_as(resolved), measured_as(resolved)):
        assert {owners[name] for name in ("a", "a-seed1", "a-seed0")} == {"a"}
    places = places_of(resolved, "a-seed1")
    assert places.base_likelihood == "results/a/base/likelihood.jsonl"
    assert places.tuned_likelihood == "results/a-seed1/tuned/likelihood.jsonl"


@pytest.mark.parametrize(
    ("runs", "problem"),
    [
        ("{a: {seeds: [3]}}", "runs.a.seeds: [3] is too short"),
        ("{a: {seeds: [3, 3]}}", "runs.a.seeds: [3, 3] has non-unique elements"),
        ("{a: {seeds: [3, -1]}}", "runs.a.seeds.1: must be >= 0, got -1"),
        ("{a: {seeds: [3, x]}}", "runs.a.seeds.1: expected integer, got 'x'"),
        ("{a: {seeds: 3}}", "runs.a.seeds: expected array, got 3"),
        (
            "{a: {seed: 1, seeds: [3, 1]}}",
            "runs.a.seed: the seed of a run is the first of its seeds; leave one of the two out",
        ),
        (
            "{a: {seeds: [3, 1]}, a-seed1: {dataset: a}}",
            "runs.a.seeds: the run of seed 1 is named a-seed1, which is there; rename that",
        ),
        (
            f"{{{'x' * 60}: {{dataset: a, seeds: [3, 1]}}}}",
            f"runs.{'x' * 60}: the run of seed 1 is named {'x' * 60}-seed1, which is too long; shorten the name",
        ),
        (
            "{a: {seeds: [3, 1]}, A-seed1: {dataset: a}}",
            "runs.A-seed1: there is also a-seed1; some file systems take the two for one folder",
        ),
    ],
)
def test_refused(runs, problem):
    with pytest.raises(ConfigError) as error:
        config(f"runs: {runs}")
    [found] = error.value.problems
    assert found.startswith(problem)


# --- the statistics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("confidence", "df", "wanted"),
    # a table of Student's distribution
    [(0.95, 1, 12.706), (0.95, 2, 4.3027), (0.95, 3, 3.1824), (0.95, 10, 2.2281), (0.99, 2, 9.9248), (0.8, 7, 1.4149)],
)
def test_student(confidence, df, wanted):
    assert student(confidence, df) == pytest.approx(wanted, rel=1e-4)


def test_the_interval_is_that_of_the_rows_where_seeds_agree_and_that_of_the_seeds_where_rows_do():
    same = spread([2.0, 2.0, 2.0], [1.0, 2.5], 0.95, "points")
    assert (same["mean"], same["standard_deviation"], same["interval"]) == (2.0, 0.0, [1.0, 2.5])
    exact = spread([1.0, 2.0, 3.0], [1.0, 1.0], 0.95, "points")
    half = 4.3027 / math.sqrt(3)
    assert exact["interval"] == pytest.approx([2 - half, 2 + half], rel=1e-4)
    both = spread([1.0, 2.0, 3.0], [0.5, 1.0], 0.95, "points")
    assert both["interval"] == pytest.approx([2 - math.hypot(half, 0.5), 2 + half], rel=1e-4)
    assert is_larger(same) and not is_larger(exact) and not is_larger(both)
    assert is_larger(spread([-2.0, -2.0], [-3.0, -1.0], 0.95, "points"))
    assert not is_larger(spread([0.1, -2.0, -2.0], [0.05, 0.15], 0.3, "points")), "the first is on the other side"


def simulated(generator, seeds: int, rows: int, over_rows: float, over_seeds: float, both: float) -> tuple:
    """Differences of several seeds on the same rows, with a true mean of 0; and the interval of the first, over rows."""
    rows_move = generator.normal(0, over_rows, rows)
    seeds_move = generator.normal(0, over_seeds, (seeds, 1))
    each = rows_move + seeds_move + generator.normal(0, both, (seeds, rows))
    error = student(0.95, rows - 1) * each[0].std(ddof=1) / math.sqrt(rows)
    middle = each[0].mean()
    return each.mean(axis=1).tolist(), [middle - error, middle + error]


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("noise", [(1.0, 0.0, 0.0), (1.0, 0.0, 1.0), (1.0, 0.1, 1.0), (1.0, 1.0, 1.0), (0.1, 1.0, 0.1)])
def test_the_interval_holds_the_truth_as_often_as_it_says(seeds, noise):
    """Whatever the difference comes from: rows, seeds, or both. The rows' own interval does not: with noise between seeds it
    leaves out the truth more than seven times in ten."""
    import numpy as np

    generator, trials = np.random.default_rng(seeds), 2000
    held = alone = 0
    for _ in range(trials):
        by_seed, interval = simulated(generator, seeds, 64, *noise)
        low, high = spread(by_seed, interval, 0.95, "points")["interval"]
        held += low <= 0 <= high
        alone += interval[0] <= 0 <= interval[1]
    assert held / trials > 0.95 - 3 * math.sqrt(0.05 * 0.95 / trials), (held, alone)
    if noise[1] == 1.0:
        assert alone / trials < 0.3


# --- metrics.json -----------------------------------------------------------------------------------------------------

EVAL = {
    "benchmarks": {"quiz": {"metric": None, "slug": "quiz"}},
    "perplexity": True,
    "forgetting": False,
    "forgetting_limit": 0.05,
    "confidence": 0.95,
    "resamples": 500,
    "prompts": [],
    "row_expect": {"exact": True},
    "merge_kl_limit": 0.05,
    "merge_top1_limit": 0.95,
}


def measured(folder, gain: float, right: float) -> str:
    """What evaluate_tuned writes: rows that are `gain` nats per token better than the base's, and a share of `right` answers."""
    noise = random.Random(round(1000 * gain))
    rows = [
        {"id": str(row), "group": str(row), "nll": 5 * (3.0 - gain + noise.gauss(0, 0.1)), "tokens": 5}
        | {"correct": 2, "bytes": 20}
        for row in range(40)
    ]
    answers = [
        {"kind": "row", "id": str(row), "group": str(row), "prompt": "?", "prompt_ids": [row], "reference": "yes"}
        | {"answer": "yes" if row < right * 40 else "no", "stopped": True}
        for row in range(40)
    ]
    write_jsonl(folder / "likelihood.jsonl", rows)
    write_jsonl(folder / "answers.jsonl", answers)
    write_jsonl(folder / "general.jsonl", [])
    asked = {"task": "quiz", "doc_hash": "h", "prompt_hash": "p"}
    values = {"acc": 0.5 + gain / 10}
    write_jsonl(folder / "quiz.jsonl", [asked | {"doc_id": row, "values": values} for row in range(40)])
    told = {"metrics": [{"name": "acc", "higher_is_better": True}], "limit": None, "tasks": {}, "cut": 0}
    write_json(folder / "quiz.json", told | {"versions": {"lm_eval": "0"}})
    write_json(folder / "merge_check.json", {"mean_kl": 0.0, "top1_agreement": 1.0, "positions": 50})
    return str(folder)


def seeds_of(folder, gains: list[float], rights: list[float], change=None) -> tuple[dict, dict]:
    """What metrics.json says of runs with such gains, and the verdict of the first one's rows alone."""
    base = comparison.read_side(measured(folder / "base", 0.0, 0.0))
    pairs = enumerate(zip(gains, rights, strict=True))
    folders = [measured(folder / str(seed), gain, right) for seed, (gain, right) in pairs]
    adapters = [str(folder / str(seed) / "adapter.json") for seed in range(len(gains))]
    for seed, path in enumerate(adapters):
        write_json(path, {"step": 10 + seed, "adapter_sha256": f"hash{seed}"})
    if change:
        change(Path(folders[1]))
    sides = {"base": base, "tuned": comparison.read_side(folders[0])}
    likelihood = comparison.compare_likelihood(sides, 0.95, 500, 0)
    answers = comparison.compare_answers(sides, EVAL)[0]
    asked = [str(folder / side / "quiz.jsonl") for side in ("base", *map(str, range(len(gains))))]
    arguments = Namespace(adapter=adapters[0], seed_tuned=folders[1:], seed_adapters=adapters[1:])
    arguments.benchmarks, arguments.seed_benchmarks = asked[:2], asked[2:]
    options = {"confidence": 0.95, "resamples": 500, "seed": 0}
    benchmarks = score.compare_benchmarks(arguments.benchmarks, EVAL["benchmarks"], None, options)
    own = score.measures_of(likelihood, answers, benchmarks, 40, 0.95)
    settings = {"eval": EVAL, "seed": 0, "seeds": list(range(len(gains)))}
    found = score.compare_seeds(settings, base, own, 40, None, arguments)
    return found, score.verdict(own, answers, None, EVAL)


def test_metrics_have_each_seed_their_mean_and_what_is_between_them(tmp_path):
    found, verdict = seeds_of(tmp_path, [1.0, 1.2, 0.9], [1.0, 1.0, 0.5])
    schema = read_json(score.SCHEMA)
    Draft202012Validator({**schema["properties"]["seeds"], "$defs": schema["$defs"]}).validate(found)
    assert set(found["measurements"]) == {"loss", "rows passed", "benchmark quiz"}
    loss = found["measurements"]["loss"]
    assert loss["by_seed"] == pytest.approx([-1.0, -1.2, -0.9], abs=0.06)
    assert (loss["mean"], loss["standard_deviation"]) == (mean(loss["by_seed"]), stdev(loss["by_seed"]))
    assert loss["interval"][0] < loss["mean"] < loss["interval"][1] < 0
    assert found["measurements"]["rows passed"]["by_seed"] == [1.0, 1.0, 0.5]
    assert found["measurements"]["benchmark quiz"]["by_seed"] == pytest.approx([0.1, 0.12, 0.09])
    assert found["trained"][2] == {"seed": 2, "step": 12, "adapter_sha256": "hash2"}

    weighed = with_seeds(verdict, found["measurements"])
    assert (weighed["verdict"], weighed["better"]) == ("helped", ["loss", "rows passed", "benchmark quiz"])
    low, high = loss["interval"]
    spread_of = f"±{loss['standard_deviation']:.2g} between seeds [{low:+.3g}, {high:+.3g}]"
    said = f"loss, 3 seeds: {loss['mean']:+.3g} nats per token on average, {spread_of}"
    assert said in weighed["reasons"] and f"  {said}\n" in between_seeds(found)
    assert any(
        "rows passed, 3 seeds: +83.3 points on average, ±29 between seeds" in line for line in weighed["reasons"]
    )


def test_a_run_with_one_seed_says_nothing_of_seeds(tmp_path):
    found, _ = seeds_of(tmp_path, [1.0], [1.0])
    assert found is None and between_seeds(found) == ""


def test_what_is_no_larger_than_between_seeds_is_inconclusive(tmp_path):
    """Clear by its rows, and lost with the next seed."""
    found, verdict = seeds_of(tmp_path, [1.0, -0.2, 0.6], [0.0, 0.0, 0.0])
    assert (verdict["verdict"], verdict["better"]) == ("helped", ["loss", "benchmark quiz"])
    weighed = with_seeds(verdict, found["measurements"])
    assert (weighed["verdict"], weighed["better"]) == ("inconclusive", [])
    assert "loss" in weighed["unclear"] and "loss" not in weighed["smallest_effect"]
    [reason] = [reason for reason in weighed["reasons"] if reason.startswith("loss, 3 seeds")]
    assert reason.endswith(", which is no larger than the difference between them")
    assert verdict["better"][0] == "loss", "the verdict of the rows is not changed in place"


def test_one_clear_measurement_is_enough(tmp_path):
    found, verdict = seeds_of(tmp_path, [1.0, -0.2, 0.6], [1.0, 1.0, 1.0])
    weighed = with_seeds(verdict, found["measurements"])
    assert (weighed["verdict"], weighed["better"]) == ("helped", ["rows passed"])


def test_what_another_seed_would_have_made_better_is_still_hurt(tmp_path):
    """It is the model of the first seed that is published."""
    found, verdict = seeds_of(tmp_path, [-1.0, 0.2, 1.4], [0.0, 0.0, 0.0])
    assert not is_larger(found["measurements"]["loss"])
    weighed = with_seeds(verdict, found["measurements"])
    assert (weighed["verdict"], weighed["worse"]) == ("hurt", ["loss", "benchmark quiz"])


def test_what_was_better_by_luck_does_not_make_up_for_what_is_worse(tmp_path):
    found, _ = seeds_of(tmp_path, [1.0, -0.2, 0.6], [0.0, 0.0, 0.0])
    verdict = {"verdict": "inconclusive", "better": ["loss"], "worse": ["prompts passed"], "unclear": []}
    weighed = with_seeds({**verdict, "smallest_effect": {}, "reasons": []}, found["measurements"])
    assert (weighed["verdict"], weighed["worse"]) == ("hurt", ["prompts passed"])


def other_rows(folder):
    rows = list(read_jsonl(folder / "likelihood.jsonl"))
    write_jsonl(folder / "likelihood.jsonl", rows[1:])


def bad_merge(folder):
    write_json(folder / "merge_check.json", read_json(folder / "merge_check.json") | {"mean_kl": 1.0})


@pytest.mark.parametrize(
    ("change", "message"),
    [(other_rows, "measured on different sequences"), (bad_merge, "differs from base plus adapter")],
)
def test_the_gates_hold_for_each_seed(change, message, tmp_path):
    with pytest.raises(MoultError, match=message):
        seeds_of(tmp_path, [1.0, 1.0], [1.0, 1.0], change)


# --- the workflow -----------------------------------------------------------------------------------------------------


def use_seeds(folder, seeds: list[int]) -> None:
    set_key("runs", "demo", "seeds", value=seeds)(folder)


@pytest.mark.slow
def test_snakemake_makes_what_is_shared_once(tmp_path):
    folder = checkout(tmp_path)
    use_seeds(folder, [0, 1, 2])
    output = snakemake(folder, "-n", "results/demo/metrics.json")
    table = dict(re.findall(r"^(\w+) +(\d+)$", output[output.index("Job stats:") :], re.MULTILINE))
    assert {job for job, count in table.items() if count == "3"} == {"plan", "finetune", "merge", "evaluate_tuned"}
    shared = {"inspect_model", "prepare", "encode", "evaluate_base", "score"}
    assert shared <= {job for job, count in table.items() if count == "1"}
    assert set(table.values()) - {table["total"]} == {"1", "3"}
    everything = snakemake(folder, "-n")
    assert re.search(r"^score +1$", everything, re.MULTILINE) and re.search(
        r"^model_card +1$", everything, re.MULTILINE
    )


@pytest.mark.slow
def test_the_demo_with_two_seeds(tmp_path):
    """Few steps and few questions. Then a seed more, for which nothing that is there runs again."""
    folder = checkout(tmp_path)
    use_seeds(folder, [0, 1])
    set_key("runs", "demo", "train", "max_steps", value=10)(folder)
    for key, value in (("answer_rows", 4), ("prompts", []), ("forgetting", False)):
        set_key("runs", "demo", "eval", key, value=value)(folder)
    snakemake(folder, "results/demo/metrics.json")
    metrics = read_json(folder / "results" / "demo" / "metrics.json")
    first, second = metrics["seeds"]["trained"]
    assert (first["seed"], second["seed"]) == (0, 1) and first["adapter_sha256"] != second["adapter_sha256"]
    assert first["adapter_sha256"] == metrics["provenance"]["adapter_sha256"]
    found = metrics["seeds"]["measurements"]["loss"]
    assert found["standard_deviation"] > 0
    assert found["by_seed"][0] == metrics["likelihood"]["difference"]["nll_per_token"]["value"]
    one = run_of_one_seed(folder, 1)
    assert one["likelihood"]["difference"]["nll_per_token"]["value"] == pytest.approx(found["by_seed"][1], rel=1e-12)
    use_seeds(folder, [0, 1, 2])
    assert planned(folder, "results/demo/metrics.json") == {"plan", "finetune", "merge", "evaluate_tuned", "score"}
    output = snakemake(folder, "-n", "results/demo/metrics.json")
    assert re.search(r"^finetune +1$", output, re.MULTILINE)


def run_of_one_seed(folder, seed: int) -> dict:
    """The run of a further seed can be scored by itself."""
    snakemake(folder, f"results/demo-seed{seed}/metrics.json")
    return read_json(folder / "results" / f"demo-seed{seed}" / "metrics.json")
