"""metrics.json as a table for people: base against tuned, with intervals and the verdict."""

import textwrap
from pathlib import Path

from tabulate import tabulate

from moult.measuring.seeds import in_words

# What measured_on of metrics.json is called.
ROWS = {"test": "test", "val": "validation"}


def table(metrics: dict, folder: Path) -> str:
    """The verdict, the comparison, what it was measured on, and where the results lie."""
    data, merged, quantization = metrics["data"], metrics["merged_vs_adapter"], metrics.get("quantization")
    trained = (
        f", against what was trained ({quantization['kind']}): {quantization['trained_vs_merged']['mean_kl']:.1e}"
        if quantization
        else ""
    )
    return f"""
{metrics["run"]}: {metrics["verdict"]["verdict"].upper()}
{reasons(metrics["verdict"])}
{textwrap.indent(comparison(metrics), "  ")}
{between_seeds(metrics.get("seeds"))}
  measured on {data["sequences"]:,} {ROWS[data["measured_on"]]} sequences, {data["trained_tokens"]:,} trained tokens; \
merged against adapter: mean KL {merged["mean_kl"]:.1e}{trained}
  {folder}/merged/       the tuned model
  {folder}/adapter/      the LoRA adapter
  {folder}/samples.jsonl the answers side by side
"""


def reasons(verdict: dict) -> str:
    """Why it is not `helped`, a line each; what helped is seen in the table. Cautions are always shown."""
    found = verdict["cautions"] if verdict["verdict"] == "helped" else verdict["reasons"]
    return "".join(f"  - {reason}\n" for reason in found)


def comparison(metrics: dict) -> str:
    """A line for each measurement: base, tuned, and the difference with its interval."""
    percent = round(100 * metrics["data"]["confidence"])
    return tabulate(
        rows_of(metrics),
        headers=("", "base", "tuned", f"difference [{percent} %]"),
        tablefmt="plain",
        disable_numparse=True,
        colalign=("left", "right", "right", "right"),
    )


def rows_of(metrics: dict) -> list[tuple[str, str, str, str]]:
    """(measurement, base, tuned, difference) of all."""
    return (
        likelihood_rows(metrics["likelihood"])
        + answer_rows(metrics["answers"])
        + general_rows(metrics["general_text"])
        + benchmark_rows(metrics["benchmarks"])
    )


def between_seeds(seeds: dict | None) -> str:
    """A line for each measurement over all seeds, if there are several."""
    found = seeds["measurements"] if seeds else {}
    return "".join(f"  {in_words(name, spread)}\n" for name, spread in found.items())


def likelihood_rows(likelihood: dict | None) -> list[tuple[str, str, str, str]]:
    if not likelihood:
        return []
    base, tuned, difference = likelihood["base"], likelihood["tuned"], likelihood["difference"]
    return [
        ("perplexity", number(base["perplexity"]), number(tuned["perplexity"]), ""),
        (
            "nats per token",
            number(base["nll_per_token"]),
            number(tuned["nll_per_token"]),
            change(difference["nll_per_token"]),
        ),
        ("bits per byte", number(base["bits_per_byte"]), number(tuned["bits_per_byte"]), ""),
        (
            "token accuracy",
            share(base["token_accuracy"]),
            share(tuned["token_accuracy"]),
            change(difference["token_accuracy"], 100),
        ),
    ]


def answer_rows(parts: dict) -> list[tuple[str, str, str, str]]:
    rows = []
    for part, answers in parts.items():
        if part == "all":
            continue
        rates = {"passed": answers.get("passed")}
        if part != "instructions":  # their checks are Moult's own, each of one or two questions
            rates |= {**answers.get("checks", {}), "stopped": answers["stopped"]}
        for name, rate in rates.items():
            if rate:
                label = f"{part} ({rate['n']}): {name}"
                rows.append((label, share(rate["base"]), share(rate["tuned"]), change(rate["difference"], 100)))
    return rows


def general_rows(general: dict | None) -> list[tuple[str, str, str, str]]:
    if not general:
        return []
    label = f"general text ({general['texts']}): nats per token"
    return [(label, number(general["base"]), number(general["tuned"]), change(general["difference"]))]


def benchmark_rows(benchmarks: dict) -> list[tuple[str, str, str, str]]:
    """The metric that counts, of each."""
    rows = []
    for name, benchmark in benchmarks.items():
        metric = benchmark["metrics"].get(benchmark["metric"])
        if metric is None:  # all its questions are in the training rows
            continue
        label = f"{name} ({metric['n']}): {benchmark['metric']}"
        rows.append((label, number(metric["base"]), number(metric["tuned"]), change(metric["difference"])))
    return rows


def number(figure: dict) -> str:
    return f"{figure['value']:.3g}" if figure["value"] < 1000 else f"{figure['value']:,.0f}"


def share(figure: dict) -> str:
    return f"{100 * figure['value']:.1f} %"


def change(figure: dict, scale: float = 1) -> str:
    low, high = (f"{scale * limit:+.3g}" for limit in figure["interval"])
    return f"{scale * figure['value']:+.3g} [{low}, {high}]"
