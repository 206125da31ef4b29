"""What each stage reads of the config, and which runs share a stage's result.

A rule passes its stage these keys and no others, as one canonical JSON: an edit elsewhere reruns nothing.
"""

from collections.abc import Callable
from pathlib import Path

from moult.config import fetched_dataset, is_local, source_entries
from moult.files import canonical

# --- what runs share --------------------------------------------------------------------------------------------------


def encoded_as(config: dict) -> dict[str, str]:
    """{run: the run whose tokens it uses}. Of those with the same dataset, model and template that is the dataset's own; or
    else the first by name, of those that have tokens if there are any, so that a new run changes no old one."""
    return _owners(config, "tokens/report.json", lambda run: _tokens_depend_on(config, run))


def measured_as(config: dict) -> dict[str, str]:
    """{run: the run whose measurement of the base it uses}: likewise, of those with the same tokens that also ask the same."""
    return _owners(
        config,
        "base/likelihood.jsonl",
        lambda run: [_tokens_depend_on(config, run), _evaluate(config, config["runs"][run], {})],
    )


def _tokens_depend_on(config: dict, name: str) -> list:
    run = config["runs"][name]
    keys = ("name", "revision", "chat_template", "chat_template_kwargs", "trust_remote_code")
    return [run["dataset"], _pick(run["model"], *keys)]


def _owners(config: dict, file: str, depends_on: Callable[[str], list]) -> dict[str, str]:
    alike: dict[str, list[str]] = {}
    for name in config["runs"]:
        alike.setdefault(canonical(depends_on(name)), []).append(name)
    owners = {}
    for names in alike.values():
        own = config["runs"][names[0]]["dataset"]
        made = [name for name in names if Path(config["paths"]["results"], name, file).exists()]
        owners |= dict.fromkeys(names, own if own in names else min(made or names))
    return owners


# --- what each stage reads ------------------------------------------------------------------------------------------


def stage_settings(config: dict, stage: str, name: str) -> dict:
    """What `stage` reads of the config for the run `name` (for prepare: the dataset)."""
    if stage == "prepare":
        return _prepare(config, name)
    return _RUN_SETTINGS[stage](config, config["runs"][name], config["datasets"][config["runs"][name]["dataset"]])


def _pick(section: dict, *keys: str) -> dict:
    return {key: section[key] for key in keys if key in section}


def _prepare(config: dict, name: str) -> dict:
    dataset = config["datasets"][name]
    keys = (
        "split",
        "max_rows",
        "languages",
        "language_detector",
        "unknown_language",
        "broken",
        "sample_size",
        "val_size",
    )
    sources = {
        key: source_entries(dataset[old], dataset) if dataset[old] else []
        for key, old in (("sources", "source"), ("val_sources", "val_source"))
    }
    for entry in [*sources["sources"], *sources["val_sources"]]:
        if not is_local(entry["path"]):
            entry["hub"], entry["path"] = entry["path"], fetched_dataset(config, dataset, entry["path"])
    return {**_pick(dataset, *keys), **sources, "seed": config["seed"]}


def _encode(config: dict, run: dict, dataset: dict) -> dict:
    own = _pick(dataset, "max_length", "overlength", "max_token_loss", "unrenderable")
    return own | _pick(run["model"], "chat_template", "chat_template_kwargs", "trust_remote_code")


def _plan(config: dict, run: dict, dataset: dict) -> dict:
    # What is not a number may name what is not there. Of the numbers only these say how long and how large the run is: the
    # limits of the others are the schema's, and a new learning rate needs no new plan.
    counts = (
        "num_train_epochs",
        "max_steps",
        "warmup_steps",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "gpu",
        "nodes",
        "save_total_limit",
    )
    words = [
        name for name, value in run["train"].items() if isinstance(value, bool) or not isinstance(value, int | float)
    ]
    own = _pick(run["model"], "dtype", "attn_implementation", "chat_template_kwargs", "trust_remote_code")
    return {"lora": run["lora"], "train": _pick(run["train"], *counts, *words), **own}


def _finetune(config: dict, run: dict, dataset: dict) -> dict:
    # On how many nodes its processes are is the launcher's business (rules/common.smk).
    train = {name: value for name, value in run["train"].items() if name != "nodes"}
    own = _pick(run["model"], "dtype", "attn_implementation", "trust_remote_code")
    return {"train": train, **_pick(run, "lora", "seed"), **own}


def _evaluate(config: dict, run: dict, dataset: dict) -> dict:
    # `expect` is score's: a changed expectation needs no new answers.
    prompts = [{key: prompt[key] for key in prompt if key != "expect"} for prompt in run["eval"]["prompts"]]
    own = _pick(run["eval"], "perplexity", "max_rows", "answer_rows", "max_new_tokens")
    return {
        "eval": {**own, "prompts": prompts},
        **_pick(run["model"], "dtype", "attn_implementation", "chat_template_kwargs", "trust_remote_code"),
    }


def _evaluate_tuned(config: dict, run: dict, dataset: dict) -> dict:
    settings = _evaluate(config, run, dataset)
    return {**settings, "eval": {**settings["eval"], "merge_check_rows": run["eval"]["merge_check_rows"]}}


def _score(config: dict, run: dict, dataset: dict) -> dict:
    keys = ("perplexity", "prompts", "row_expect", "confidence", "resamples", "merge_kl_limit")
    return {"eval": _pick(run["eval"], *keys), "seed": run["seed"]}


def _serve(config: dict, run: dict, dataset: dict) -> dict:
    model = ("name", "dtype", "attn_implementation", "chat_template_kwargs", "trust_remote_code")
    own = {key: value for key, value in run["serve"].items() if key != "container"}
    return {"serve": own, "model": _pick(run["model"], *model)}


def _smoke_test(config: dict, run: dict, dataset: dict) -> dict:
    # It listens on a free port of this machine only, whatever is configured.
    settings = _serve(config, run, dataset)
    own = {key: value for key, value in settings["serve"].items() if key not in ("host", "port", "api_key_env")}
    return {**settings, "serve": own, "eval": _pick(run["eval"], "prompts", "max_new_tokens")}


_RUN_SETTINGS = {
    "fetch_model": lambda config, run, dataset: _pick(run["model"], "revision", "trust_remote_code"),
    "encode": _encode,
    "plan": _plan,
    "finetune": _finetune,
    "merge": lambda config, run, dataset: _pick(run["model"], "trust_remote_code"),
    "evaluate_base": _evaluate,
    "evaluate_tuned": _evaluate_tuned,
    "score": _score,
    "model_card": lambda config, run, dataset: {
        **_pick(dataset, "languages"),
        **_pick(run["model"], "chat_template_kwargs"),
    },
    "serve": _serve,
    "smoke_test": _smoke_test,
}
