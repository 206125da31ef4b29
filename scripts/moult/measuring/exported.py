"""An export beside the merged model that it was made of: the paired difference, and what is said of it."""

from typing import TypedDict

from tabulate import tabulate

from moult.measuring.paired import (
    PairedLikelihood,
    Shift,
    clear_pairs,
    compare_answers,
    compare_likelihoods,
    counted,
)

# From the worst to the best.
VERDICTS = ("hurt", "inconclusive", "helped")


class Flips(TypedDict):
    """The questions, [kind, id], that only one of the two passes."""

    only_merged: list[list[str]]
    only_export: list[list[str]]


class Against(TypedDict):
    """The export minus the merged model. Of `likelihood` and `answers` (PairedAnswers but for its places, of all questions with
    checks), a is the merged model, and b the export. None: it was not measured of both, or nothing is checked."""

    likelihood: PairedLikelihood | None
    answers: dict | None
    flips: Flips | None
    sentence: str


def against(
    likelihood: tuple[list[dict], list[dict]] | None,
    merged: list[dict],
    export: list[dict],
    metrics: dict,
    confidence: float,
    resamples: int,
    seed: int,
) -> Against:
    """The paired difference, on the same rows and the same questions.

    Args:
        likelihood: the rows of likelihood.jsonl of both, if both have them.
        merged, export: the samples of both (comparison.compare_answers), each beside the base.
        metrics: the run's; which prompts do not count.
    """
    shift = compare_likelihoods(*likelihood, confidence, resamples, seed) if likelihood else None
    merged, export = counted(merged, metrics), counted(export, metrics)
    answers, flips = None, None
    if any(sample["tuned"]["checks"] for sample in merged):
        found = compare_answers(merged, export, confidence)
        answers = {key: value for key, value in found.items() if key not in ("only_a", "only_b")}
        flips = Flips(
            only_merged=[_question(merged[place]) for place, _ in found["only_a"]],
            only_export=[_question(export[place]) for _, place in found["only_b"]],
        )
    return {"likelihood": shift, "answers": answers, "flips": flips, "sentence": in_words(shift, answers, confidence)}


def _question(sample: dict) -> list[str]:
    return [sample["kind"], sample["id"]]


def in_words(likelihood: PairedLikelihood | None, answers: dict | None, confidence: float) -> str:
    """Where a difference is clear beside the other one (Holm), in which direction; else that none can be shown."""
    p_values = {"answers": answers["p"]} if answers else {}
    p_values |= {"likelihood": likelihood["difference"]["p"]} if likelihood else {}
    clear = clear_pairs(p_values, confidence)
    said, unclear = [], []
    if answers:
        change = answers["difference"]
        points, interval = 100 * change["value"], _interval(change, points=True)
        if "answers" in clear:
            said.append(f"{abs(points):.1f} points {'below' if points < 0 else 'above'} the merged model {interval}")
        unclear.append(f"{points:+.1f} points {interval}")
    if likelihood:
        change, unit = likelihood["difference"], likelihood["unit"]
        nats, interval = change["value"], _interval(change, points=False)
        if "likelihood" in clear:
            said.append(f"{abs(nats):.2g} {unit} {'better' if nats < 0 else 'worse'} than the merged model {interval}")
        unclear.append(f"{nats:+.2g} {unit} {interval}")
    return "; ".join(said) or f"no difference to the merged model can be shown ({', '.join(unclear)})"


def _interval(difference: Shift, points: bool) -> str:
    low, high = difference["interval"]
    return f"[{100 * low:+.1f}, {100 * high:+.1f}]" if points else f"[{low:+.2g}, {high:+.2g}]"


def sentence_of(shown: str, export: str, merged: str, against_merged: str) -> str:
    """All of it in a sentence. export, merged: the two verdicts, by the same measurements."""
    return f"{shown}: {verdict_in_words(export, merged)}; {against_merged}"


def verdict_in_words(export: str, merged: str) -> str:
    return f"still {export}" if export == merged else f"now {export} (the merged model: {merged})"


def worse_verdict(export: str, merged: str) -> bool:
    return VERDICTS.index(export) < VERDICTS.index(merged)


# --- the table --------------------------------------------------------------------------------------------------------

# Of rows_of_exports.
COLUMNS = (
    "format",
    "size",
    "of the merged model",
    "mean KL",
    "verdict",
    "against the merged model",
    "served by",
    "tokens/s",
    "checks",
)


def rows_of_exports(exports: list[dict]) -> list[tuple[str, ...]]:
    """A row for each export.json, the largest first; the cells as people read them."""
    return [
        (
            one["shown"],
            size(one["bytes"]),
            f"{100 * one['bytes'] / one['merged_bytes']:.3g} %",
            f"{one['kl']['mean_kl']:.1e}" if one["kl"] else "not told",
            verdict_in_words(one["verdict"]["verdict"], one["merged_verdict"]),
            one["against_merged"]["sentence"],
            one["engine"],
            f"{one['speed']['tokens_per_second']:,.0f}" if one["speed"] else "not measured",
            checks_of(one["checks"]),
        )
        for one in sorted(exports, key=lambda one: -one["bytes"])
    ]


def markdown_table(exports: list[dict]) -> str:
    return tabulate(rows_of_exports(exports), headers=COLUMNS, tablefmt="github", disable_numparse=True) + "\n"


def size(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def checks_of(checks: dict[str, bool | None]) -> str:
    """An export of which a check fails has no export.json: what does not hold could not be told."""
    holds = list(checks.values()).count(True)
    return f"{holds} of {len(checks)}" + (f", {len(checks) - holds} not told" if holds < len(checks) else "")
