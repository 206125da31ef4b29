"""Power: how small an effect a number of questions can show.

A verdict "inconclusive" is worth nothing without it: 32 questions miss a true +10 points four times of five (Miller, "Adding
Error Bars to Evals", arXiv:2411.00640, section 5). A measurement shows an effect if the interval of its paired difference
(intervals.py) does not contain 0; its power is how often that happens where the effect is real.
"""

import math
from statistics import NormalDist

from moult.measuring.intervals import interval_of_counts

POWER = 0.8

# Of all questions, those that tuning moves against the trend: right before, wrong after, where it helps. The fewer, the
# more a paired comparison sees.
AGAINST = 0.05

TRIALS = 2000


def power(n: int, base: float, effect: float, confidence: float) -> float:
    """How often `n` questions show that the pass rate rises from `base` to `base + effect`: simulated, seeded."""
    import numpy as np

    against = min(AGAINST, base, 1 - base - effect)
    shares = [base - against, effect + against, against]
    shares.append(max(0.0, 1 - sum(shares)))
    counts = np.random.default_rng(0).multinomial(n, np.array(shares) / sum(shares), size=TRIALS)
    kinds, times = np.unique(counts, axis=0, return_counts=True)
    shown = [interval_of_counts(kind, confidence)[0] > 0 for kind in kinds.tolist()]
    return float(times[shown].sum() / TRIALS)


def smallest_effect(n: int, base: float, confidence: float) -> float | None:
    """The smallest rise or fall of the pass rate (0.09: nine points) that `n` questions show in `POWER` of all cases. None if
    they show not even the largest."""
    base = min(base, 1 - base)  # rise and fall mirror each other; near 0 or 1, one of the two has room
    low, high = 0.0, 1 - base
    if power(n, base, high, confidence) < POWER:
        return None
    while high - low > 0.002:
        middle = (low + high) / 2
        if power(n, base, middle, confidence) < POWER:
            low = middle
        else:
            high = middle
    return high


def rows_needed(effect: float, base: float, confidence: float) -> int:
    """How many questions show a rise by `effect` in `POWER` of all cases, to the next ten."""
    low, high = 1, 16
    while power(high, base, effect, confidence) < POWER:
        low, high = high, 2 * high
    while high - low > 10:
        middle = (low + high) // 2
        low, high = (middle, high) if power(middle, base, effect, confidence) < POWER else (low, middle)
    return math.ceil(high / 10) * 10


def smallest_shift(interval: list[float], confidence: float, level: float) -> float:
    """The smallest difference that a measurement like the one with this interval, of `confidence`, shows at the confidence
    `level` in `POWER` of all cases, in its unit."""
    error = (interval[1] - interval[0]) / 2 / NormalDist().inv_cdf((1 + confidence) / 2)
    return shift_shown(1, error, level)


def shift_shown(n: int, spread: float, level: float) -> float:
    """The same for the mean of `n` independent differences with the standard deviation `spread`."""
    normal = NormalDist()
    return spread / math.sqrt(n) * (normal.inv_cdf((1 + level) / 2) + normal.inv_cdf(POWER))
