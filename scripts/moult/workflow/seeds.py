"""Runs with several seeds: `seeds: [0, 1, 2]` trains and measures the same run once with each.

The first seed is that of the run itself, in its own folder. For each further seed there is one more run, in a folder beside it:
`<run>-seed1`. It is a run like any other, and shares all that does not depend on the seed (stages.py). Only the target `all` does
not ask for it: the score of the first reads what it has measured.
"""


def with_seeds(runs: dict[str, dict]) -> tuple[dict[str, dict], list[str]]:
    """The runs, with one more for each further seed, and what is wrong with their names.

    Each gets `seeds`, all that its score compares, and those that are made here also `seed_of`, the run that they belong to.
    """
    result: dict[str, dict] = {}
    problems = []
    for name, run in runs.items():
        seeds = run.get("seeds") or [run["seed"]]
        result[name] = {**run, "seed": seeds[0], "seeds": seeds}
        for seed, other in zip(seeds[1:], seed_runs(name, result[name]), strict=True):
            if other in runs:
                problems.append(
                    f"runs.{name}.seeds: the run of seed {seed} is named {other}, which is there; rename that"
                )
            result[other] = {**run, "seed": seed, "seeds": [seed], "seed_of": name}
    return result, problems


def seed_runs(name: str, run: dict) -> list[str]:
    """The names of the runs with the further seeds of the run `name`, in their order."""
    return [f"{name}-seed{seed}" for seed in run["seeds"][1:]]


def asked_for(runs: dict[str, dict]) -> list[str]:
    """The runs that the config names: all but those of further seeds."""
    return [name for name, run in runs.items() if "seed_of" not in run]
