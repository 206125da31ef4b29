"""Rank the runs of a sweep, and show them on one page.

    python scripts/sweep.py --sweep lr --settings '{...}' --metrics results/lr-r8/metrics.json results/lr-r32/metrics.json \\
        --likelihoods results/lr-r8/tuned/likelihood.jsonl results/lr-r32/tuned/likelihood.jsonl \\
        --adapters results/lr-r8/adapter.json results/lr-r32/adapter.json \\
        --page results/sweeps/lr.html --ranking results/sweeps/lr.json

After score. `--metrics` in the order of the runs in the settings; the others in the order of all trainings: the first run with
each seed, then the second. With rungs, only of the runs that went on after the last. scripts/moult/measuring/ranking.py says what
is tested and how.
"""

import json
from statistics import mean

from moult.files import read_json, read_jsonl, write_json
from moult.measuring.cost import cost_of
from moult.measuring.ranking import of_runs, rank
from moult.measuring.table import ROWS
from moult.measuring.verdict import PARTS
from moult.pages.page import duration, write_page
from moult.run.cli import stage_parser
from moult.run.stage import stage


def main() -> None:
    parser = stage_parser(__doc__, "sweep", reads="what the sweep sets, and the names of its runs")
    parser.add_argument("--sweep", required=True, help="name of the sweep")
    parser.add_argument("--metrics", nargs="+", required=True, help="metrics.json of each run")
    parser.add_argument("--likelihoods", nargs="+", required=True, help="the tuned likelihood.jsonl of each training")
    parser.add_argument("--adapters", nargs="+", required=True, help="adapter.json of each training")
    parser.add_argument("--rungs", nargs="*", default=[], help="the ranking at each rung, which rung.py wrote")
    parser.add_argument("--page", required=True, help="output: the page")
    parser.add_argument("--ranking", required=True, help="output: the same as JSON")
    args = parser.parse_args()

    with stage("sweep", args.log_file, args.settings) as log:
        found = ranked(args.sweep, args.settings, args)
        words = {"verdict": sentence(found), "text_of": text_of, "duration": duration}
        of_numbers = [key for key in found["keys"] if all(is_number(place["values"][key]) for place in found["places"])]
        write_page(
            args.page,
            "sweep.html",
            charts=charts_of(found, list(args.settings["runs"])),
            climbs=climbs_of(found),
            of_numbers=of_numbers,
            target=args.page,
            **words,
            **found,
        )
        write_json(args.ranking, found)
        log.info(sentence(found))


def ranked(sweep: str, settings: dict, args) -> dict:
    """The ranking, and for each run its values, its verdict, the answers that pass, and what it cost."""
    rungs = dict(zip(settings["rungs"], map(read_json, args.rungs), strict=True))
    names = rungs[settings["rungs"][-1]]["level"] if rungs else list(settings["runs"])
    metrics = dict(zip(names, map(read_json, args.metrics), strict=True))
    likelihoods = of_runs(names, [list(read_jsonl(path)) for path in args.likelihoods])
    adapters = of_runs(names, [read_json(path) for path in args.adapters])
    found = rank(likelihoods, settings["confidence"], settings["resamples"], settings["seed"])
    of_run = {
        run: {
            "values": settings["runs"][run]["values"],
            "verdict": metrics[run]["verdict"]["verdict"],
            "passed": passed(metrics[run]),
            "device_seconds": sum(cost_of(adapter).seconds for adapter in adapters[run]),
        }
        for run in names
    }
    return {
        "schema_version": 1,
        "sweep": sweep,
        "dataset": settings["dataset"],
        "keys": settings["keys"],
        "steps": max(adapter["steps"] for of in adapters.values() for adapter in of),
        "seeds": settings["seeds"],
        "rungs": [rung_of(step, rung) for step, rung in rungs.items()],
        "measured_on": ROWS[next(iter(metrics.values()))["data"]["measured_on"]],
        **found,
        "places": [{**place, **of_run[place["run"]]} for place in found["places"]],
    }


def rung_of(step: int, found: dict) -> dict:
    """A rung: its step, the loss of each run that was still there, and those that went no further."""
    places = {place["run"]: place for place in found["places"]}
    return {
        "step": step,
        "confidence": found["confidence"],
        "losses": {run: place["loss"] for run, place in places.items()},
        "dropped": [place for run, place in places.items() if run not in found["level"]],
    }


def passed(metrics: dict) -> dict[str, float]:
    """{part of the answers: the share of the tuned model's that pass, the mean over the seeds}."""
    rates = {}
    for part in ("rows", "prompts"):
        rate = metrics["answers"].get(part, {}).get("passed")
        if rate:
            seeds = metrics["seeds"]["measurements"][PARTS[part]]["by_seed"] if metrics["seeds"] else None
            rates[part] = rate["base"]["value"] + mean(seeds) if seeds else rate["tuned"]["value"]
    return rates


# --- in words ---------------------------------------------------------------------------------------------------------


def sentence(found: dict) -> str:
    """The result."""
    best, count, level = found["places"][0]["run"], len(found["places"]), len(found["level"])
    if count == 1:
        return f"{best} is the winner: each other run was clearly worse at a rung before."
    if found["winner"]:
        others = f"each of the other {count - 1} runs" if count > 2 else "the other run"
        return f"{best} is the winner: better than {others}."
    if level == count:
        return (
            f"No winner: none of the {count} runs is clearly better or worse than the one with the lowest loss, {best}."
        )
    return (
        f"No winner: {best} has the lowest loss, and {level - 1} of the other {count - 1} runs cannot be told from it."
    )


def text_of(value) -> str:
    """A value of a setting, for people."""
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def charts_of(found: dict, names: list[str]) -> list:
    """A chart for each key with several values. `names`: of the runs, in the order of their values."""
    from moult.pages.sweep_charts import panel

    places = sorted(found["places"], key=lambda place: names.index(place["run"]))
    keys = [key for key in found["keys"] if len({text_of(place["values"][key]) for place in places}) > 1]
    best = found["places"][0]["run"]
    return [
        panel(key, [point(place, key, keys, best) for place in places], found["unit"], found["confidence"])
        for key in keys
    ]


def climbs_of(found: dict) -> list:
    """A chart of the losses at the rungs and at the end, if there are rungs."""
    from moult.pages.sweep_charts import climbs

    if not found["rungs"]:
        return []
    ends = {place["run"]: place["loss"] for place in found["places"]}
    stops = [(rung["step"], rung["losses"]) for rung in found["rungs"]] + [(found["steps"], ends)]
    points = [
        {"step": step, "run": run, "loss": loss["value"], "dropped": run not in ends}
        for step, losses in stops
        for run, loss in losses.items()
    ]
    return [climbs(points, found["unit"])]


def point(place: dict, key: str, keys: list[str], best: str) -> dict:
    """What a chart shows of a run: its value of `key`, its loss, and its line, which is its values of the other keys."""
    value, (low, high) = place["values"][key], place["loss"]["interval"]
    others = (f"{other.rpartition('.')[2]} {text_of(place['values'][other])}" for other in keys if other != key)
    return {
        "x": value if is_number(value) else text_of(value),
        "loss": place["loss"]["value"],
        "low": low,
        "high": high,
        "line": ", ".join(others),
        "best": place["run"] == best,
    }


if __name__ == "__main__":
    main()
