"""Two tuned models on the same rows and the same questions: which is better, and may that be chance?

score compares each tuned model with its base. Here tuned models are compared with each other, from the files that
evaluate_tuned and score have written. Nats per token: a bootstrap over groups, in which all models have the same resamples
(intervals.py). Answers: the paired difference of two rates, and McNemar's exact test (Psychometrika 12:153, 1947). Who compares
several pairs corrects for that with `clear_pairs`: Holm's step-down test, as in verdict.py.
"""

import math
from collections.abc import Iterable
from itertools import combinations
from typing import Any, NamedTuple, TypedDict

from moult.errors import MoultError, some
from moult.measuring.intervals import compare_rates, p_value, quantiles, resample
from moult.measuring.seeds import student_p
from moult.measuring.verdict import holm

NATS, BITS = "nats per token", "bits per byte"

Pair = tuple[str, str]


class Shift(TypedDict):
    """b - a, its interval, and the p-value of the hypothesis that it is 0 (two-sided)."""

    value: float
    interval: list[float]
    p: float


class PairedLikelihood(TypedDict):
    """Of two models on n rows that both have: the loss of each, and the difference; less is better. `unit`: NATS or BITS."""

    n: int
    groups: int
    unit: str
    a: float
    b: float
    difference: Shift


class PairedAnswers(TypedDict):
    """Of two models on n questions that both have: the rate of each, the difference, and the flips; more is better.

    Attributes:
        independent: how many independent questions these are worth.
        only_a, only_b: places in a_samples and b_samples, [place, place], of the questions that only this one passes.
        mcnemar: the exact p-value of the flips alone. It takes each question for independent; difference.p does not.
        p: the larger of both.
    """

    n: int
    independent: float
    a: dict
    b: dict
    difference: Shift
    only_a: list[list[int]]
    only_b: list[list[int]]
    mcnemar: float
    p: float


# --- likelihood -------------------------------------------------------------------------------------------------------


def compare_likelihoods(
    a_rows: list[dict], b_rows: list[dict], confidence: float, resamples: int, seed: int
) -> PairedLikelihood:
    """Two models, on the rows that both have (likelihood.jsonl).

    In nats per token if both have cut each row into as many tokens; else in bits per byte, which does not depend on the
    tokenizer. Raises MoultError if there is no row that both have.
    """
    own = summed({"a": a_rows, "b": b_rows})
    a, b = (own.losses.sum(axis=0) / own.weights.sum()).tolist()
    difference, groups = resample(own.losses, own.weights, resamples, seed)[:, -1:], len(own.weights)
    return {
        "n": own.n,
        "groups": groups,
        "unit": own.unit,
        "a": a,
        "b": b,
        "difference": {
            "value": b - a,
            "interval": quantiles(difference, confidence, groups)[0],
            "p": _p(b - a, difference, confidence, groups),
        },
    }


class Summed(NamedTuple):
    """The losses of k models, summed over each group of rows, (groups, k); what they are divided by: tokens, or bytes, (groups,);
    the number of rows; and NATS or BITS."""

    losses: Any
    weights: Any
    n: int
    unit: str


def summed(rows: dict[str, list[dict]]) -> Summed:
    """Of several models, on the rows that all of them have. Raises MoultError if there is none."""
    import numpy as np

    shared = shared_rows(rows)
    first, *_ = shared.values()
    same_tokens = all(
        [row["tokens"] for row in own] == [row["tokens"] for row in first] for own in list(shared.values())[1:]
    )
    places = {group: place for place, group in enumerate(dict.fromkeys(row["group"] for row in first))}
    where = np.array([places[row["group"]] for row in first])

    def over_groups(values: list[float]):
        return np.bincount(where, weights=values, minlength=len(places))

    scale = 1.0 if same_tokens else 1 / math.log(2)
    weights = over_groups([row["tokens" if same_tokens else "bytes"] for row in first])
    weights = np.maximum(weights, 1e-9)  # the rows of a group may be without a byte of text
    losses = np.stack([over_groups([scale * row["nll"] for row in own]) for own in shared.values()], axis=1)
    return Summed(losses, weights, len(first), NATS if same_tokens else BITS)


def shared_rows(rows: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """Of each model the rows that all of them have, in the order of the first. Of one row there may be several sequences: the
    first of one is compared with the first of the other. Of two datasets, rows with one name may be two: their groups tell."""
    keyed = {name: _keyed(own) for name, own in rows.items()}
    first, *others = keyed.values()
    # Where one has cut off more of a row than the other, it is another text.
    keys = [
        key for key, row in first.items() if all(key in own and own[key]["bytes"] == row["bytes"] for own in others)
    ]
    if not keys:
        raise MoultError(
            f"{some(list(rows))} have no measured rows in common",
            "compare runs of the same dataset, with eval.perplexity: true",
        )
    return {name: [own[key] for key in keys] for name, own in keyed.items()}


def _keyed(rows: list[dict]) -> dict[tuple, dict]:
    seen: dict = {}
    return {_nth((row["id"], row["group"]), seen): row for row in rows}


def _nth(key, seen: dict) -> tuple:
    seen[key] = seen.get(key, 0) + 1
    return key, seen[key]


def _p(value: float, difference, confidence: float, groups: int) -> float:
    """From the resamples. Far out there are none left, and p would be 0: there Student's t tells more, with their deviation. A
    few groups may all change in the same direction by chance (sign test): p is not below that."""
    deviation = float(difference.std())
    by_t = student_p(value / deviation, groups - 1) if deviation and groups > 1 else float(value == 0)
    by_resamples = p_value(lambda level: quantiles(difference, level, groups)[0])
    return max(by_resamples, by_t, 2.0 ** (1 - groups))


# --- answers ----------------------------------------------------------------------------------------------------------


def compare_answers(a_samples: list[dict], b_samples: list[dict], confidence: float) -> PairedAnswers:
    """Two tuned models, on the questions that both were asked and that have the same checks (samples.jsonl).

    Raises MoultError if there are none.
    """
    return compare_all_answers({"a": a_samples, "b": b_samples}, confidence)["a", "b"]


def compare_all_answers(samples: dict[str, list[dict]], confidence: float) -> dict[Pair, PairedAnswers]:
    """Each two of several models, on the questions that all of them were asked. {(a, b): ...}, the names in their order."""
    places = shared_questions(samples)
    passed = {name: [passes(own[place]) for place in places[name]] for name, own in samples.items()}
    first = next(iter(samples))
    groups = [samples[first][place]["group"] for place in places[first]]
    found: dict[Pair, PairedAnswers] = {}
    for a, b in combinations(samples, 2):
        rates = compare_rates(passed[a], passed[b], groups, confidence)
        only: dict[bool, list[list[int]]] = {True: [], False: []}
        for place_a, place_b, of_a, of_b in zip(places[a], places[b], passed[a], passed[b], strict=True):
            if of_a != of_b:
                only[of_a].append([place_a, place_b])
        exact = mcnemar(len(only[True]), len(only[False]))
        found[a, b] = {
            "n": rates["n"],
            "independent": rates["independent"],
            "a": rates["base"],
            "b": rates["tuned"],
            "difference": rates["difference"],
            "only_a": only[True],
            "only_b": only[False],
            "mcnemar": exact,
            "p": max(exact, rates["difference"]["p"]),
        }
    return found


def counted(samples: Iterable[dict], metrics: dict) -> list[dict]:
    """The samples without the prompts that score has left out."""
    without = left_out(metrics)
    return [sample for sample in samples if sample["kind"] != "prompt" or sample["id"] not in without]


def left_out(metrics: dict) -> set[str]:
    """The ids of the prompts that do not count, because they are in the training rows (metrics.json)."""
    found = metrics["contamination"]
    return set(found["prompts"]) if found and found["policy"] == "exclude" else set()


def passes(sample: dict) -> bool:
    """Whether the tuned model's answer passes all checks."""
    return all(sample["tuned"]["checks"].values())


def shared_questions(samples: dict[str, list[dict]]) -> dict[str, list[int]]:
    """Of each model the places of the questions that all were asked and that have the same checks, in the order of the first.

    The prompt of a row is in the words of its chat template, so rows are the same if their references are; all others if their
    prompts are.
    """
    keyed = {}
    for name, own in samples.items():
        seen: dict = {}
        keyed[name] = {
            _nth(
                (s["kind"], s["id"], s["reference" if s["kind"] == "row" else "prompt"], *s["tuned"]["checks"]), seen
            ): place
            for place, s in enumerate(own)
            if s["tuned"]["checks"]
        }
    first, *others = keyed.values()
    keys = [key for key in first if all(key in own for own in others)]
    if not keys:
        raise MoultError(
            f"{some(list(samples))} have no checked question in common",
            "give the runs the same eval.prompts with expect, or the same eval.row_expect",
        )
    return {name: [own[key] for key in keys] for name, own in keyed.items()}


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact p-value, two-sided: as many flips are in one direction as in the other, but for chance (a fair coin)."""
    flips = only_a + only_b
    tail = sum(math.comb(flips, count) for count in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**flips)


# --- several pairs ----------------------------------------------------------------------------------------------------


def clear_pairs(p_values: dict, confidence: float) -> set:
    """The comparisons that are clear although there are several of them: Holm's step-down test, each with the same weight."""
    return holm(p_values, dict.fromkeys(p_values, 1.0), 1 - confidence)
