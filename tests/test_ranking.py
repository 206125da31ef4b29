"""The best of several tuned models, and what may be said of the second."""

import random

import pytest
from test_paired import noisy, rows, samples

from moult.measuring.paired import NATS, compare_likelihoods
from moult.measuring.ranking import ANSWERS, LOSS, rank
from moult.measuring.verdict import POINTS

OPTIONS = {"confidence": 0.95, "resamples": 1000, "seed": 0}


def test_the_best_comes_first_and_the_others_by_how_far_they_are_behind():
    models = {"b": rows(noisy(1, 1.5)), "a": rows(noisy(2, 1.0)), "c": rows(noisy(3, 1.01))}
    answers = {"a": samples([True] * 40), "b": samples([False] * 40), "c": samples([False] * 39 + [True])}
    found = rank(models, answers, **OPTIONS)
    loss, passed = found["by"][LOSS], found["by"][ANSWERS]
    assert (list(loss["values"]), loss["unit"], loss["n"]) == (["a", "c", "b"], NATS, 60)
    assert (loss["behind"]["b"]["is_clear"], loss["behind"]["c"]["is_clear"]) == (True, False)
    assert (list(passed["values"].items()), passed["unit"]) == ([("a", 1.0), ("c", 1 / 40), ("b", 0.0)], POINTS)
    assert passed["behind"]["b"]["is_clear"] and passed["behind"]["b"]["difference"]["value"] == -1
    assert found["comparisons"] == 6 and found["without"] == {}


def test_a_pair_that_is_turned_round_is_the_same_comparison():
    """`b` is better but is compared as the second of its pair."""
    models = {"a": rows(noisy(1, 1.2)), "b": rows(noisy(2, 1.0))}
    behind = rank(models, {}, **OPTIONS)["by"][LOSS]["behind"]["a"]["difference"]
    pair = compare_likelihoods(models["a"], models["b"], **OPTIONS)["difference"]
    assert behind["value"] == -pair["value"] > 0
    assert behind["interval"] == [-pair["interval"][1], -pair["interval"][0]]


def test_what_was_not_measured_is_not_ranked():
    assert rank({"a": rows(noisy(1))}, {}, **OPTIONS) == {"by": {}, "without": {}, "comparisons": 0}
    found = rank(
        {"a": rows(noisy(1)), "b": []}, {"a": samples([True]), "b": samples([True], reference="no")}, **OPTIONS
    )
    assert found["by"] == {} and "no checked question in common" in found["without"][ANSWERS]


@pytest.mark.parametrize("count", [2, 6])
def test_equal_models_have_no_winner(count):
    """Of 100 times that models do not differ, the best is called clearly better than any other at most 5 times, give or take
    chance (3 standard errors: 6.5 times)."""
    called = 0
    for turn in range(100):
        generator = random.Random(turn)
        models = {str(name): rows(noisy(1000 * turn + name), 40) for name in range(count)}
        answers = {name: samples([generator.random() < 0.5 for _ in range(40)]) for name in models}
        found = rank(models, answers, confidence=0.95, resamples=400, seed=turn)
        called += any(behind["is_clear"] for by in found["by"].values() for behind in by["behind"].values())
    assert called <= 11
