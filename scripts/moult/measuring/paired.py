"""Two tuned models on the same rows and the same questions: which is better, and may that be chance?

score compares each tuned model with its base. Here tuned models are compared with each other, from the files that
evaluate_tuned and score have written. Nats per token: a bootstrap over groups, in which all models have the same resamples
(intervals.py). Answers: the paired difference of two rates, and McNemar's exact test (Psychometrika 12:153, 1947). Who compares
several pairs corrects for that with `clear_pairs`: Holm's step-down test, as in verdict.py.
"""

import math
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
    """Two models, on the rows that both have (likelihood.jsonl). Raises MoultError if there are none."""
    return compare_all_likelihoods({"a": a_rows, "b": b_rows}, confidence, resamples, seed)["a", "b"]


def compare_all_likelihoods(
    rows: dict[str, list[dict]], confidence: float, resamples: int, seed: int
) -> dict[Pair, PairedLikelihood]:
    """Each two of several models, on the rows that all of them have. {(a, b): ...}, the names in their order.

    In nats per token if all have cut each row into as many tokens; else in bits per byte, which does not depend on the
    tokenizer. Raises MoultError if there is no row that all have.
    """
    own = summed(rows)
    values = own.losses.sum(axis=0) / own.weights.sum()
    ratios = resample(own.losses, own.weights, resamples, seed)
    found: dict[Pair, PairedLikelihood] = {}
    for (i, a), (j, b) in combinations(enumerate(rows), 2):
        value = float(values[j] - values[i])
        difference = (ratios[:, j] - ratios[:, i])[:, None]
        found[a, b] = {
            "n": own.n,
            "groups": len(own.weights),
            "unit": own.unit,
            "a": float(values[i]),
            "b": float(values[j]),
            "difference": {
                "value": value,
                "interval": quantiles(difference, confidence, len(own.weights))[0],
                "p": _p(value, difference, confidence, len(own.weights)),
            },
        }
    return found


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
    first of one is compared with the first of the other."""
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
    return {_nth(row["id"], seen): row for row in rows}


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
    places = shared_questions(a_samples, b_samples)
    of_a = [passes(a_samples[place]) for place, _ in places]
    of_b = [passes(b_samples[place]) for _, place in places]
    rates = compare_rates(of_a, of_b, [a_samples[place]["group"] for place, _ in places], confidence)
    only: dict[bool, list[list[int]]] = {True: [], False: []}
    for both, a, b in zip(places, of_a, of_b, strict=True):
        if a != b:
            only[a].append(list(both))
    exact = mcnemar(len(only[True]), len(only[False]))
    return {
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


def passes(sample: dict) -> bool:
    """Whether the tuned model's answer passes all checks."""
    return all(sample["tuned"]["checks"].values())


def shared_questions(a_samples: list[dict], b_samples: list[dict]) -> list[tuple[int, int]]:
    """(place in a, place in b) of the same questions with the same checks, in the order of a.

    The prompt of a row is in the words of its chat template, so rows are the same if their references are; all others if their
    prompts are.
    """

    def keyed(samples: list[dict]) -> dict[tuple, int]:
        seen: dict = {}
        return {
            _nth((s["kind"], s["id"], s["reference"] if s["kind"] == "row" else s["prompt"]), seen): place
            for place, s in enumerate(samples)
            if s["tuned"]["checks"]
        }

    a, b = keyed(a_samples), keyed(b_samples)
    places = [
        (place, b[key])
        for key, place in a.items()
        if key in b and a_samples[place]["tuned"]["checks"].keys() == b_samples[b[key]]["tuned"]["checks"].keys()
    ]
    if not places:
        raise MoultError(
            "the two runs have no checked question in common",
            "give both runs the same eval.prompts with expect, or the same eval.row_expect",
        )
    return places


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact p-value, two-sided: as many flips are in one direction as in the other, but for chance (a fair coin)."""
    flips = only_a + only_b
    tail = sum(math.comb(flips, count) for count in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**flips)


# --- several pairs ----------------------------------------------------------------------------------------------------


def clear_pairs(p_values: dict, confidence: float) -> set:
    """The comparisons that are clear although there are several of them: Holm's step-down test, each with the same weight."""
    return holm(p_values, dict.fromkeys(p_values, 1.0), 1 - confidence)
