"""Intervals: how far a measured figure can be trusted.

Means over tokens: a bootstrap over groups of rows, base and tuned resampled together (paired), because tokens of one
conversation, and conversations of one group, are not independent (Miller, "Adding Error Bars to Evals",
arXiv:2411.00640). Rates: Wilson's interval; the difference of two rates on the same questions: Newcombe's method 10 for
paired proportions (Statistics in Medicine 17:2635, 1998), which, unlike the bootstrap, is not certain where all differ.
"""

import math
from statistics import NormalDist


def bootstrap(numerators, denominators, confidence: float, resamples: int, seed: int) -> list[list[float]]:
    """Intervals of ratios of sums, resampled over clusters.

    Args:
        numerators: (clusters, k) array; column j holds what ratio j sums above the line.
        denominators: (clusters,) array of weights (tokens, bytes), the same for all k ratios.
        confidence: such as 0.95.

    Returns [low, high] for each of the k ratios, and for the difference (last - first) as the last entry.
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
    ratios = np.concatenate([ratios, ratios[:, -1:] - ratios[:, :1]], axis=1)
    tail = (1 - _widened(confidence, clusters)) / 2
    return np.quantile(ratios, [tail, 1 - tail], axis=0).T.tolist()


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


def wilson(passed: int, n: int, confidence: float) -> list[float]:
    """The interval of a rate."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate = passed / n
    middle = rate + z * z / (2 * n)
    spread = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return [max(0.0, (middle - spread) / (1 + z * z / n)), min(1.0, (middle + spread) / (1 + z * z / n))]


def paired_difference(base: list[bool], tuned: list[bool], confidence: float) -> list[float]:
    """The interval of (rate of tuned - rate of base), question by question."""
    pairs = list(zip(base, tuned, strict=True))
    counts = [pairs.count(pair) for pair in ((True, True), (False, True), (True, False), (False, False))]
    return interval_of_counts(counts, confidence)


def compare_rates(passed: list[list[bool]], confidence: float) -> dict:
    """The rates of base and tuned, whose answers to the same questions `passed` holds, and their paired difference."""
    n = len(passed[0])
    base, tuned = (sum(side) for side in passed)
    return {
        "n": n,
        "base": {"value": base / n, "interval": wilson(base, n, confidence)},
        "tuned": {"value": tuned / n, "interval": wilson(tuned, n, confidence)},
        "difference": {"value": (tuned - base) / n, "interval": paired_difference(passed[0], passed[1], confidence)},
    }


def interval_of_counts(counts: list[int], confidence: float) -> list[float]:
    """The same, from how many questions both pass, only the tuned model, only the base, and neither."""
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
