"""The ranking of tuned models, each trained with one or several seeds, by their loss on the same rows; and what is sure of it.

Two things can make a difference that is none. Other test rows would have given other losses: all models are measured on the same
rows, and resampled together (a bootstrap over groups, intervals.py). And another seed would have given another model, as those of
a run do. A difference is real if it is larger than what the rows explain, than what the seeds explain (Welch's t test, Biometrika
34:28, 1947), and than what both explain together: their variances add up, with the degrees of freedom of Satterthwaite
(Biometrics Bulletin 2:110, 1946).

The best of many is the best by luck in part, and to test it against the others is to test the largest differences there are. So
each difference counts as one of all pairs of runs (Holm's correction). A winner is called if the best is better than each other
run. All of these tests must hold at once, and for that the largest p-value needs no correction (intersection-union test, Berger,
Technometrics 24:295, 1982): of runs that tie for the best, one would have to beat all others by chance. tests/test_ranking.py
simulates sweeps.
"""

import math
from itertools import combinations
from typing import TypedDict

from moult.measuring.intervals import resample
from moult.measuring.paired import summed
from moult.measuring.seeds import student, student_p

# A source of noise: the square of its standard error, and the degrees of freedom from which that was estimated.
Source = tuple[float, int]


class Loss(TypedDict):
    """Of a run: its mean over the seeds, with an interval; of each seed; their standard deviation, None if there is one seed."""

    value: float
    interval: list[float]
    by_seed: list[float]
    standard_deviation: float | None


class Behind(TypedDict):
    """By how much a run's loss is larger than that of the best. The interval is for this difference alone.

    corrected_p: by Holm, for all pairs of runs; or the largest p of all that are behind, if that is smaller.
    worse: corrected_p is at most 1 - confidence.
    """

    value: float
    interval: list[float]
    p: float
    corrected_p: float
    worse: bool


class Place(TypedDict):
    """A run in the ranking. behind: None for the best."""

    run: str
    loss: Loss
    behind: Behind | None


class Ranking(TypedDict):
    """places: the best first. level: the runs that cannot be told from the best, itself included. winner: the best, if it is the
    only one of these. pairs: how many were compared. between_seeds: the standard deviation between the seeds of a run, pooled
    over the runs; None if there is one seed. unit: nats per token, or bits per byte for models with other tokens (paired.py).
    """

    unit: str
    sequences: int
    groups: int
    confidence: float
    pairs: int
    between_seeds: float | None
    winner: str | None
    level: list[str]
    places: list[Place]


def rank(runs: dict[str, list[list[dict]]], confidence: float, resamples: int, seed: int) -> Ranking:
    """Rank `runs`: {name: of each of its seeds the rows of likelihood.jsonl}, each with as many seeds.

    On the rows that all have. Raises MoultError if there are none.
    """
    trained = {f"{name}, seed {seed}": rows for name, of in runs.items() for seed, rows in enumerate(of)}
    found = summed(trained)
    groups, count, seeds = len(found.weights), len(runs), len(trained) // len(runs)
    losses, weights = found.losses.reshape(groups, count, seeds), found.weights
    by_seed = losses.sum(axis=0) / weights.sum()
    means = by_seed.mean(axis=1)
    # Of the mean over the seeds: which rows are in a resample is the same for all.
    ratios = resample(losses.mean(axis=2), weights, resamples, seed)[:, :-1]
    larger = groups / max(1, groups - 1)  # the variance of the bootstrap is too small by that
    of_seeds: list[list[Source]] = [
        [(float(own.var(ddof=1)) / seeds, seeds - 1)] if seeds > 1 else [] for own in by_seed
    ]

    def of_rows(values) -> list[Source]:
        return [(larger * float(values.var()), max(1, groups - 1))]

    def test(i: int, j: int) -> tuple[list[list[Source]], float]:
        noise = explanations(of_rows(ratios[:, i] - ratios[:, j]), of_seeds[i] + of_seeds[j])
        # A few groups may all change in the same direction by chance (sign test).
        return noise, max(p_of(float(means[i] - means[j]), noise), 2.0 ** (1 - groups))

    names, order = list(runs), sorted(range(count), key=lambda index: float(means[index]))
    best = order[0]
    tests = {(i, j): test(i, j) for i, j in combinations(order, 2)}  # so those with the best are (best, other)
    corrected = holm_corrected({pair: p for pair, (_, p) in tests.items()})
    all_at_once = max((p for (first, _), (_, p) in tests.items() if first == best), default=0.0)
    places: list[Place] = []
    for index in order:
        value = float(means[index])
        error = error_of(explanations(of_rows(ratios[:, index]), of_seeds[index]), confidence)
        loss: Loss = {
            "value": value,
            "interval": [value - error, value + error],
            "by_seed": by_seed[index].tolist(),
            "standard_deviation": float(by_seed[index].std(ddof=1)) if seeds > 1 else None,
        }
        behind: Behind | None = None
        if index != best:
            noise, p = tests[best, index]
            difference, error = value - float(means[best]), error_of(noise, confidence)
            corrected_p = min(corrected[best, index], all_at_once)
            behind = {
                "value": difference,
                "interval": [difference - error, difference + error],
                "p": p,
                "corrected_p": corrected_p,
                "worse": corrected_p <= 1 - confidence,
            }
        places.append({"run": names[index], "loss": loss, "behind": behind})
    level = [place["run"] for place in places if not (place["behind"] and place["behind"]["worse"])]
    return {
        "unit": found.unit,
        "sequences": found.n,
        "groups": groups,
        "confidence": confidence,
        "pairs": len(tests),
        "between_seeds": math.sqrt(float(by_seed.var(axis=1, ddof=1).mean())) if seeds > 1 else None,
        "winner": level[0] if len(level) == 1 else None,
        "level": level,
        "places": places,
    }


def of_runs(names: list[str], items: list) -> dict[str, list]:
    """{run: its own items}, of as many for each run (one for each seed), in the order of the runs."""
    each = len(items) // len(names)
    return {name: items[each * place : each * (place + 1)] for place, name in enumerate(names)}


# --- the tests --------------------------------------------------------------------------------------------------------


def explanations(rows: list[Source], seeds: list[Source]) -> list[list[Source]]:
    """What could explain a difference: the rows, the seeds if there are several, and both."""
    return [rows, seeds, rows + seeds] if seeds else [rows]


def together(sources: list[Source]) -> tuple[float, int]:
    """(standard error, degrees of freedom) of independent sources of noise. Satterthwaite's, rounded down."""
    variance = sum(square for square, _ in sources)
    spread = sum(square**2 / df for square, df in sources)
    # No noise at all is known as well as the least known source.
    df = int(variance**2 / spread * (1 + 1e-12)) if spread else min(df for _, df in sources)
    return math.sqrt(variance), max(1, df)


def p_of(difference: float, noise: list[list[Source]]) -> float:
    """Two-sided: how often each of `noise` alone makes such a difference; the largest."""
    found = [1.0 if difference == 0 else 0.0]
    for sources in noise:
        error, df = together(sources)
        if error:
            found.append(student_p(difference / error, df))
    return max(found)


def error_of(noise: list[list[Source]], confidence: float) -> float:
    """How far a value can be from the truth: the largest that one of `noise` says. An interval with it leaves 0 out just if
    `p_of` is below 1 - confidence."""
    return max(error * student(confidence, df) for error, df in map(together, noise))


def holm_corrected(p_values: dict) -> dict:
    """Holm's p-values: at each level those below it are what his step-down test calls clear (Scandinavian Journal of Statistics
    6:65, 1979)."""
    corrected, largest = {}, 0.0
    for done, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - done) * p_values[name]))
        corrected[name] = largest
    return corrected
