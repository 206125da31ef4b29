"""Intervals that cover what they promise."""

import random

import pytest

from moult.measuring.intervals import PairedDifference, design_effect, p_value, quantiles, resample, wilson


def difference(base: list[bool], tuned: list[bool]) -> list[float]:
    """The interval of questions that are each a group of its own."""
    return PairedDifference(base, tuned, list(map(str, range(len(base))))).interval(0.95)


def bootstrap(columns, weights, resamples: int, seed: int) -> list[list[float]]:
    return quantiles(resample(columns, weights, resamples, seed), 0.95, len(weights))


def test_the_design_effect_of_groups():
    apart = list("abcdefgh")
    assert design_effect([1, 0, 0, 1, 1, 1, 0, 0], apart) == pytest.approx(1.0)
    twice = [letter for letter in apart for _ in range(2)]
    assert design_effect([1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0], twice) == pytest.approx(2.0, rel=0.1)
    assert design_effect([1.0] * 16, twice) == 2.0  # nothing to estimate it from
    assert design_effect([1, 0] * 8, twice) == 1.0  # less alike within than between: worth no more for that


def test_p_is_the_level_from_which_the_interval_leaves_0_out():
    paired = PairedDifference([False] * 20, [True] * 6 + [False] * 14, list(map(str, range(20))))
    p = p_value(paired.interval)
    assert paired.interval(1 - p - 1e-4)[0] > 0 >= paired.interval(1 - p + 1e-4)[0]
    same = PairedDifference([True, False] * 5, [False, True] * 5, list(map(str, range(10))))
    assert p_value(same.interval) == pytest.approx(1.0, abs=1e-6)


def test_wilson_against_published_values():
    """Newcombe, Statistics in Medicine 17:857 (1998), table I: 81/263, 15/148, 0/20, 1/29."""
    for passed, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson(passed, n, 0.95) == pytest.approx([low, high], abs=6e-5)


def test_paired_difference_is_antisymmetric_and_careful_with_few():
    base, tuned = [False] * 8 + [True] * 2, [True] * 7 + [False] + [True] * 2
    low, high = difference(base, tuned)
    assert low < 0.7 < high
    assert difference(tuned, base) == pytest.approx([-high, -low])
    # Three of three better is no certainty, as a bootstrap would have it.
    low, high = difference([False] * 3, [True] * 3)
    assert 0 < low < 0.5 and high == pytest.approx(1.0)
    assert difference([True], [True])[0] < 0 < difference([True], [True])[1]


def test_intervals_cover_what_they_promise():
    """Of 400 simulated comparisons about 95 in 100 cover the true difference."""
    generator = random.Random(3)
    covered = 0
    for _ in range(400):
        pairs = []
        for _ in range(60):
            skill = generator.random()
            pairs.append((generator.random() < skill, generator.random() < min(1.0, skill + 0.2)))
        low, high = difference([b for b, _ in pairs], [t for _, t in pairs])
        covered += low <= 0.18 <= high  # E[min(1, s + .2) - s] = .2 * .8 + .02
    assert 0.92 < covered / 400 < 0.985


@pytest.mark.parametrize("clusters", [6, 10])
def test_bootstrap_of_few_groups_finds_no_difference_where_there_is_none(clusters):
    """As often as 95 % allows; of plain quantiles 14 and 10 in 100 did."""
    import numpy as np

    generator = np.random.default_rng(1)
    found = 0
    for trial in range(1000):
        tokens = generator.integers(20, 80, size=clusters).astype(float)
        tuned = tokens * generator.normal(0, 1, size=clusters)
        low, high = bootstrap(np.stack([0 * tuned, tuned], axis=1), tokens, 1000, trial)[2]
        found += not low <= 0 <= high
    assert 0.03 < found / 1000 < 0.075


def test_bootstrap_covers_and_resamples_whole_groups():
    import numpy as np

    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        tokens = generator.integers(5, 50, size=80).astype(float)
        shared = generator.normal(2.0, 0.5, size=80)
        base = tokens * (shared + generator.normal(0, 0.2, size=80))
        tuned = tokens * (shared - 0.3 + generator.normal(0, 0.2, size=80))
        intervals = bootstrap(np.stack([base, tuned], axis=1), tokens, 300, trial)
        covered += intervals[2][0] <= -0.3 <= intervals[2][1]
        # The two go up and down together, so their difference is surer than either.
        assert intervals[2][1] - intervals[2][0] < (intervals[0][1] - intervals[0][0])
    assert 0.9 < covered / 200 < 0.99
