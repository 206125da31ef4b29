"""Base and another model on the same rows and the same questions, with intervals: what score says of the tuned model, and
score_export of its exports."""

import math
from collections.abc import Collection
from pathlib import Path

from moult.errors import MoultError, some
from moult.files import read_jsonl
from moult.measuring.checks import PART, check, expectations
from moult.measuring.intervals import compare_rates, p_value, quantiles, resample

# The files of a measurement: what each has a row for, and what must be the same in two of them.
QUESTIONS = {"likelihood": "sequences", "answers": "questions", "general": "texts"}
SAME = {"likelihood": ("id", "tokens"), "answers": ("kind", "id", "prompt_ids"), "general": ("id", "tokens")}


def read_side(folder: str) -> dict[str, list[dict]]:
    """What was measured of one model."""
    return {name: list(read_jsonl(Path(folder) / f"{name}.jsonl")) for name in QUESTIONS}


def check_same_questions(
    base: dict, other: dict, who: str, fix: str, names: Collection[str] = tuple(QUESTIONS)
) -> None:
    """Two models were measured on the same sequences and asked with the same token ids. `who`, `fix`: for the message.

    Raises MoultError.
    """
    for name in names:
        both = [[[row[field] for field in SAME[name]] for row in side[name]] for side in (base, other)]
        if both[0] != both[1]:
            differ = [a[1 if name == "answers" else 0] for a, b in zip(*both, strict=False) if a != b]
            raise MoultError(
                f"{who} were measured on different {QUESTIONS[name]} ({some(differ) or 'their numbers differ'})", fix
            )


# --- likelihood -------------------------------------------------------------------------------------------------------


def compare_likelihood(sides: dict, confidence: float, resamples: int, seed: int) -> dict:
    """Base, tuned and their paired difference, with intervals from a bootstrap over groups."""
    import numpy as np

    base, tuned = sides["base"]["likelihood"], sides["tuned"]["likelihood"]
    own = [row["group"] for row in base]
    tokens, size = sums(base, own, "tokens"), sums(base, own, "bytes")
    options = (confidence, resamples, seed)
    result: dict = {"base": {}, "tuned": {}, "difference": {}}
    for name, field in (("nll_per_token", "nll"), ("token_accuracy", "correct")):
        found = compare_ratios(sums(base, own, field), sums(tuned, own, field), tokens, *options)
        for side, figure in found.items():
            result[side][name] = figure
    before, after = (sums(rows, own, "nll") / math.log(2) for rows in (base, tuned))
    found = compare_ratios(before, after, np.maximum(size, 1e-9), *options)
    for side in ("base", "tuned"):
        result[side]["bits_per_byte"] = found[side]
        nll = result[side]["nll_per_token"]
        result[side]["perplexity"] = {
            "value": math.exp(nll["value"]),
            "interval": [math.exp(limit) for limit in nll["interval"]],
        }
    result["rows_better"] = sum(t["nll"] < b["nll"] for b, t in zip(base, tuned, strict=True)) / len(base)
    return result


def sums(rows: list[dict], groups: list[str], field: str):
    """(groups,) array: of each group, in the order of the first rows, the sum over its rows."""
    import numpy as np

    place = {group: index for index, group in enumerate(dict.fromkeys(groups))}
    total = np.zeros(len(place))
    for row, group in zip(rows, groups, strict=True):
        total[place[group]] += row[field]
    return total


def compare_ratios(base, tuned, weights, confidence: float, resamples: int, seed: int) -> dict:
    """Of sums over clusters, (clusters,) arrays, the ratios base / weights and tuned / weights, and their difference."""
    import numpy as np

    columns, clusters = np.stack([base, tuned], axis=1), len(weights)
    ratios = resample(columns, weights, resamples, seed)
    values = (columns.sum(axis=0) / weights.sum()).tolist()
    intervals = quantiles(ratios, confidence, clusters)
    found = {
        side: {"value": value, "interval": interval}
        for side, value, interval in zip(
            ("base", "tuned", "difference"), [*values, values[1] - values[0]], intervals, strict=True
        )
    }
    found["difference"]["p"] = p_value(lambda level: quantiles(ratios[:, -1:], level, clusters)[0])
    return found


def compare_general(sides: dict, guess: float | None, **options) -> dict | None:
    """The likelihood of the general text: each text is a cluster. None if the tokenizer can write none of them.

    `guess`: what a guess over the vocabulary takes, in nats per token, if that is known.
    """
    base, tuned = sides["base"]["general"], sides["tuned"]["general"]
    if not base:
        return None
    own = [row["id"] for row in base]
    tokens = sums(base, own, "tokens")
    result = compare_ratios(sums(base, own, "nll"), sums(tuned, own, "nll"), tokens, **options)
    kinds = [row["id"].split("-")[0] for row in base]
    shift = sums(tuned, kinds, "nll") - sums(base, kinds, "nll")
    by_kind = dict(zip(dict.fromkeys(kinds), (shift / sums(base, kinds, "tokens")).tolist(), strict=True))
    return {
        "texts": len(base),
        "tokens": int(tokens.sum()),
        "guess": guess,
        **result,
        "by_kind": by_kind,
    }


# --- answers ----------------------------------------------------------------------------------------------------------


def compare_answers(sides: dict, settings: dict, left_out: Collection[str] = ()) -> tuple[dict, list[dict]]:
    """The pass rates of every check for prompts, rows, instructions and all together, and each question with both answers.
    `left_out`: ids of prompts that do not count, because they are in the training rows."""
    expected = expectations(settings)
    samples = []
    for base, tuned in zip(sides["base"]["answers"], sides["tuned"]["answers"], strict=True):
        expect = expected(base["kind"], base["id"])
        sample = {name: base[name] for name in ("kind", "id", "group", "prompt", "reference")}
        for side, row in (("base", base), ("tuned", tuned)):
            checks = check(row["answer"], expect, row["reference"])
            sample[side] = {"answer": row["answer"], "stopped": row["stopped"], "checks": checks}
        samples.append(sample)
    counted = [s for s in samples if s["kind"] != "prompt" or s["id"] not in left_out]
    parts = {
        **{part: [s for s in counted if s["kind"] == kind] for kind, part in PART.items()},
        "all": counted,
    }
    return {name: summarise(part, settings["confidence"]) for name, part in parts.items() if part}, samples


def summarise(samples: list[dict], confidence: float) -> dict:
    def compared(part: list[dict], holds) -> dict:
        base, tuned = ([holds(sample[side]) for sample in part] for side in ("base", "tuned"))
        return compare_rates(base, tuned, [sample["group"] for sample in part], confidence)

    checked = [sample for sample in samples if sample["base"]["checks"]]
    names = sorted({name for sample in checked for name in sample["base"]["checks"]})
    result: dict = {"n": len(samples), "stopped": compared(samples, lambda side: side["stopped"])}
    if checked:
        result["passed"] = compared(checked, lambda side: all(side["checks"].values()))
        result["checks"] = {
            name: compared(
                [s for s in checked if name in s["base"]["checks"]],
                lambda side, name=name: side["checks"][name],
            )
            for name in names
        }
    for side in ("base", "tuned"):
        lengths = sorted(len(sample[side]["answer"]) for sample in samples)
        result.setdefault("characters", {})[side] = {
            "mean": sum(lengths) / len(lengths),
            "median": lengths[len(lengths) // 2],
            "max": lengths[-1],
        }
        result.setdefault("empty", {})[side] = sum(not sample[side]["answer"].strip() for sample in samples)
    return result
