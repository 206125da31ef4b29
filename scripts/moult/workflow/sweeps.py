"""Sweeps: one run for each combination of values of some settings, to be ranked.

    sweeps: {lr: {dataset: gsm8k, over: {train.learning_rate: [1.0e-4, 1.0e-3], lora.r: [8, 32]}, seeds: [0, 1, 2]}}

makes lr-learning_rate1e-4-r8 and three more. They are runs like any others: they share what does not depend on the swept settings
(stages.py), and each has its further seeds (seeds.py). Only the target `all` does not ask for them: results/sweeps/lr.html does.
"""

import itertools
import json
import re
from collections import Counter
from decimal import Decimal

from moult.workflow.rungs import rung_name, with_rungs
from moult.workflow.seeds import LONGEST, seed_runs

# Whose keys can be swept: they change the model that comes out.
SECTIONS = ("model", "lora", "train")

# Each is compared with each.
MOST_RUNS = 100


def over_schema(schema: dict) -> dict:
    """The JSON schema of `over`: for each key that can be swept, a list of what the key itself takes."""
    fields: dict[str, dict] = {}
    for section in SECTIONS:
        for key, field in schema["$defs"][section]["properties"].items():
            items = {"$ref": f"#/$defs/{section}/properties/{key}"}
            values = {"type": "array", "items": items, "minItems": 1, "uniqueItems": True}
            told = {"description": f"Values of {section}.{key}."}
            fields[f"{section}.{key}"] = field if "x-refused" in field else values | told
    measured = "it changes how runs are measured, and no run; set it in the sweep's own eval"
    fields |= {f"eval.{key}": {"not": {}, "x-refused": measured} for key in schema["$defs"]["eval"]["properties"]}
    return fields | {"seed": {"not": {}, "x-refused": "it is the sweep's seeds"}}


# --- the runs ---------------------------------------------------------------------------------------------------------


def combinations(name: str, sweep: dict) -> list[tuple[str, dict]]:
    """(name of the run, {key: its value}) of each run of a sweep, the last key changing first."""
    over = sweep["over"]
    lasts = Counter(key.rpartition(".")[2] for key in over)
    choices = []
    for key, values in over.items():
        last = key.rpartition(".")[2]
        label = key if lasts[last] > 1 else last
        choices.append([(key, value, f"{label}{shortened(value, index)}") for index, value in enumerate(values)])
    return [
        ("-".join([name, *(label for _, _, label in chosen)]), {key: value for key, value, _ in chosen})
        for chosen in itertools.product(*choices)
    ]


def shortened(value, index: int) -> str:
    """A value in a name: a number in its shortest form, a word after `_`. What is neither is `index`, its place in the list."""
    if isinstance(value, bool) or value is None:
        return f"_{json.dumps(value)}"
    if isinstance(value, str):
        word = re.sub(r"[^A-Za-z0-9._-]+", "-", value.rstrip("/").rpartition("/")[2]).strip("-.")
        return f"_{word}" if word else str(index)
    if not isinstance(value, int | float):
        return str(index)
    number = Decimal(repr(value)).normalize()
    sign, digits, exponent = number.as_tuple()
    mantissa = f"{digits[0]}.{''.join(map(str, digits[1:]))}".rstrip(".")
    power = f"{'-' * sign}{mantissa}e{int(exponent) + len(digits) - 1}"
    plain = f"{number:f}"
    return plain if isinstance(value, int) or len(plain) <= len(power) else power


def asked_for(config: dict) -> list[str]:
    """The runs that the target `all` asks for: all but those of sweeps, and those of further seeds."""
    made = {other for name, run in config["runs"].items() for other in seed_runs(name, run)}
    for name, sweep in config["sweeps"].items():
        for run, _ in combinations(name, sweep):
            made |= {run, *(rung_name(run, step) for step in sweep.get("rungs", []))}
    return [name for name in config["runs"] if name not in made]


def sweep_runs(sweeps: dict[str, dict], overridden: dict) -> tuple[list[tuple[str, str, dict]], list[str]]:
    """(sweep, name of the run, what it sets) of each run that `sweeps` make, and what is wrong with the sweeps.

    overridden: the config's `override`.
    """
    made, problems = [], []
    for name, sweep in sweeps.items():
        found = sweep_problems(name, sweep, overridden)
        problems += found
        if found:
            continue
        own = {key: sweep[key] for key in ("dataset", "model", "lora", "train", "eval", "seeds") if key in sweep}
        if "seeds" in own:
            own["seed"] = own["seeds"][0]
        for run, values in combinations(name, sweep):
            made += [(name, *one) for one in with_rungs(run, with_values(own, values), sweep.get("rungs", []))]
    return made, problems


def with_values(own: dict, values: dict) -> dict:
    """What a run of a sweep sets: what the sweep sets for all (`own`), and the values of its keys."""
    result = {key: dict(part) if isinstance(part, dict) else part for key, part in own.items()}
    for key, value in values.items():
        section, _, last = key.partition(".")
        result.setdefault(section, {})[last] = value
    return result


def sweep_problems(name: str, sweep: dict, overridden: dict) -> list[str]:
    """What is wrong with a sweep whose keys and values are right, each by itself."""
    where, count = f"sweeps.{name}", 1
    for values in sweep["over"].values():
        count *= len(values)
    if count < 2:
        return [f"{where}.over: makes one run, and nothing to rank; give a key two values or more"]
    if count > MOST_RUNS:
        return [f"{where}.over: makes {count:,} runs, and a sweep has at most {MOST_RUNS}; leave values out"]
    problems = []
    for key in sweep["over"]:
        section, _, last = key.partition(".")
        if last in sweep.get(section, {}):
            problems.append(f"{where}.{key}: is swept, too; leave one of the two out")
        if last in overridden.get(section, {}):
            problems.append(f"{where}.over.{key}: override.{key} replaces all its values; leave one of the two out")
    names = [run for run, _ in combinations(name, sweep)]
    twice = [run for run, times in Counter(run.lower() for run in names).items() if times > 1]
    problems += [f"{where}.over: two of its runs would be named {run}; leave one of the values out" for run in twice]
    rungs = [rung_name(run, step) for run in names for step in sweep.get("rungs", [])]
    longest = max((other for run in [*names, *rungs] for other in (run, *seed_runs(run, sweep))), key=len)
    if len(longest) > LONGEST:
        problems.append(
            f"{where}: its run {longest} has a name of {len(longest)} characters, and {LONGEST} are possible; "
            "shorten the name of the sweep, or sweep fewer keys"
        )
    return problems


# --- the page ---------------------------------------------------------------------------------------------------------


def sweep_settings(config: dict, name: str) -> dict:
    """What the page of a sweep reads of the config.

    runs: {name: {values: {key: value}, trained: the runs with its seeds, which are those of the sweep; itself first}}.
    rungs: the steps at which they are compared before (rungs.py).
    """
    sweep = config["sweeps"][name]
    pairs = combinations(name, sweep)
    first = config["runs"][pairs[0][0]]
    return {
        "dataset": sweep["dataset"],
        "keys": list(sweep["over"]),
        "rungs": sweep.get("rungs", []),
        "seeds": sweep.get("seeds", [first["seed"]]),
        "runs": {
            run: {"values": values, "trained": [run, *seed_runs(run, config["runs"][run])]} for run, values in pairs
        },
        "confidence": first["eval"]["confidence"],
        "resamples": first["eval"]["resamples"],
        "seed": config["seed"],
    }
