"""What another seed would have changed: the differences between base and tuned of several trainings that differ only in the seed.

The rows say how sure it is that this model is better. They say nothing of the luck of its training: the order of the data,
LoRA's first weights, dropout. That luck is a large part of what a comparison shows (Bouthillier et al., "Accounting for Variance
in Machine Learning Benchmarks", arXiv:2103.03098).

The interval here is for the mean difference that these settings give, over other rows and other seeds. Two intervals make it:
that of the rows, and Student's t over the seeds, which holds up with few of them (Colas et al., arXiv:1904.06979). Their errors
are independent, so the squares of their distances to the limits add up (Zou and Donner, Statistics in Medicine 27:1693, 2008;
Newcombe's method in intervals.py does the same with two rates). It is a little too wide: some of what differs between seeds is
chance of the rows too. tests/test_seeds.py measures how often it holds the truth.
"""

import math
from functools import lru_cache
from statistics import mean, stdev
from typing import TypedDict

from moult.measuring.verdict import POINTS


class Spread(TypedDict):
    """One measurement over all seeds; the first seed is that of the model that is published. `unit`: for people; points are
    hundredths of what stands here."""

    unit: str
    by_seed: list[float]
    mean: float
    standard_deviation: float
    interval: list[float]


def spread(by_seed: list[float], interval: list[float], confidence: float, unit: str) -> Spread:
    """`by_seed`: tuned minus base, for each of at least two seeds. `interval`: of the first of them, over rows."""
    middle, deviation, count = mean(by_seed), stdev(by_seed), len(by_seed)
    error = student(confidence, count - 1) * deviation / math.sqrt(count)
    down, up = (math.hypot(abs(limit - by_seed[0]), error) for limit in interval)
    return {
        "unit": unit,
        "by_seed": by_seed,
        "mean": middle,
        "standard_deviation": deviation,
        "interval": [middle - down, middle + up],
    }


def with_seeds(verdict: dict, measurements: dict[str, Spread]) -> dict:
    """The verdict of the rows, with what the seeds say: what is better must also be larger than the difference between seeds, or
    else this training was lucky. What is worse stays so: it is the model of this training that is published."""
    lucky = [name for name in verdict["better"] if not is_larger(measurements[name])]
    better = [name for name in verdict["better"] if name not in lucky]
    word = verdict["verdict"]
    if lucky and not better:
        word = "hurt" if verdict["worse"] else "inconclusive"
    reasons = [
        f"{in_words(name, found)}{', which is no larger than the difference between them' if name in lucky else ''}"
        for name, found in measurements.items()
    ]
    return {
        **verdict,
        "verdict": word,
        "better": better,
        "unclear": [*verdict["unclear"], *lucky],
        "reasons": [*verdict["reasons"], *reasons],
    }


def is_larger(found: Spread) -> bool:
    """Whether the interval leaves 0 out, on the side on which the difference of the first seed is."""
    sign = math.copysign(1, found["by_seed"][0])
    return min(sign * limit for limit in found["interval"]) > 0


def in_words(name: str, found: Spread) -> str:
    scale = 100 if found["unit"] == POINTS else 1
    middle, low, high = (f"{scale * value:+.3g}" for value in (found["mean"], *found["interval"]))
    deviation = f"±{scale * found['standard_deviation']:.2g}"
    middle += "" if found["unit"] == "on average" else f" {found['unit']}"
    return f"{name}, {len(found['by_seed'])} seeds: {middle} on average, {deviation} between seeds [{low}, {high}]"


@lru_cache
def student(confidence: float, df: int) -> float:
    """The t that Student's distribution with `df` degrees of freedom stays within, in both directions, at this confidence.

    The distribution is a finite sum in theta = atan(t / sqrt(df)) (Abramowitz and Stegun, 26.7.3 and 26.7.4), and grows with it.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, df) < confidence else (low, middle)
    return math.sqrt(df) * math.tan(low)


def student_p(t: float, df: int) -> float:
    """How often Student's distribution is as far from 0 as `t`, or farther, in both directions."""
    return max(0.0, 1 - _within(math.atan(abs(t) / math.sqrt(df)), df))


def _within(theta: float, df: int) -> float:
    odd = df % 2
    # 1, 2/3, 2·4/(3·5) … with odd powers of the cosine; 1, 1/2, 1·3/(2·4) … with even ones.
    term = math.cos(theta) if odd else 1.0
    total = 0.0
    for power in range(1 + odd, df, 2):
        total += term
        term *= math.cos(theta) ** 2 * power / (power + 1)
    total *= math.sin(theta)
    return 2 / math.pi * (theta + total) if odd else total
