"""Write the page that shows what differs between two runs, and which is the better one.

    python scripts/compare.py --settings '{"confidence": 0.95, "resamples": 10000, "seed": 0}' \\
        --runs results/demo results/demo-r64 --prepared results/prepared/demo results/prepared/demo \\
        --tokens results/demo/tokens results/demo/tokens --page results/compare/demo..demo-r64.html

It reads what was made, not the config: settings are those that the stages have kept with their results.
"""

import json
import math
from itertools import chain
from pathlib import Path

from moult.data.changed_rows import Changed, changed_rows
from moult.errors import MoultError
from moult.files import read_json, read_jsonl
from moult.measuring.cost import cost_of
from moult.measuring.differences import ENVIRONMENT, MEASURING, Difference, Files, choices, differences, first_to_differ
from moult.measuring.measured import measured
from moult.measuring.paired import (
    NATS,
    PairedAnswers,
    PairedLikelihood,
    Shift,
    clear_pairs,
    compare_answers,
    compare_likelihoods,
    counted,
    shared_rows,
)
from moult.measuring.verdict import POINTS
from moult.pages.page import shown, write_page
from moult.run.cli import stage_parser
from moult.run.stage import stage

# How much of each list is on the page: answers that flipped, in each direction; rows whose loss changed most, in each direction;
# rows of the datasets, of each kind.
FLIPS, ROWS, EXAMPLES = 100, 15, 10
# A text is cut there, so that the page stays below 3 MB.
TEXT = 1_000
# So many differences of settings are in the first sentences.
NAMED = 4


def main() -> None:
    parser = stage_parser(__doc__, "compare", reads="confidence, resamples, seed")
    parser.add_argument("--runs", nargs=2, required=True, help="the folders of the two runs")
    parser.add_argument("--prepared", nargs=2, required=True, help="the folders of their prepared rows")
    parser.add_argument("--tokens", nargs=2, required=True, help="the folders of their tokens")
    parser.add_argument("--page", required=True, help="the page to write")
    args = parser.parse_args()

    with stage("compare", args.log_file, args.settings) as log:
        compare(args.settings, args, log)


def compare(settings: dict, args, log) -> None:
    names = [Path(folder).name for folder in args.runs]
    both = [read_files(*folders) for folders in zip(args.runs, args.prepared, args.tokens, strict=True)]
    found = differences(*both)
    samples = [read_samples(run, files["metrics"]) for run, files in zip(args.runs, both, strict=True)]
    likelihoods = [list(read_jsonl(Path(run) / "tuned" / "likelihood.jsonl")) for run in args.runs]
    options = {key: settings[key] for key in ("confidence", "resamples", "seed")}
    why_not: dict[str, str] = {}
    loss: PairedLikelihood | None = None
    answers: PairedAnswers | None = None
    try:
        loss = compare_likelihoods(*likelihoods, **options)
    except MoultError as error:
        why_not["loss"] = error.what
    try:
        answers = compare_answers(*samples, options["confidence"])
    except MoultError as error:
        why_not["answers"] = error.what
    clear = clear_pairs(p_values(loss, answers), options["confidence"])
    rows = row_losses(likelihoods, loss["unit"], read_texts(args.prepared, both)) if loss else []
    same_rows = Path(args.prepared[0]) == Path(args.prepared[1])
    write_page(
        args.page,
        "compare.html",
        a=names[0],
        b=names[1],
        headline=f"{better_one(names, loss, answers, clear)}. {cause(names, found)}.",
        facts=[*facts(names, loss, answers, clear, options["confidence"]), caution(found)],
        found=found,
        stages=list(dict.fromkeys(difference.stage for difference in found)),
        changed=None
        if same_rows
        else dataset_view(changed_rows(*(Path(folder) / "train.jsonl" for folder in args.prepared), EXAMPLES)),
        loss=loss,
        answers=answers,
        why_not=why_not,
        histogram=histogram(names, rows, loss["unit"]) if loss else "",
        most=changed_most(rows),
        total=len(rows),
        flips=flips(samples, answers) if answers else [],
        flipped=[len(answers["only_a"]), len(answers["only_b"])] if answers else [0, 0],
        limit=FLIPS,
        measures=side_by_side([files["metrics"] for files in both]),
        verdicts=[files["metrics"]["verdict"] for files in both],
        costs=[cost_of(files["adapter"]) for files in both],
        points=POINTS,
        confidence=f"{100 * options['confidence']:g} %",
    )
    log.info("%s: %d differences", args.page, len(found))


def read_files(run: str, prepared: str, tokens: str) -> Files:
    folder = Path(run)
    return {
        "ledger": read_json(Path(prepared) / "metadata.json"),
        "tokens": read_json(Path(tokens) / "report.json"),
        "plan": read_json(folder / "plan.json"),
        "adapter": read_json(folder / "adapter.json"),
        "merge": read_json(folder / "merge.json"),
        "metrics": read_json(folder / "metrics.json"),
    }


def read_samples(run: str, metrics: dict) -> list[dict]:
    """The samples that count, as a page shows them: long texts are cut at once, so that memory does not depend on them."""
    cut = (
        {
            **{key: sample[key] for key in ("kind", "id", "group")},
            "prompt": shown(sample["prompt"], TEXT),
            "reference": None if sample["reference"] is None else shown(sample["reference"], TEXT),
            "tuned": {"answer": shown(sample["tuned"]["answer"], TEXT), "checks": sample["tuned"]["checks"]},
        }
        for sample in read_jsonl(Path(run) / "samples.jsonl")
    )
    return counted(cut, metrics)


# --- the answer in words ----------------------------------------------------------------------------------------------


def p_values(loss: PairedLikelihood | None, answers: PairedAnswers | None) -> dict[str, float]:
    return ({"loss": loss["difference"]["p"]} if loss else {}) | ({"answers": answers["p"]} if answers else {})


def better_one(names: list[str], loss: PairedLikelihood | None, answers: PairedAnswers | None, clear: set[str]) -> str:
    """Which is better, as far as the rows show it."""
    a, b = names
    gains = ({"loss": -loss["difference"]["value"]} if loss else {}) | (
        {"answers": answers["difference"]["value"]} if answers else {}
    )
    if not gains:
        return f"{a} and {b} have nothing in common that was measured"
    better = {(b, a) if gains[name] > 0 else (a, b) for name in gains if name in clear}
    if len(better) == 1:
        winner, loser = better.pop()
        open_question = {"loss": "; their losses may be equal", "answers": "; their answers may be equally good"}
        return f"{winner} is better than {loser}" + "".join(open_question[name] for name in gains if name not in clear)
    if better:
        winner, loser = (b, a) if gains["loss"] > 0 else (a, b)
        return f"{winner} has the lower loss, but {loser} answers better"
    return f"There is no clear difference between {a} and {b}"


def facts(
    names: list[str], loss: PairedLikelihood | None, answers: PairedAnswers | None, clear: set[str], level: float
) -> list[str]:
    """How far b is from a, and how sure that is."""
    a, b = names
    told = []
    if loss:
        told.append(
            f"Loss: {b} has {in_words(loss['difference'], loss['unit'])} against {a}, on {loss['n']:,} rows. Less is better. "
            f"{chance('loss' in clear)} (p = {loss['difference']['p']:.2g})."
        )
    if answers:
        told.append(
            f"Answers that pass: {b} has {in_words(answers['difference'], POINTS)} against {a}, on {answers['n']:,} questions. "
            f"More is better. {chance('answers' in clear)} (p = {answers['p']:.2g})."
        )
    if told:
        correction = ", with Holm's correction for both comparisons" if len(told) > 1 else ""
        told.append(
            f"In brackets the {level:.0%} intervals. More than chance means: at {level:.0%} confidence{correction}."
        )
    return told


def in_words(difference: Shift, unit: str) -> str:
    scale = 100 if unit == POINTS else 1
    value, low, high = (f"{scale * limit:+.3g}" for limit in (difference["value"], *difference["interval"]))
    return f"{value} {unit} [{low}, {high}]"


def chance(clear: bool) -> str:
    return "This is more than chance" if clear else "This may be chance"


def cause(names: list[str], found: list[Difference]) -> str:
    """Where two runs part: the first stage that differs, and the settings."""
    stage, settings = first_to_differ(found), choices(found)
    if stage is None:
        return "Nothing differs between them"
    if stage in MEASURING:
        return "They differ only in how they were measured"
    if not settings:
        kind = "software or hardware" if any(one.kind == ENVIRONMENT for one in found) else "results"
        return f"They have the same settings; the first stage that differs is {stage}, in its {kind}"
    told = [f"{one.key} ({value(one.a)} → {value(one.b)})" for one in settings[:NAMED]]
    if len(settings) > NAMED:
        told.append(f"{len(settings) - NAMED} more")
    what = told[0] if len(told) == 1 else f"{', '.join(told[:-1])} and {told[-1]}"
    only = "only " if len(settings) == 1 else ""
    return f"Changed from {names[0]} to {names[1]}: {only}{what}; the first stage that differs is {stage}"


def caution(found: list[Difference]) -> str:
    """How far what differs can be the reason."""
    settings = [one.key for one in choices(found)]
    if settings == ["seed"]:
        return "Only the seed differs, so what is different is the luck of the training."
    if len(settings) == 1:
        return (
            "No other setting differs: the reason is this one, or the luck of the training (several seeds would tell)."
        )
    if settings:
        return f"{len(settings)} settings differ: the reason may be any of them, or all of them together."
    return ""


def value(thing: object) -> str:
    """As YAML has it."""
    return "not set" if thing is None else shown(thing if isinstance(thing, str) else json.dumps(thing), 200)


# --- the parts of the page --------------------------------------------------------------------------------------------


def dataset_view(changed: Changed) -> dict:
    examples = changed["examples"]
    return {
        **changed,
        "added": (changed["added"], [(row["id"], text_of(row)) for row in examples["added"]]),
        "removed": (changed["removed"], [(row["id"], text_of(row)) for row in examples["removed"]]),
        "changed": (changed["changed"], [(a["id"], text_of(a), text_of(b)) for a, b in examples["changed"]]),
    }


def text_of(row: dict) -> str:
    text = row.get("text")
    if text is None:
        text = "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in row["messages"])
    return shown(text, TEXT)


def read_texts(prepared: list[str], both: list[Files]) -> dict[str, str]:
    """{id: text} of the rows that were measured, as far as a page shows them."""
    path = Path(prepared[0]) / f"{both[0]['metrics']['data']['measured_on']}.jsonl"
    return {row["id"]: text_of(row) for row in read_jsonl(path)}


def row_losses(likelihoods: list[list[dict]], unit: str, texts: dict[str, str]) -> list[dict]:
    """Of each shared row the loss of both and b - a, in `unit`, the row with the largest gain of b first."""
    a_rows, b_rows = shared_rows({"a": likelihoods[0], "b": likelihoods[1]}).values()
    size, scale = ("tokens", 1.0) if unit == NATS else ("bytes", 1 / math.log(2))
    found = []
    for a, b in zip(a_rows, b_rows, strict=True):
        ours, theirs = (scale * row["nll"] / max(1, row[size]) for row in (a, b))
        found.append({"id": a["id"], "a": ours, "b": theirs, "change": theirs - ours, "text": texts.get(a["id"], "")})
    return sorted(found, key=lambda row: row["change"])


def changed_most(rows: list[dict]) -> list[dict]:
    """Those in which b gained most, then those in which it lost most."""
    gained = [row for row in rows if row["change"] < 0]
    lost = [row for row in reversed(rows) if row["change"] > 0]
    return gained[:ROWS] + lost[:ROWS]


def histogram(names: list[str], rows: list[dict], unit: str):
    from moult.pages.charts import figure
    from moult.pages.pair_charts import changes

    return figure(
        f"Of how many rows the loss changed by how much: {unit} of {names[1]} minus {names[0]}. Left of 0, {names[1]} is "
        "better. The outermost bars hold all that is farther out.",
        lambda width: changes([row["change"] for row in rows], unit, width),
    )


def flips(samples: list[list[dict]], answers: PairedAnswers) -> list[dict]:
    """The questions that only one of the two answers rightly: as many that b lost as that b won."""
    return [
        flip_view(direction, samples[0][place_a], samples[1][place_b])
        for direction, places in (("lost", answers["only_a"]), ("won", answers["only_b"]))
        for place_a, place_b in places[:FLIPS]
    ]


def flip_view(direction: str, a: dict, b: dict) -> dict:
    answers = [(one["tuned"]["answer"], one["tuned"]["checks"]) for one in (a, b)]
    return {"direction": direction, **{key: a[key] for key in ("id", "prompt", "reference")}, "answers": answers}


def side_by_side(metrics: list[dict]) -> list[tuple]:
    """(measure, of a, of b), None where it was not measured."""
    a, b = map(measured, metrics)
    return [(name, a.get(name), b.get(name)) for name in dict.fromkeys(chain(a, b))]


if __name__ == "__main__":
    main()
