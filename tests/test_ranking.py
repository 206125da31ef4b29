"""The ranking of a sweep: against figures computed by hand, and how often it calls a winner where there is none."""

import math

import numpy as np
import pytest

from moult.errors import MoultError
from moult.measuring.ranking import error_of, holm_corrected, p_of, rank, together


def rows_of(losses: list[float], tokens: int = 10) -> list[dict]:
    """A row of `tokens` tokens for each loss per token, each a group of its own."""
    return [
        {"id": str(row), "group": str(row), "nll": loss * tokens, "tokens": tokens, "bytes": 40}
        for row, loss in enumerate(losses)
    ]


# --- by hand ----------------------------------------------------------------------------------------------------------


def both_tails(difference: float, variance: float, df: float) -> float:
    """Of Student's t with `df` rounded down, by integrating its density."""
    t, df = abs(difference) / math.sqrt(variance), math.floor(df + 1e-9)
    x = np.linspace(0, t, 200_001)
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    return 1 - 2 * scale * float(np.trapezoid((1 + x**2 / df) ** (-(df + 1) / 2), x))


def test_the_ranking_by_hand():
    """Three runs, two seeds, eight rows. Each step is computed in another way than by the ranking: the noise of the rows by the
    formula of the standard error instead of the bootstrap, and Student's distribution from its density."""
    rows = np.array([1.0, 1.4, 0.8, 1.2, 1.1, 0.9, 1.3, 0.7])
    reacts = {
        "a": np.zeros(8),
        "b": np.array([0.3, 0.1, 0.2, 0.3, 0.2, 0.1, 0.2, 0.2]),
        "c": np.array([0.0, 0.05, 0.0, 0.05, 0.0, 0.0, 0.05, 0.05]),
    }
    seeds = {"a": (-0.001, 0.001), "b": (-0.002, 0.002), "c": (-0.03, 0.03)}
    losses = {run: [rows + reacts[run] + shift for shift in seeds[run]] for run in reacts}
    found = rank({run: [rows_of(list(one)) for one in own] for run, own in losses.items()}, 0.95, 40_000, 0)
    assert [place["run"] for place in found["places"]] == ["a", "c", "b"]
    assert (found["unit"], found["sequences"], found["groups"], found["pairs"]) == ("nats per token", 8, 8, 3)

    p = {}
    for one, other in ("ab", "ac", "bc"):
        each = np.mean(losses[one], axis=0) - np.mean(losses[other], axis=0)
        of_rows = each.var(ddof=1) / 8
        of_seeds = [np.var([own.mean() for own in losses[run]], ddof=1) / 2 for run in (one, other)]
        by_rows = both_tails(each.mean(), of_rows, 7)
        welch = sum(of_seeds) ** 2 / sum(square**2 for square in of_seeds)
        by_seeds = both_tails(each.mean(), sum(of_seeds), welch)
        total = of_rows + sum(of_seeds)
        df = total**2 / (of_rows**2 / 7 + sum(square**2 for square in of_seeds))
        by_both = both_tails(each.mean(), total, df)
        p[one + other] = max(by_rows, by_seeds, by_both, 2.0**-7)
    # Holm: the smallest three times, the next twice, none smaller than the one before.
    first, second, third = sorted(p, key=lambda pair: p[pair])
    holm = {first: 3 * p[first]}
    holm[second] = max(holm[first], 2 * p[second])
    holm[third] = max(holm[second], p[third])
    at_once = max(p["ab"], p["ac"])
    behind = {place["run"]: place["behind"] for place in found["places"]}
    assert behind["a"] is None
    for run in "bc":
        assert behind[run]["p"] == pytest.approx(p[f"a{run}"], rel=0.02)
        assert behind[run]["corrected_p"] == pytest.approx(min(1.0, holm[f"a{run}"], at_once), rel=0.02)
    assert behind["b"]["value"] == pytest.approx(0.2) and behind["c"]["value"] == pytest.approx(0.025)
    assert behind["b"]["worse"] and not behind["c"]["worse"]
    assert (found["winner"], found["level"]) == (None, ["a", "c"])
    assert found["places"][0]["loss"]["by_seed"] == pytest.approx([1.049, 1.051])
    pooled = math.sqrt((2 * 0.001**2 + 2 * 0.002**2 + 2 * 0.03**2) / 3)
    assert found["between_seeds"] == pytest.approx(pooled)


def test_the_interval_leaves_0_out_just_if_p_is_below_what_is_left():
    for noise in ([[(0.04, 59)]], [[(0.04, 59)], [(0.01, 2), (0.09, 2)], [(0.04, 59), (0.01, 2), (0.09, 2)]]):
        error = error_of(noise, 0.95)
        assert p_of(error * 1.001, noise) < 0.05 < p_of(error * 0.999, noise)
        assert p_of(error, noise) == pytest.approx(0.05, rel=1e-6)


def test_satterthwaite():
    assert together([(0.5, 2), (0.5, 2)]) == (1.0, 4)
    assert together([(0.9, 2), (0.1, 2)]) == (1.0, 2)  # 2.4
    assert together([(0.0, 3), (0.0, 7)]) == (0.0, 3)


def test_holm():
    assert holm_corrected({"a": 0.04, "b": 0.01, "c": 0.03}) == pytest.approx({"b": 0.03, "c": 0.06, "a": 0.06})
    assert holm_corrected({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}


# --- what does not count ----------------------------------------------------------------------------------------------


def test_a_difference_that_seeds_explain_is_none():
    """Each model by itself is clearly better or worse on these rows; the two settings are not."""
    rows = np.linspace(0.5, 1.5, 40)
    one, other = [rows_of(list(rows + shift)) for shift in (0.0, 0.1)], [rows_of(list(rows + 0.06))]
    lucky = rank({"a": one[:1], "b": other}, 0.95, 500, 0)
    assert lucky["winner"] == "a" and lucky["between_seeds"] is None
    assert lucky["places"][0]["loss"]["standard_deviation"] is None
    both = rank({"a": one, "b": [*other, *other]}, 0.95, 500, 0)
    assert both["winner"] is None and both["places"][0]["run"] == "a"
    assert both["places"][1]["behind"]["p"] > 0.5


def test_few_rows_are_no_evidence():
    runs = {"a": [rows_of([1.0, 1.1, 1.2, 1.3])], "b": [rows_of([2.0, 2.1, 2.2, 2.3])]}
    found = rank(runs, 0.95, 500, 0)
    assert found["places"][1]["behind"]["p"] == 2**-3 and found["winner"] is None


def test_equal_models_are_level():
    rows = rows_of(list(np.linspace(0.5, 1.5, 40)))
    found = rank({"b": [rows, rows], "a": [rows, rows]}, 0.95, 500, 0)
    assert found["level"] == ["b", "a"] and found["places"][1]["behind"]["p"] == 1.0


def test_other_rows_are_refused():
    other = [{**row, "id": f"x{row['id']}"} for row in rows_of([1.0, 2.0])]
    with pytest.raises(MoultError, match="no measured rows in common"):
        rank({"a": [rows_of([1.0, 2.0])], "b": [other]}, 0.95, 500, 0)


# --- simulated sweeps -------------------------------------------------------------------------------------------------


def simulated(generator, shifts: list[float], noise: list[float], seeds: int = 3) -> dict:
    """A sweep: runs that are worse than the best possible by `shifts`, on 60 groups of two rows, with `noise` between seeds.

    The rows of a group are alike; each run, and each model, reacts to a group in its own way.
    """
    groups, per = 60, 2
    tokens = generator.integers(5, 30, groups * per)
    own = np.repeat(generator.normal(1, 0.3, groups), per) + generator.normal(0, 0.3, groups * per)
    runs: dict = {}
    for run, (shift, between) in enumerate(zip(shifts, noise, strict=True)):
        reacts = np.repeat(generator.normal(0, 0.1, groups), per)
        runs[f"run{run}"] = []
        for _ in range(seeds):
            luck = generator.normal(0, between) + np.repeat(generator.normal(0, 0.1, groups), per)
            nll = tokens * (own + reacts + shift + luck)
            runs[f"run{run}"].append(
                [
                    {"id": str(row), "group": str(row // per), "nll": nll[row], "tokens": int(tokens[row]), "bytes": 9}
                    for row in range(groups * per)
                ]
            )
    return runs


def rates(shifts: list[float], noise: list[float], sweeps: int = 300) -> tuple[float, float]:
    """Of simulated sweeps: in how many a winner is called, and in how many any run is called worse than the best."""
    generator = np.random.default_rng(7)
    found = [rank(simulated(generator, shifts, noise), 0.95, 500, 0) for _ in range(sweeps)]
    winners = sum(one["winner"] is not None for one in found) / sweeps
    return winners, sum(len(one["level"]) < len(shifts) for one in found) / sweeps


@pytest.mark.parametrize(
    "noise", [[0.02] * 6, [0.1] * 6, [0.06, 0.02, 0.02, 0.02, 0.02, 0.005]], ids=["some", "much", "unlike"]
)
def test_without_a_difference_a_winner_is_called_in_at_most_5_of_100_sweeps(noise):
    """6 runs with 3 seeds. Nor is any run called worse than the best more often."""
    winners, worse = rates([0.0] * 6, noise)
    print(f"no difference, noise {noise}: a winner in {winners:.1%}, a run called worse in {worse:.1%} of the sweeps")
    assert winners <= 0.05 and worse <= 0.05


@pytest.mark.parametrize("noise", [[0.02] * 6, [0.02, 0.06, 0.02, 0.02, 0.02, 0.02]], ids=["alike", "unlike"])
def test_nor_if_two_tie_far_ahead_of_the_others(noise):
    """The hardest case: what is far behind cannot keep one of the two from being called the winner."""
    winners, worse = rates([0.0, 0.0, 1.0, 1.0, 1.0, 1.0], noise)
    print(f"two tie, noise {noise}: a winner in {winners:.1%} of the sweeps")
    assert winners <= 0.05
    assert worse > 0.95, "those far behind are called worse"


def test_a_true_difference_is_found():
    winners, worse = rates([0.0, *[0.2] * 5], [0.02] * 6, 100)
    print(f"one better by 0.2, noise 0.02: a winner in {winners:.1%} of the sweeps")
    assert winners > 0.9 and worse > 0.9


def test_the_winner_is_the_one_that_is_better():
    generator = np.random.default_rng(1)
    found = rank(simulated(generator, [0.4, 0.0, 0.4, 0.3], [0.02] * 4), 0.95, 500, 0)
    assert found["winner"] == "run1" and found["level"] == ["run1"]
    assert all(place["behind"]["worse"] for place in found["places"][1:])
