"""Which of several tuned models is the best, and whether that may be chance.

All are compared on the same rows and questions, each two of them (paired.py). The more pairs, the sooner one of them looks clear
by chance: Holm's step-down test over all pairs, of the loss and of the answers together, corrects that.
"""

from typing import NamedTuple, TypedDict

from moult.errors import MoultError
from moult.measuring.paired import Pair, Shift, clear_pairs, compare_all_answers, compare_all_likelihoods
from moult.measuring.verdict import POINTS

LOSS, ANSWERS = "loss", "answers passed"


class Behind(TypedDict):
    """How a model differs from the best one (it minus the best). is_clear: after the correction, it is more than chance."""

    difference: Shift
    p: float
    is_clear: bool


class Ranking(TypedDict):
    """By one measure. values: {name: on the shared rows}, the best first. behind: all but the best, in the same order. n: how
    many rows or questions all have."""

    unit: str
    n: int
    values: dict[str, float]
    behind: dict[str, Behind]


class Rankings(TypedDict):
    """by: {LOSS or ANSWERS: its ranking}. without: {measure: why it has none}. comparisons: how many the correction is for."""

    by: dict[str, Ranking]
    without: dict[str, str]
    comparisons: int


class _Compared(NamedTuple):
    """Two models by one measure."""

    a: float
    b: float
    difference: Shift
    p: float
    n: int
    unit: str


def rank(
    likelihoods: dict[str, list[dict]], samples: dict[str, list[dict]], confidence: float, resamples: int, seed: int
) -> Rankings:
    """Of several models: {name: likelihood.jsonl}, {name: samples.jsonl}. What was not measured of a model does not count."""
    compared: dict[str, dict[Pair, _Compared]] = {}
    without: dict[str, str] = {}
    for measure, compare in (
        (LOSS, lambda: _by_loss(likelihoods, confidence, resamples, seed)),
        (ANSWERS, lambda: _by_answers(samples, confidence)),
    ):
        try:
            compared[measure] = compare()
        except MoultError as error:
            without[measure] = error.what
    p_values = {(measure, pair): found.p for measure, pairs in compared.items() for pair, found in pairs.items()}
    clear = clear_pairs(p_values, confidence)
    return {
        "by": {
            measure: _ranking(pairs, {pair for of, pair in clear if of == measure}, 1 if measure == ANSWERS else -1)
            for measure, pairs in compared.items()
            if pairs
        },
        "without": without,
        "comparisons": len(p_values),
    }


def _by_loss(likelihoods: dict[str, list[dict]], confidence: float, resamples: int, seed: int) -> dict[Pair, _Compared]:
    there = {name: rows for name, rows in likelihoods.items() if rows}
    pairs = compare_all_likelihoods(there, confidence, resamples, seed) if len(there) > 1 else {}
    return {
        pair: _Compared(one["a"], one["b"], one["difference"], one["difference"]["p"], one["n"], one["unit"])
        for pair, one in pairs.items()
    }


def _by_answers(samples: dict[str, list[dict]], confidence: float) -> dict[Pair, _Compared]:
    there = {name: own for name, own in samples.items() if any(sample["tuned"]["checks"] for sample in own)}
    pairs = compare_all_answers(there, confidence) if len(there) > 1 else {}
    return {
        pair: _Compared(one["a"]["value"], one["b"]["value"], one["difference"], one["p"], one["n"], POINTS)
        for pair, one in pairs.items()
    }


def _ranking(pairs: dict[Pair, _Compared], clear: set[Pair], sign: int) -> Ranking:
    """`sign`: 1 if more is better, else -1. The first by name of those that are equally good is the best."""
    values = {name: value for (a, b), one in pairs.items() for name, value in ((a, one.a), (b, one.b))}
    best, *others = sorted(values, key=lambda name: (-sign * values[name], name))
    behind: dict[str, Behind] = {}
    for name in others:
        pair = (best, name) if (best, name) in pairs else (name, best)
        one = pairs[pair]
        difference = one.difference if pair[0] == best else _turned(one.difference)
        behind[name] = {"difference": difference, "p": one.p, "is_clear": pair in clear}
    first = next(iter(pairs.values()))
    return {
        "unit": first.unit,
        "n": first.n,
        "values": {name: values[name] for name in (best, *others)},
        "behind": behind,
    }


def _turned(difference: Shift) -> Shift:
    low, high = difference["interval"]
    return {"value": -difference["value"], "interval": [-high, -low], "p": difference["p"]}
