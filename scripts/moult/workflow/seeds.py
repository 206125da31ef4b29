"""Runs with several seeds: `seeds: [0, 1, 2]` trains and measures the same run once with each.

The first seed is that of the run itself, in its own folder. For each further seed there is one more run, in a folder beside it:
`<run>-seed1`. It is a run like any other, and shares all that does not depend on the seed (stages.py). Only the target `all` does
not ask for it (sweeps.py): the score of the first reads what it has measured.
"""

# The longest name of a run (config/schema.yaml).
LONGEST = 64


def with_seeds(runs: dict[str, dict]) -> tuple[dict[str, dict], list[str]]:
    """The runs, with one more for each further seed, and what is wrong with their seeds. `runs` may hold them already."""
    result: dict[str, dict] = {}
    problems = []
    for name, run in runs.items():
        first, *others = run.get("seeds", [run["seed"]])
        result[name] = {**run, "seed": first}
        for seed, other in zip(others, seed_runs(name, run), strict=True):
            made = {key: value for key, value in run.items() if key != "seeds"} | {"seed": seed}
            if "start_from" in run:
                made["start_from"] = f"{run['start_from']}-seed{seed}"
            if runs.get(other, made) != made:
                problems.append(
                    f"runs.{name}.seeds: the run of seed {seed} is named {other}, which is there; rename that"
                )
            if len(other) > LONGEST:
                problems.append(
                    f"runs.{name}: the run of seed {seed} is named {other}, which is too long; shorten the name"
                )
            result[other] = made
    return result, problems


def seed_runs(name: str, run: dict) -> list[str]:
    """The names of the runs with the further seeds of the run `name`, in their order."""
    return [f"{name}-seed{seed}" for seed in run.get("seeds", [])[1:]]
