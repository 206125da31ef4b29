"""Write the page and the table of all runs: what each has gained and cost, and which is the best of its dataset.

    python scripts/summary.py --settings '{"demo": {"dataset": "demo", "confidence": 0.95, ...}, ...}' \\
        --runs results/demo results/demo-r64 --page results/summary.html --table results/summary.tsv

Runs are compared on the rows and questions that all runs of the dataset have. The table has a line for each run, with all digits.
"""

import csv
import io
from pathlib import Path
from typing import Any

from moult.files import read_json, read_jsonl, sha256_text, write_text
from moult.measuring.measured import Measured, measured
from moult.measuring.paired import counted
from moult.measuring.ranking import ANSWERS, LOSS, Ranking, Rankings, rank
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
    from moult.pages.run_charts import forest

    folders = {Path(folder).name: Path(folder) for folder in args.runs}
    runs = [read_run(name, folder, settings[name]["dataset"]) for name, folder in folders.items()]
    datasets = []
    for dataset in dict.fromkeys(run["dataset"] for run in runs):
        own = [run for run in runs if run["dataset"] == dataset]
        options = {key: settings[own[0]["run"]][key] for key in ("confidence", "resamples", "seed")}
        ranked = rank(*read_measurements(own, folders), **options) if len(own) > 1 else None
        order_by(own, ranked)
        datasets.append({"name": dataset, "runs": own, "ranked": ranked, "told": told(ranked, options["confidence"])})
    runs = [run for dataset in datasets for run in dataset["runs"]]
    measures = list(dict.fromkeys(name for run in runs for name in run["measures"]))
    bars = [bar(run) for run in runs if LOSS in run["measures"]]
    write_text(args.table, table(runs, measures))
    write_page(
        args.page,
        "summary.html",
        runs=runs,
        datasets=[dataset for dataset in datasets if dataset["ranked"]],
        measures=measures,
        names={LOSS: "loss", ANSWERS: "answers that pass"},
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
    train, throughput = adapter["settings"]["train"], adapter["throughput"]
    on_cpu = adapter["hardware"]["device"] == "cpu"
    gpus = 0 if on_cpu else train.get("gpu", 1)
    speed = throughput["tokens_per_second"]
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
        "gpus": gpus,
        "hours": throughput["seconds"] * max(1, gpus) / 3600,
        "hours_of": "CPU" if on_cpu else "GPU",
        "tokens": None if speed is None else round(speed * throughput["seconds"]),
        "metrics": metrics,
    }


def read_measurements(runs: list[dict], folders: dict[str, Path]) -> tuple[dict, dict]:
    """{run: rows of likelihood.jsonl}, {run: samples}, of the samples only what tells questions apart and whether they pass."""
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
    return likelihoods, samples


# --- the best ---------------------------------------------------------------------------------------------------------


def order_by(runs: list[dict], ranked: Rankings | None) -> None:
    """The best first, by loss, else by answers; those that have neither last."""
    by = ranked["by"] if ranked else {}
    places = list((by.get(LOSS) or by.get(ANSWERS) or {"values": {}})["values"])
    runs.sort(key=lambda run: (places.index(run["run"]) if run["run"] in places else len(places), run["run"]))


def told(ranked: Rankings | None, confidence: float) -> list[str]:
    """Which is the best by each measure, and whether the second is really behind it, in words."""
    if ranked is None:
        return []
    said = [in_words(measure, ranking, ranked["comparisons"], confidence) for measure, ranking in ranked["by"].items()]
    said += [f"By {measure} there is nothing to compare: {why}." for measure, why in ranked["without"].items()]
    firsts = {next(iter(ranking["values"])) for ranking in ranked["by"].values()}
    if len(firsts) > 1:
        said.append("Loss and answers do not agree on the best: look at the answers.")
    return said or ["Nothing was measured that can be compared."]


def in_words(measure: str, ranking: Ranking, comparisons: int, confidence: float) -> str:
    (best, value), (second, _), *_ = ranking["values"].items()
    behind = ranking["behind"][second]
    points = ranking["unit"] == POINTS
    reached = f"{100 * value:.1f} %" if points else f"{value:.4g} {ranking['unit']}"
    what = "questions" if points else "rows"
    equal = [name for name, other in ranking["behind"].items() if not other["is_clear"]]
    level = f"p = {behind['p']:.2g}; {confidence:.0%} confidence"
    if comparisons > 1:
        level += f", after Holm's correction over {comparisons} comparisons"
    text = (
        f"By {measure}, {best} is the best: {reached} on the {ranking['n']:,} {what} that all have. "
        f"The second, {second}, has {shift(behind['difference'], ranking['unit'])}. "
        f"This {'is more than' if behind['is_clear'] else 'may be'} chance ({level})."
    )
    if len(equal) > 1 or (equal and behind["is_clear"]):
        text += f" Not clearly behind the best: {', '.join(equal)}."
    return text


def shift(difference, unit: str) -> str:
    scale = 100 if unit == POINTS else 1
    value, low, high = (f"{scale * limit:+.3g}" for limit in (difference["value"], *difference["interval"]))
    return f"{value} {unit} [{low}, {high}]"


# --- how it is shown --------------------------------------------------------------------------------------------------


def bar(run: dict) -> dict:
    """A line of the chart."""
    loss: Measured = run["measures"][LOSS]
    difference = loss["difference"]
    low, high = difference["interval"]
    return {
        "name": run["run"],
        "unit": loss["unit"],
        "base": loss["base"]["value"],
        "tuned": loss["tuned"]["value"],
        "value": difference["value"],
        "low": low,
        "high": high,
        "change": loss["change"] or "unclear",
    }


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
