"""Intervals: how far a measured figure can be trusted.

Means over tokens: a bootstrap over groups of rows, base and tuned resampled together (paired), because tokens of one
conversation, and conversations of one group, are not independent (Miller, "Adding Error Bars to Evals",
arXiv:2411.00640). Rates: Wilson's interval; the difference of two rates on the same questions: Newcombe's method 10 for
paired proportions (Statistics in Medicine 17:2635, 1998), which, unlike the bootstrap, is not certain where all differ.
Questions of one group are worth fewer independent ones: all counts are divided by the design effect (Rao and Scott,
Biometrics 48:577, 1992).
"""

import math
from collections.abc import Callable
from statistics import NormalDist


def resample(numerators, denominators, resamples: int, seed: int):
    """Ratios of sums, resampled over clusters: (resamples, k + 1) array, the last column the difference (last - first).

    Args:
        numerators: (clusters, k) array; column j holds what ratio j sums above the line.
        denominators: (clusters,) array of weights (tokens, bytes), the same for all k ratios.
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    clusters = len(denominators)
    ratios = []
    for start in range(0, resamples, 500):
        count = min(500, resamples - start)
        weights = generator.multinomial(clusters, np.full(clusters, 1 / clusters), size=count)
        ratios.append((weights @ numerators) / (weights @ denominators)[:, None])
    ratios = np.concatenate(ratios)
    return np.concatenate([ratios, ratios[:, -1:] - ratios[:, :1]], axis=1)


def quantiles(ratios, confidence: float, clusters: int) -> list[list[float]]:
    """[low, high] for each column of what `resample` gives. `confidence`: such as 0.95."""
    import numpy as np

    tail = (1 - _widened(confidence, clusters)) / 2
    return np.quantile(ratios, [tail, 1 - tail], axis=0).T.tolist()


def p_value(interval: Callable[[float], list[float]]) -> float:
    """Of the hypothesis that the difference is 0, two-sided: the level up to which `interval`, of a confidence, leaves 0 out."""
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        below, above = interval(1 - middle)
        low, high = (middle, high) if below <= 0 <= above else (low, middle)
    return high


def _widened(confidence: float, clusters: int) -> float:
    """The level at which the quantiles of the bootstrap cover `confidence`.

    Those of few clusters are too narrow: at 95 % and 10 clusters, one interval in ten left out the truth. Hesterberg's
    expanded percentile interval (arXiv:1411.5279); Student's t from Abramowitz and Stegun, 26.7.5.
    """
    if clusters < 2:
        return confidence
    normal, df = NormalDist(), clusters - 1
    z = normal.inv_cdf((1 + confidence) / 2)
    t = z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * df**3)
    return 2 * normal.cdf(math.sqrt(clusters / df) * t) - 1


def wilson(passed: float, n: float, confidence: float) -> list[float]:
    """The interval of a rate."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate = passed / n
    middle = rate + z * z / (2 * n)
    spread = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return [max(0.0, (middle - spread) / (1 + z * z / n)), min(1.0, (middle + spread) / (1 + z * z / n))]


def design_effect(values: list[float], groups: list[str]) -> float:
    """By how much the variance of the mean of `values` is larger than that of as many independent ones; at least 1."""
    n, mean = len(values), sum(values) / len(values)
    sums: dict[str, float] = {}
    for value, group in zip(values, groups, strict=True):
        sums[group] = sums.get(group, 0.0) + value - mean
    independent = sum((value - mean) ** 2 for value in values) * n / (n - 1) if n > 1 else 0.0
    if not independent or len(sums) == 1:
        return n / len(sums)  # nothing to estimate it from: each group is worth one
    clustered = sum(total**2 for total in sums.values()) * len(sums) / (len(sums) - 1)
    return max(1.0, clustered / independent)


def rate(passed: list[bool], groups: list[str], confidence: float) -> list[float]:
    """The interval of the share of questions that pass."""
    effect = design_effect([float(value) for value in passed], groups)
    return wilson(sum(passed) / effect, len(passed) / effect, _for_groups(confidence, groups))


class PairedDifference:
    """(rate of tuned - rate of base), question by question.

    Attributes:
        independent: how many independent questions these are worth; as many as there are where each is a group of its own.
    """

    def __init__(self, base: list[bool], tuned: list[bool], groups: list[str]):
        pairs = list(zip(base, tuned, strict=True))
        effect = design_effect([float(after) - float(before) for before, after in pairs], groups)
        kinds = ((True, True), (False, True), (True, False), (False, False))
        self._counts = [pairs.count(kind) / effect for kind in kinds]
        self._groups = groups
        self.independent = len(pairs) / effect

    def interval(self, confidence: float) -> list[float]:
        return interval_of_counts(self._counts, _for_groups(confidence, self._groups))


def _for_groups(confidence: float, groups: list[str]) -> float:
    """The design effect of few groups is itself uncertain: Student's t. Without groups nothing is estimated."""
    count = len(set(groups))
    return _widened(confidence, count) if count < len(groups) else confidence


def compare_rates(base: list[bool], tuned: list[bool], groups: list[str], confidence: float) -> dict:
    """The rates of base and tuned on the same questions, and their paired difference."""
    n, paired = len(base), PairedDifference(base, tuned, groups)
    return {
        "n": n,
        "independent": paired.independent,
        "base": {"value": sum(base) / n, "interval": rate(base, groups, confidence)},
        "tuned": {"value": sum(tuned) / n, "interval": rate(tuned, groups, confidence)},
        "difference": {
            "value": (sum(tuned) - sum(base)) / n,
            "interval": paired.interval(confidence),
            "p": p_value(paired.interval),
        },
    }


def interval_of_counts(counts: list[float], confidence: float) -> list[float]:
    """Of that difference, from how many questions both pass, only the tuned model, only the base, and neither."""
    both, only_tuned, only_base, neither = counts
    n = both + only_tuned + only_base + neither
    p_tuned, p_base = (both + only_tuned) / n, (both + only_base) / n
    low_tuned, high_tuned = wilson(both + only_tuned, n, confidence)
    low_base, high_base = wilson(both + only_base, n, confidence)
    product = (both + only_tuned) * (only_base + neither) * (both + only_base) * (only_tuned + neither)
    phi = 0.0
    if product:
        cross = both * neither - only_tuned * only_base
        phi = (max(cross - n / 2, 0) if cross > 0 else cross) / math.sqrt(product)
    difference = p_tuned - p_base
    down, up = p_tuned - low_tuned, high_base - p_base
    low = difference - math.sqrt(max(0.0, down**2 - 2 * phi * down * up + up**2))
    up, down = high_tuned - p_tuned, p_base - low_base
    high = difference + math.sqrt(max(0.0, up**2 - 2 * phi * up * down + down**2))
    return [max(-1.0, low), min(1.0, high)]
