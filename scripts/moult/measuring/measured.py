"""What counts of metrics.json, in one shape, for the pages that show several runs."""

from typing import TypedDict

from moult.measuring.verdict import GENERAL, PARTS, POINTS

SIDES = ("base", "tuned", "difference")


class Measured(TypedDict):
    """One measure of a run: value and interval of base and tuned, and of the difference also p. In hundredths (POINTS) or as they
    are. change: better, worse or unclear, as the verdict has it; "" if it does not count."""

    unit: str
    base: dict
    tuned: dict
    difference: dict
    change: str


def measured(metrics: dict) -> dict[str, Measured]:
    """{name: ...} by the names that the verdict gives them, in one order."""
    found: dict[str, Measured] = {}
    verdict = metrics["verdict"]

    def add(name: str, figures: dict, unit: str) -> None:
        change = next((word for word in ("better", "worse", "unclear") if name in verdict[word]), "")
        scale = 100 if unit == POINTS else 1
        base, tuned, difference = (_scaled(figures[side], scale) for side in SIDES)
        found[name] = {"unit": unit, "base": base, "tuned": tuned, "difference": difference, "change": change}

    if likelihood := metrics["likelihood"]:
        add("loss", {side: likelihood[side]["nll_per_token"] for side in SIDES}, "nats per token")
    for part, name in PARTS.items():
        if rates := metrics["answers"].get(part, {}).get("passed"):
            add(name, rates, POINTS)
    if general := metrics["general_text"]:
        add(GENERAL, general, "nats per token")
    for name, benchmark in metrics["benchmarks"].items():
        if metric := benchmark["metrics"].get(benchmark["metric"]):
            add(f"benchmark {name}", metric, POINTS if metric["is_rate"] else "on average")
    return found


def _scaled(figure: dict, scale: float) -> dict:
    return {**figure, "value": scale * figure["value"], "interval": [scale * limit for limit in figure["interval"]]}
