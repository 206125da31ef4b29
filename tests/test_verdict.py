"""The verdict, simulated: how often it sees a difference where there is none, and where there is one.

The differences are drawn; what is made of them is Moult's own, from the intervals to the word.
"""

import numpy as np
import pytest

from moult.measuring.comparison import compare_ratios
from moult.measuring.intervals import compare_rates
from moult.measuring.power import AGAINST, POWER, power, smallest_effect
from moult.measuring.verdict import holm, measures_of, shares, verdict

SETTINGS = {"confidence": 0.95, "forgetting_limit": 0.1}
PROMPTS, INSTRUCTIONS, TEXTS = 12, 36, 128


def grouped(generator, n: int) -> np.ndarray:
    """(n,): the group of each row, of one to six rows, so that half of the rows are in groups of four or more."""
    sizes = generator.integers(1, 7, size=n)
    return np.repeat(np.arange(n), sizes)[:n]


def apart(n: int) -> np.ndarray:
    return np.arange(n)


def answered(generator, groups: np.ndarray, base: float, effect: float, against: float) -> dict:
    """Whether base and tuned model pass; the rows of a group do alike, as they do with the same prompt."""
    draw = generator.random((2, groups.max() + 1))
    passed = draw[0] < base
    after = np.where(passed, draw[1] >= against / base, draw[1] < (against + effect) / (1 - base))
    return compare_rates(passed[groups].tolist(), after[groups].tolist(), groups.astype(str).tolist(), 0.95)


def likelihood(generator, groups: np.ndarray, shift: float, seed: int) -> dict:
    """Nats per token that are shifted by `shift`, give or take what groups and rows have of their own."""
    n = len(groups)
    tokens = generator.integers(20, 200, size=n).astype(float)
    each = shift + generator.normal(0, 0.2, size=groups.max() + 1)[groups] + generator.normal(0, 0.2, size=n)
    base, tuned = 2.0 * tokens, (2.0 + each) * tokens
    columns = [np.bincount(groups, weights=column) for column in (base, tuned, tokens)]
    found = compare_ratios(*columns, confidence=0.95, resamples=600, seed=seed)
    return {"difference": {"nll_per_token": found["difference"]}}


@pytest.fixture(autouse=True)
def told_quickly(monkeypatch):
    """What unclear rates would have shown is words, and costs more than all the rest."""
    monkeypatch.setattr("moult.measuring.verdict.smallest_effect", lambda *_: None)


def simulated(seed: int, groups: np.ndarray, effect: float = 0.0, shift: float = 0.0, base: float = 0.5) -> dict:
    """One verdict over all that is measured; prompts, instructions and general text change by chance only."""
    generator = np.random.default_rng(seed)
    asked = {
        "rows": answered(generator, groups, base, effect, AGAINST if effect else 0.1),
        "prompts": answered(generator, apart(PROMPTS), 0.4, 0.0, 0.1),
        "instructions": answered(generator, apart(INSTRUCTIONS), 0.7, 0.0, 0.05),
    }
    loss = likelihood(generator, groups, shift, seed)
    texts = generator.normal(0, 0.03, size=TEXTS)
    general = compare_ratios(
        np.full(TEXTS, 250.0), 250 + 100 * texts, np.full(TEXTS, 100.0), confidence=0.95, resamples=200, seed=seed
    )
    general |= {"texts": TEXTS, "guess": 11.9}
    answers = {part: {"passed": rates} for part, rates in asked.items()}
    measures = measures_of(loss, answers, {}, groups.max() + 1, SETTINGS["confidence"])
    return verdict(measures, answers, general, SETTINGS)


def false_verdicts(n: int, trials: int) -> float:
    words = [simulated(seed, grouped(np.random.default_rng(seed + 10**6), n))["verdict"] for seed in range(trials)]
    return sum(word != "inconclusive" for word in words) / trials


def found_share(n: int, effect: float, trials: int) -> float:
    """How often the rows passed are said to be better."""
    return sum("rows passed" in simulated(seed, apart(n), effect)["better"] for seed in range(trials)) / trials


def error(share: float, trials: int) -> float:
    """Three standard errors of a share that was simulated."""
    return 3 * (share * (1 - share) / trials) ** 0.5


def level(n: int) -> float:
    """The confidence that the rows passed have beside the other measurements."""
    weights = shares({"prompts": PROMPTS, "rows": n, "instructions": INSTRUCTIONS}, likelihood=True)
    return 1 - 0.05 * weights["rows"]


@pytest.mark.parametrize("n", [32, 128, 256])
@pytest.mark.slow
def test_where_nothing_has_changed_nothing_is_found(n):
    assert false_verdicts(n, 2000) <= 0.05 + error(0.05, 2000)


def test_where_nothing_has_changed_little_is_found_in_a_few_trials():
    assert false_verdicts(64, 150) <= 0.05 + error(0.05, 150)


@pytest.mark.slow
def test_ten_points_are_found_in_256_rows():
    assert found_share(256, 0.1, 1000) > 0.9


@pytest.mark.parametrize("n", [64, 128, 256])
@pytest.mark.slow
def test_the_promised_power_is_what_a_simulation_finds(n):
    promised = smallest_effect(n, 0.5, level(n))
    assert power(n, 0.5, promised, level(n)) == pytest.approx(POWER, abs=0.02)
    assert found_share(n, promised, 2000) == pytest.approx(POWER, abs=0.03)


@pytest.mark.slow
def test_the_promised_shift_of_the_likelihood_is_what_a_simulation_finds():
    """What an unclear verdict says that so many rows would show, they show."""
    groups = apart(128)
    said = [simulated(seed, groups)["smallest_effect"].get("loss") for seed in range(20)]
    shift = float(np.mean([size for size in said if size]))
    found = [simulated(seed, groups, shift=-shift)["better"] for seed in range(1000)]
    assert sum("loss" in better for better in found) / 1000 == pytest.approx(POWER, abs=0.04)


def test_holm_takes_the_surest_first_and_gives_its_share_to_the_others():
    even = {"a": 0.5, "b": 0.5}
    assert holm({"a": 0.02, "b": 0.04}, even, 0.05) == {"a", "b"}
    assert holm({"a": 0.026, "b": 0.04}, even, 0.05) == set()
    assert holm({"a": 0.02, "b": 0.06}, even, 0.05) == {"a"}
    assert holm({"a": 0.04, "b": 0.9}, {"a": 0.9, "b": 0.1}, 0.05) == {"a"}


def test_the_shares_of_the_error():
    assert shares({}, likelihood=True) == {"likelihood": 1.0}
    assert shares({"prompts": 10, "rows": 30}, likelihood=False) == {"prompts": 0.25, "rows": 0.75}
    assert shares({"prompts": 10, "rows": 30}, likelihood=True) == {
        "likelihood": 0.25,
        "prompts": 0.1875,
        "rows": 0.5625,
    }
