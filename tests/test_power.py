"""Power: what it promises is what a simulation of the verdict's own interval finds."""

import numpy as np
import pytest

from moult.measuring.intervals import PairedDifference
from moult.measuring.power import AGAINST, POWER, power, rows_needed, smallest_effect


def found(n: int, base: float, effect: float, trials: int = 1000) -> float:
    """How often the interval is above 0, question by question and drawn anew."""
    draw = np.random.default_rng(1).random((trials, n, 2))
    before = draw[..., 0] < base
    # Of those that were right some are wrong now; of those that were wrong enough are right to make up for it and the effect.
    after = np.where(before, draw[..., 1] >= AGAINST / base, draw[..., 1] < (effect + AGAINST) / (1 - base))
    apart = list(map(str, range(n)))
    shown = [
        PairedDifference(b.tolist(), a.tolist(), apart).interval(0.95)[0] > 0
        for b, a in zip(before, after, strict=True)
    ]
    return sum(shown) / trials


@pytest.mark.parametrize(("n", "base", "effect"), [(32, 0.5, 0.1), (64, 0.3, 0.2), (256, 0.5, 0.1), (256, 0.8, 0.05)])
def test_power_is_what_a_simulation_finds(n, base, effect):
    assert power(n, base, effect, 0.95) == pytest.approx(found(n, base, effect), abs=0.04)


def test_where_nothing_changes_it_is_seen_in_at_most_half_of_five_of_a_hundred():
    # The interval has two sides; the base's rate differs.
    assert max(power(n, base, 0.0, 0.95) for n in (32, 128, 256) for base in (0.1, 0.5, 0.8)) <= 0.03


def test_more_rows_show_less():
    shown = [smallest_effect(n, 0.5, 0.95) for n in (32, 64, 128, 256, 600)]
    assert shown == sorted(shown, reverse=True)
    assert [round(effect, 2) for effect in shown] == [0.28, 0.18, 0.12, 0.07, 0.04]
    assert power(256, 0.5, 0.1, 0.95) > 0.9 and power(32, 0.5, 0.1, 0.95) < 0.3


def test_a_rise_and_a_fall_are_the_same():
    assert smallest_effect(128, 0.1, 0.95) == smallest_effect(128, 0.9, 0.95)


def test_too_few_rows_show_nothing():
    assert smallest_effect(4, 0.5, 0.95) is None


@pytest.mark.parametrize("effect", [0.05, 0.2])
def test_the_rows_that_an_effect_needs_show_it(effect):
    rows = rows_needed(effect, 0.5, 0.95)
    assert power(rows, 0.5, effect, 0.95) >= POWER - 0.02 > power(rows - 30, 0.5, effect, 0.95) - 0.02
