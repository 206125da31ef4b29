"""Write the page and the table of all runs: what each has gained and cost, and which is the best of its dataset.

    python scripts/summary.py --settings '{"demo": {"dataset": "demo", "confidence": 0.95, ...}, ...}' \\
        --runs results/demo results/demo-r64 --page results/summary.html --table results/summary.tsv

Runs are compared on the rows and questions that all runs of the dataset have. The table has a line for each run, with all digits.
"""

import csv
import io
from pathlib import Path
from typing import Any

from moult.errors import MoultError
from moult.files import read_json, read_jsonl, sha256_text, write_text
from moult.measuring.answer_ranking import rank_answers
from moult.measuring.cost import cost_of
from moult.measuring.measured import Measured, measured
from moult.measuring.paired import counted
from moult.measuring.ranking import rank
from moult.measuring.table import between_seeds
from moult.measuring.verdict import POINTS
from moult.pages.page import write_page
from moult.run.cli import stage_parser
from moult.run.stage import stage

# So many runs are in the chart: of each dataset the best first.
CHART_ROWS = 60


def main() -> None:
    parser = stage_parser(__doc__, "summary", reads="of each run dataset, confidence, resamples, seed")
    parser.add_argument("--runs", nargs="*", default=[], help="the folder of each run")
    parser.add_argument("--page", required=True, help="the page to write")
    parser.add_argument("--table", required=True, help="the table to write, tab-separated")
    args = parser.parse_args()

    with stage("summary", args.log_file, args.settings) as log:
        summarise(args.settings, args, log)


def summarise(settings: dict, args, log) -> None:
    from moult.pages.charts import figure
    from moult.pages.run_charts import forest, line

    folders = {Path(folder).name: Path(folder) for folder in args.runs}
    runs = [read_run(name, folder, settings[name]["dataset"]) for name, folder in folders.items()]
    datasets = []
    for dataset in dict.fromkeys(run["dataset"] for run in runs):
        own = [run for run in runs if run["dataset"] == dataset]
        options = {key: settings[own[0]["run"]][key] for key in ("confidence", "resamples", "seed")}
        ranked, without = rankings(own, folders, options) if len(own) > 1 else ([], [])
        order_by(own, ranked)
        told = [in_words(ranking, options["confidence"]) for ranking in ranked] + without
        datasets.append({"name": dataset, "runs": own, "ranked": ranked, "told": told})
    runs = [run for dataset in datasets for run in dataset["runs"]]
    measures = list(dict.fromkeys(name for run in runs for name in run["measures"]))
    losses = {run["run"]: run["measures"]["loss"] for run in runs if "loss" in run["measures"]}
    bars = [line(run, loss["unit"], loss) for run, loss in losses.items()]
    write_text(args.table, table(runs, measures))
    write_page(
        args.page,
        "summary.html",
        runs=runs,
        datasets=[dataset for dataset in datasets if dataset["told"]],
        measures=measures,
        verdicts=sorted({run["verdict"] for run in runs}),
        points=POINTS,
        chart=figure(
            "Loss of each run minus that of its base, in nats per token on its test rows, with its interval. Less is better; an "
            "interval that contains 0 may be chance."
            + (f" The first {CHART_ROWS} of {len(bars)} runs." if len(bars) > CHART_ROWS else ""),
            lambda width: forest(bars[:CHART_ROWS], "nats per token", width),
        )
        if bars
        else "",
    )
    log.info("%s: %d runs of %d datasets", args.page, len(runs), len(datasets))


# --- what the runs have made ------------------------------------------------------------------------------------------


def read_run(name: str, folder: Path, dataset: str) -> dict[str, Any]:
    """One line of the table."""
    metrics, adapter = read_json(folder / "metrics.json"), read_json(folder / "adapter.json")
    train, cost = adapter["settings"]["train"], cost_of(adapter)
    by_steps = train.get("max_steps", -1) > 0
    seeds = metrics["seeds"]
    return {
        "run": name,
        "dataset": dataset,
        "base": metrics["provenance"]["base"]["name"],
        "verdict": metrics["verdict"]["verdict"],
        "measures": measured(metrics),
        "learning_rate": train.get("learning_rate"),
        "r": adapter["settings"]["lora"].get("r"),
        "epochs": None if by_steps else train.get("num_train_epochs"),
        "steps": adapter["ended"]["step"],
        "seeds": 1 if seeds is None else len(seeds["trained"]),
        "between_seeds": between_seeds(seeds).strip().split("\n") if seeds else [],
        "gpus": cost.gpus,
        "hours": cost.seconds / 3600,
        "hours_of": cost.device,
        "tokens": None if cost.speed is None else round(cost.speed * adapter["throughput"]["seconds"]),
        "metrics": metrics,
    }


def read_measurements(runs: list[dict], folders: dict[str, Path]) -> tuple[dict, dict]:
    """{run: rows of likelihood.jsonl}, {run: samples}, of runs that have any; of the samples only what tells questions apart, and
    the checks."""
    likelihoods, samples = {}, {}
    for run in runs:
        folder = folders[run["run"]]
        likelihoods[run["run"]] = list(read_jsonl(folder / "tuned" / "likelihood.jsonl"))
        slim = (
            {
                **{key: sample[key] for key in ("kind", "id", "group")},
                **{key: sha256_text(str(sample[key])) for key in ("prompt", "reference")},
                "tuned": {"checks": sample["tuned"]["checks"]},
            }
            for sample in read_jsonl(folder / "samples.jsonl")
        )
        samples[run["run"]] = counted(slim, run["metrics"])
    checked = {run: own for run, own in samples.items() if any(sample["tuned"]["checks"] for sample in own)}
    return {run: rows for run, rows in likelihoods.items() if rows}, checked


# --- the best ---------------------------------------------------------------------------------------------------------


def rankings(runs: list[dict], folders: dict[str, Path], options: dict) -> tuple[list[dict], list[str]]:
    """By loss, and by the answers that pass: [{"measure", "unit", "scale", "n", "pairs", "level", "places"}], as far as at least
    two runs have that; and why there is no ranking, where there is none."""
    likelihoods, samples = read_measurements(runs, folders)
    ranked, without = [], []
    if len(likelihoods) > 1:
        try:
            loss = rank({run: [rows] for run, rows in likelihoods.items()}, **options)
            places = [{**place, "value": place["loss"]["value"]} for place in loss["places"]]
            about = {"measure": "loss", "unit": loss["unit"], "scale": 1, "n": loss["sequences"], "of": "rows"}
            ranked.append({**about, "pairs": loss["pairs"], "level": loss["level"], "places": places})
        except MoultError as error:
            without.append(f"The losses cannot be compared: {error.what}.")
    if len(samples) > 1:
        try:
            about = {"measure": "answers that pass", "unit": POINTS, "scale": 100, "of": "questions"}
            ranked.append({**about, **rank_answers(samples, options["confidence"])})
        except MoultError as error:
            without.append(f"The answers cannot be compared: {error.what}.")
    return ranked, without


def order_by(runs: list[dict], ranked: list[dict]) -> None:
    """The best first, by loss, else by answers; those that have neither last."""
    places = [place["run"] for place in ranked[0]["places"]] if ranked else []
    runs.sort(key=lambda run: (places.index(run["run"]) if run["run"] in places else len(places), run["run"]))


def in_words(ranking: dict, confidence: float) -> str:
    """Which is the best, and whether the second is really behind it."""
    best, second, *_ = ranking["places"]
    behind, scale = second["behind"], ranking["scale"]
    value, low, high = (f"{scale * limit:+.3g}" for limit in (behind["value"], *behind["interval"]))
    reached = f"{scale * best['value']:.4g} {'%' if ranking['unit'] == POINTS else ranking['unit']}"
    level = f"p = {behind['corrected_p']:.2g}; {confidence:.0%} confidence"
    if ranking["pairs"] > 1:
        level += f", corrected for {ranking['pairs']} pairs of runs by Holm's method"
    text = (
        f"By {ranking['measure']}, {best['run']} is the best: {reached} on the {ranking['n']:,} {ranking['of']} that all have. "
        f"The second, {second['run']}, has {value} {ranking['unit']} [{low}, {high}]. "
        f"This {'is more than' if behind['worse'] else 'may be'} chance ({level})."
    )
    equal = [run for run in ranking["level"] if run != best["run"]]
    if len(equal) > 1:
        text += f" Not clearly behind the best: {', '.join(equal)}."
    return text


# --- how it is shown --------------------------------------------------------------------------------------------------


def table(runs: list[dict], measures: list[str]) -> str:
    """Tab-separated, a line for each run; what was not measured is empty. Rates are in points (hundredths)."""
    facts = ["run", "dataset", "base", "verdict"]
    costs = ["learning_rate", "r", "epochs", "steps", "seeds", "gpus", "hours", "hours_of", "tokens"]
    parts = ["base", "tuned", "difference", "low", "high", "p"]
    file = io.StringIO()
    writer = csv.writer(file, "excel-tab", lineterminator="\n")
    writer.writerow([*facts, *(f"{measure}: {part}" for measure in measures for part in parts), *costs])
    for run in runs:
        figures = [figure for measure in measures for figure in row_of(run["measures"].get(measure))]
        writer.writerow([run[name] for name in facts] + figures + [run[name] for name in costs])
    return file.getvalue()


def row_of(measure: Measured | None) -> list:
    if measure is None:
        return [None] * 6
    difference = measure["difference"]
    return [
        measure["base"]["value"],
        measure["tuned"]["value"],
        difference["value"],
        *difference["interval"],
        difference["p"],
    ]


if __name__ == "__main__":
    main()
