"""Successive halving: the runs of a sweep are compared at certain steps, its rungs, and what is clearly worse goes no further.

    sweeps: {lr: {..., train: {max_steps: 400, lr_scheduler_type: constant_with_warmup, warmup_steps: 20}, rungs: [100, 200]}}

For each run and rung there is one more run, which stops there: lr-learning_rate1e-4-rung100. The next one goes on from its bytes
(finetune --start-from), and the run itself from those of the last, so no step is trained twice and nothing is lost. Unlike
successive halving as it was published (Jamieson and Talwalkar, arXiv:1502.07943), no run is dropped for its rank alone.
"""

import math

# Schedules whose first steps are the same, however many follow.
SCHEDULES = ("constant", "constant_with_warmup", "warmup_stable_decay")

# What is measured at a rung: the loss on the test rows, by which a sweep ranks.
MEASURED = {"perplexity": True, "prompts": [], "answer_rows": 0, "forgetting": False, "benchmarks": []}


def rung_name(run: str, step: int) -> str:
    return f"{run}-rung{step}"


def with_rungs(run: str, override: dict, rungs: list[int]) -> list[tuple[str, dict]]:
    """(name, what it sets) of the runs that stop at the rungs, and of `run` itself, which sets `override`. Each goes on from the
    one before."""
    made = []
    for step in rungs:
        own = {**override, "eval": {**override.get("eval", {}), **MEASURED}, "stop_after": step}
        made.append((rung_name(run, step), own))
    made.append((run, override))
    return [
        (name, {**own, "start_from": made[place - 1][0]} if place else own) for place, (name, own) in enumerate(made)
    ]


def rung_problems(where: str, run: dict, rungs: list[int]) -> list[str]:
    """Why the whole settings of a run do not go with these rungs. `where`: the sweep's place in the config."""
    train, total = run["train"], run["train"].get("max_steps", -1)
    if rungs != sorted(set(rungs)):
        return [f"{where}.rungs: each step must be larger than the one before"]
    if total <= rungs[-1]:
        return [f"{where}.rungs: they end before the training does; set train.max_steps to more than {rungs[-1]:,}"]
    problems = []
    if train["lr_scheduler_type"] not in SCHEDULES:
        problems.append(
            f"{where}.rungs: train.lr_scheduler_type {train['lr_scheduler_type']} falls towards the last step, so what is worse "
            f"at a rung may be better at the end; set one of {', '.join(SCHEDULES)}"
        )
    elif stable_until(train) < rungs[-1]:
        problems.append(
            f"{where}.rungs: the learning rate falls from step {stable_until(train):,} on; compare at steps before"
        )
    if train["early_stopping_patience"] is not None:
        problems.append(
            f"{where}.rungs: train.early_stopping_patience ends runs at other steps; leave one of the two out"
        )
    return problems + [f"{where}.rungs: {why}" for step in rungs if (why := why_not_there(step, train))]


def stable_until(train: dict) -> int:
    """The step from which on the learning rate falls, in warmup_stable_decay."""
    if train["lr_scheduler_type"] != "warmup_stable_decay":
        return train["max_steps"]
    return train["max_steps"] - train.get("lr_scheduler_kwargs", {}).get("num_decay_steps", 0)


def why_not_there(step: int, train: dict) -> str | None:
    """Why a run that stops at `step` would not have the bytes of one that does not stop, or None: it validates where it stops."""
    if train["eval_strategy"] == "no":
        return None
    every = train["eval_steps"]
    if train["eval_strategy"] != "steps":
        return "a run validates where it stops; set train.eval_strategy: steps"
    if every < 1:
        if train.get("max_steps", -1) < 1:
            return "train.eval_steps is a share of all steps; set train.max_steps, or eval_steps to a number"
        every = math.ceil(every * train["max_steps"])
    if step % every:
        return f"a run validates where it stops; make {step:,} a multiple of {every:,}, the steps between validations"
    return None


def start_problems(name: str, run: dict, runs: dict[str, dict]) -> list[str]:
    """What is wrong with the run that the run `name` goes on from."""
    where, before = f"runs.{name}.start_from", runs.get(run.get("start_from", ""))
    if "start_from" not in run:
        return []
    if before is None:
        return [f"{where}: no run is named {run['start_from']}"]
    stop, end = before.get("stop_after"), run.get("stop_after", math.inf)
    if stop is None or stop >= end:
        return [f"{where}: {run['start_from']} has no stop_after before the end of {name}"]
    differs = [key for key in ("dataset", "model", "lora", "train", "seed") if before[key] != run[key]]
    problems = [f"{where}: {run['start_from']} has another {key}; make them the same" for key in differs]
    return problems + [f"{where}: {why}" for why in [why_not_there(stop, run["train"])] if why]
