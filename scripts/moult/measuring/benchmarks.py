"""Base against tuned on a benchmark of lm-eval: paired, question by question, with the intervals of everything else.

lm-eval itself compares two models as if they had answered different questions (lm-eval#3831).
"""

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from moult.errors import MoultError, some
from moult.files import read_json, read_jsonl
from moult.measuring.intervals import compare_rates, p_value, quantiles, resample
from moult.measuring.power import smallest_effect, smallest_shift


class Answered(NamedTuple):
    """What a model has answered to a benchmark: a row for each question (samples.py), and how it was asked (harness.py)."""

    rows: list[dict]
    summary: dict


def read_answers(samples: str | Path) -> Answered:
    return Answered(list(read_jsonl(samples)), read_json(Path(samples).with_suffix(".json")))


def compare_benchmark(
    name: str,
    base: Answered,
    tuned: Answered,
    metric: str | None,
    options: dict,
    left_out: Collection[tuple[str, int]] = (),
) -> dict:
    """Each metric of a benchmark, and which of them counts; none if all questions are left out.

    Args:
        name: of the benchmark, for messages.
        metric: the one that counts; None: the task's first.
        options: confidence, resamples, seed.
        left_out: (task, doc_id) of questions that do not count.

    Raises MoultError if the two did not answer the same questions, or there is no such metric.
    """
    check_same_questions(name, base.rows, tuned.rows)
    better = {one["name"]: one["higher_is_better"] for one in tuned.summary["metrics"]}
    chosen = metric or next(iter(better))
    if chosen not in better:
        raise MoultError(
            f"eval.benchmarks: {name} has no metric {chosen} with a mean over the questions; it has: {some(better)}",
            "set its metric to one of these, or leave it out",
        )
    metrics = {}
    rows = [
        (b["values"], t["values"])
        for b, t in zip(base.rows, tuned.rows, strict=True)
        if (t["task"], t["doc_id"]) not in left_out
    ]
    for one in better:
        pairs = [(b[one], t[one]) for b, t in rows if one in b and one in t]
        if pairs:
            metrics[one] = {**compare_values(pairs, options), "higher_is_better": better[one]}
    if rows and chosen not in metrics:
        raise MoultError(
            f"eval.benchmarks: {name}: {chosen} is a number for none of the questions", "choose another metric"
        )
    summary = tuned.summary
    return {
        "metric": chosen,
        "metrics": metrics,
        "questions": len(tuned.rows),
        "left_out": len(tuned.rows) - len(rows),
        "limit": summary["limit"],
        "num_fewshot": {task: told["num_fewshot"] for task, told in summary["tasks"].items()},
        "task_versions": {task: told["version"] for task, told in summary["tasks"].items()},
        "cut": summary["cut"],
        "lm_eval": summary["versions"]["lm_eval"],
    }


def check_same_questions(name: str, base: list[dict], tuned: list[dict]) -> None:
    """Both have answered the same questions, and were shown the same prompts."""
    fields = ("task", "doc_id", "doc_hash", "prompt_hash")
    both = [[[row[field] for field in fields] for row in side] for side in (base, tuned)]
    if both[0] != both[1]:
        differ = [f"{a[0]} {a[1]}" for a, b in zip(*both, strict=False) if a != b]
        raise MoultError(
            f"base and tuned model answered different questions of {name} ({some(differ) or 'their numbers differ'})",
            "delete results/<run>/benchmark_base and benchmark_tuned, and run again",
        )


def compare_values(pairs: list[tuple[float, float]], options: dict) -> dict:
    """Base, tuned and the difference, with intervals, and the smallest difference that so many questions show.

    What is 0 or 1 for each question is a rate. Anything else is resampled, both values of a question together.
    """
    import numpy as np

    confidence, n = options["confidence"], len(pairs)
    if all(value in (0.0, 1.0) for pair in pairs for value in pair):
        base, tuned = ([bool(pair[side]) for pair in pairs] for side in (0, 1))
        rates = compare_rates(base, tuned, [str(number) for number in range(n)], confidence)
        del rates["independent"]  # all of them are
        return {**rates, "is_rate": True, "smallest_effect": smallest_effect(n, rates["base"]["value"], confidence)}
    columns = np.array(pairs)
    ratios = resample(columns, np.ones(n), options["resamples"], options["seed"])
    means = columns.mean(axis=0).tolist()
    intervals = quantiles(ratios, confidence, n)
    return {
        "n": n,
        "is_rate": False,
        "base": {"value": means[0], "interval": intervals[0]},
        "tuned": {"value": means[1], "interval": intervals[1]},
        "difference": {
            "value": means[1] - means[0],
            "interval": intervals[2],
            "p": p_value(lambda level: quantiles(ratios[:, -1:], level, n)[0]),
        },
        "smallest_effect": smallest_shift(intervals[2], confidence, confidence),
    }
