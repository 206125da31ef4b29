"""What each stage reads of the config and where it writes: the one place that knows the layout of `results/`.

A rule passes its stage these keys and no others, as one canonical JSON: an edit elsewhere reruns nothing. Rules and commands
take every path from `Places`. CONTRIBUTING.md says how a stage is added.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from moult.data.contamination import question_of
from moult.errors import MoultError
from moult.files import canonical
from moult.workflow.benchmarks import Benchmark, benchmarks_by_slug, benchmarks_of
from moult.workflow.config import fetched_dataset, is_local, local_model, slug, source_entries

# --- where things are -------------------------------------------------------------------------------------------------


class Places(NamedTuple):
    """Every file and folder of a run, below `results/`. {ds}, {run}, {model}, {dataset} are the rules' wildcards."""

    # fetch_model or inspect_model; fetch_dataset. {model} and {dataset} are slugs (workflow/config.py).
    manifest: str = "models/{model}.json"
    model: str = "models/{model}"
    dataset: str = "datasets/{dataset}.parquet"
    dataset_metadata: str = "datasets/{dataset}.json"
    # fetch_benchmark. {benchmark} is a slug (workflow/benchmarks.py).
    benchmark_data: str = "benchmarks/{benchmark}"
    benchmark_items: str = "benchmarks/{benchmark}.jsonl"
    benchmark_metadata: str = "benchmarks/{benchmark}.json"
    # prepare
    prepared: str = "prepared/{ds}"
    train_rows: str = "prepared/{ds}/train.jsonl"
    val_rows: str = "prepared/{ds}/val.jsonl"
    test_rows: str = "prepared/{ds}/test.jsonl"
    ledger: str = "prepared/{ds}/metadata.json"
    # contamination
    contamination: str = "prepared/{ds}/contamination.json"
    contaminated_rows: str = "prepared/{ds}/contaminated_rows.json"
    # encode; shared by the runs with the same data, model and template (`encoded_as`)
    tokens: str = "{run}/tokens"
    train_tokens: str = "{run}/tokens/train.parquet"
    val_tokens: str = "{run}/tokens/val.parquet"
    test_tokens: str = "{run}/tokens/test.parquet"
    template: str = "{run}/tokens/chat_template.jinja"
    report: str = "{run}/tokens/report.json"
    preview: str = "{run}/tokens/preview.html"
    preview_rows: str = "{run}/tokens/preview.json"  # the same rows, for the report
    # plan
    plan: str = "{run}/plan.json"
    # finetune
    adapter: str = "{run}/adapter"
    adapter_summary: str = "{run}/adapter.json"
    training_log: str = "{run}/training_log.jsonl"
    trainer_state: str = "{run}/trainer_state"
    # merge
    merged: str = "{run}/merged"
    merge_summary: str = "{run}/merge.json"
    # evaluate_base; shared by the runs that ask the base the same (`measured_as`)
    base: str = "{run}/base"
    base_likelihood: str = "{run}/base/likelihood.jsonl"
    base_answers: str = "{run}/base/answers.jsonl"
    base_general: str = "{run}/base/general.jsonl"
    base_kept: str = "models/{model}.answers"  # no output; for all runs of the model
    # evaluate_tuned
    tuned: str = "{run}/tuned"
    tuned_likelihood: str = "{run}/tuned/likelihood.jsonl"
    tuned_answers: str = "{run}/tuned/answers.jsonl"
    tuned_general: str = "{run}/tuned/general.jsonl"
    tuned_kept: str = "{run}/tuned/kept"  # no output
    merge_check: str = "{run}/tuned/merge_check.json"
    # benchmark_base; shared by the runs that ask the base the same (`benchmarked_as`)
    base_benchmark: str = "{run}/benchmark_base/{benchmark}.jsonl"
    base_benchmark_summary: str = "{run}/benchmark_base/{benchmark}.json"
    # benchmark_tuned
    tuned_benchmark: str = "{run}/benchmark_tuned/{benchmark}.jsonl"
    tuned_benchmark_summary: str = "{run}/benchmark_tuned/{benchmark}.json"
    # score
    metrics: str = "{run}/metrics.json"
    samples: str = "{run}/samples.jsonl"
    # smoke_test; where a check fails it is smoke_test.failed.json, and no output
    smoke_test: str = "{run}/smoke_test.json"
    # export_gguf, export_compressed: {format} is a name of moult/workflow/exports.py
    export: str = "{run}/exports/{format}/model"
    export_made: str = "{run}/exports/{format}/made.json"
    # evaluate_export; where a check fails it is check.failed.json, and no output
    export_likelihood: str = "{run}/exports/{format}/likelihood.jsonl"
    export_answers: str = "{run}/exports/{format}/answers.jsonl"
    export_general: str = "{run}/exports/{format}/general.jsonl"
    export_check: str = "{run}/exports/{format}/check.json"
    # score_export
    export_metrics: str = "{run}/exports/{format}/export.json"
    # model_card
    cards: str = "{run}/cards"
    adapter_card: str = "{run}/cards/adapter.md"
    merged_card: str = "{run}/cards/merged.md"
    # export_card: {what} is a name of UPLOADS (moult/workflow/exports.py)
    export_card: str = "{run}/cards/{what}.md"
    # report, summary, compare, sweep: pages for people
    run_report: str = "{run}/report.html"
    summary: str = "summary.html"
    summary_table: str = "summary.tsv"
    comparison: str = "compare/{a}..{b}.html"
    sweep: str = "sweeps/{sweep}.html"
    sweep_ranking: str = "sweeps/{sweep}.json"
    # rung
    rung: str = "sweeps/{sweep}-rung{step}.json"


def places_below(results: str) -> Places:
    """All places, below the folder `results` (in rules Snakemake's `<results>`), the wildcards still in them."""
    return Places(*(f"{results}/{place}" for place in Places()))


def places_of(config: dict, name: str) -> Places:
    """The places of the run `name`, where they are: what it shares with others lies in the folder of the run that made it."""
    return places_of_runs(config, [name])[name]


def places_of_runs(config: dict, names: Iterable[str]) -> dict[str, Places]:
    encoders, measurers = encoded_as(config), measured_as(config)
    return {name: _filled(config, name, {"tokens": encoders[name], "base": measurers[name]}) for name in names}


def _filled(config: dict, name: str, owners: dict[str, str]) -> Places:
    """`owners`: {folder of a run: the run that it is in}."""
    run = config["runs"][name]
    known = {"ds": run["dataset"], "model": model_slug(run["model"])}
    # These stay: a run has several of them.
    known |= {name: f"{{{name}}}" for name in ("dataset", "benchmark", "a", "b", "sweep", "step", "format", "what")}
    folders = [place.removeprefix("{run}/").split("/")[0] for place in Places()]
    filled = [
        place.format(run=owners.get(folder, name), **known) for place, folder in zip(Places(), folders, strict=True)
    ]
    places = Places(*(f"{config['paths']['results']}/{place}" for place in filled))
    return places._replace(model=local_model(run["model"], config["paths"]) or places.model)


def model_slug(model: dict) -> str:
    return slug(model["name"], model["revision"])


# --- what runs share --------------------------------------------------------------------------------------------------


def encoded_as(config: dict) -> dict[str, str]:
    """{run: the run whose tokens it uses}. Of those with the same dataset, model and template that is the dataset's own; or
    else the first by name, of those that have tokens if there are any, so that a new run changes no old one."""
    return _owners(config, Places().report, lambda run: _tokens_depend_on(config, run))


def measured_as(config: dict) -> dict[str, str]:
    """{run: the run whose measurement of the base it uses}: likewise, of those with the same tokens that also ask the same."""
    return _owners(
        config,
        Places().base_likelihood,
        lambda run: [_tokens_depend_on(config, run), _evaluate(config, config["runs"][run], {})],
    )


def benchmarked_as(config: dict) -> dict[str, dict[str, str]]:
    """{slug of a benchmark: {run: the run whose measurement of the base it uses}}: likewise, of those with the same model and
    template, whatever their data."""

    def depends_on(of: dict[str, Benchmark], name: str) -> list:
        run = config["runs"][name]
        return [*_template_depends_on(run), _benchmark(config, run, {}), of[name].asked()]

    place = Places().base_benchmark
    return {
        slug: _owners(config, place.replace("{benchmark}", slug), partial(depends_on, of), of)
        for slug, of in benchmarks_by_slug(config["runs"]).items()
    }


def _tokens_depend_on(config: dict, name: str) -> list:
    run = config["runs"][name]
    return [run["dataset"], run["eval"]["contamination"] == "drop", *_template_depends_on(run)]


def _template_depends_on(run: dict) -> list:
    keys = ("name", "revision", "chat_template", "chat_template_kwargs", "trust_remote_code")
    return [_pick(run["model"], *keys)]


def _owners(
    config: dict, place: str, depends_on: Callable[[str], list], names: Iterable[str] | None = None
) -> dict[str, str]:
    alike: dict[str, list[str]] = {}
    for name in config["runs"] if names is None else names:
        alike.setdefault(canonical(depends_on(name)), []).append(name)
    owners: dict[str, str] = {}
    for names in alike.values():
        own = config["runs"][names[0]]["dataset"]
        made = [name for name in names if Path(config["paths"]["results"], place.format(run=name)).exists()]
        owners |= dict.fromkeys(names, own if own in names else min(made or names))
    return owners


# --- what each stage reads ------------------------------------------------------------------------------------------


def stage_settings(config: dict, stage: str, name: str) -> dict:
    """What `stage` reads of the config for the run `name`, which for prepare is the dataset's own. Raises MoultError."""
    if stage not in STAGES:
        raise MoultError(
            f"the stage {stage} is not in STAGES of scripts/moult/workflow/stages.py",
            "add what it reads of the config there (`_nothing` if that is nothing); CONTRIBUTING.md has an example",
        )
    return STAGES[stage](config, config["runs"][name], config["datasets"][config["runs"][name]["dataset"]])


def _pick(section: dict, *keys: str) -> dict:
    return {key: section[key] for key in keys if key in section}


def _fetch_model(config: dict, run: dict, dataset: dict) -> dict:
    return _pick(run["model"], "revision", "trust_remote_code")


def _prepare(config: dict, run: dict, dataset: dict) -> dict:
    keys = (
        "split",
        "max_rows",
        "languages",
        "language_detector",
        "unknown_language",
        "broken",
        "sample_size",
        "near_duplicates",
        "val_size",
        "test_size",
    )
    sources = {
        key: source_entries(dataset[old], dataset) if dataset[old] else []
        for key, old in (("sources", "source"), ("val_sources", "val_source"), ("test_sources", "test_source"))
    }
    for entry in [entry for entries in sources.values() for entry in entries]:
        if not is_local(entry["path"]):
            entry["hub"], entry["path"] = entry["path"], fetched_dataset(config, dataset, entry["path"])
    return {**_pick(dataset, *keys), **sources, "seed": config["seed"]}


def _contamination(config: dict, run: dict, dataset: dict) -> dict:
    """The questions of all runs of the dataset, so that they share what is found."""
    runs = {name: one for name, one in config["runs"].items() if one["dataset"] == run["dataset"]}
    limits = {slug: [benchmark.limit for benchmark in of.values()] for slug, of in benchmarks_by_slug(runs).items()}
    return {
        "prompts": sorted({question_of(prompt) for one in runs.values() for prompt in one["eval"]["prompts"]}),
        "benchmarks": {
            slug: None if None in of else max(limit for limit in of if limit is not None) for slug, of in limits.items()
        },
    }


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
        "gpu_memory",
        "save_total_limit",
        "early_stopping_patience",
        "router_aux_loss_coef",  # 0 is without that loss
    )
    words = [
        name for name, value in run["train"].items() if isinstance(value, bool) or not isinstance(value, int | float)
    ]
    own = _pick(
        run["model"], "dtype", "quantization", "attn_implementation", "chat_template_kwargs", "trust_remote_code"
    )
    return {"lora": run["lora"], "train": _pick(run["train"], *counts, *words), **own}


def _finetune(config: dict, run: dict, dataset: dict) -> dict:
    # On how many nodes its processes are is the launcher's business (rules/cluster.smk); gpu_memory is for plan.
    train = {name: value for name, value in run["train"].items() if name not in ("nodes", "gpu_memory")}
    own = _pick(run["model"], "dtype", "quantization", "attn_implementation", "trust_remote_code")
    return {"train": train, **_pick(run, "lora", "seed", "stop_after"), **own}


def _evaluate(config: dict, run: dict, dataset: dict) -> dict:
    # `expect` is score's: a changed expectation needs no new answers.
    prompts = [{key: prompt[key] for key in prompt if key != "expect"} for prompt in run["eval"]["prompts"]]
    own = _pick(run["eval"], "perplexity", "max_rows", "answer_rows", "max_new_tokens", "forgetting")
    return {
        "eval": {**own, "prompts": prompts},
        **_pick(run["model"], "dtype", "attn_implementation", "chat_template_kwargs", "trust_remote_code"),
    }


def _evaluate_tuned(config: dict, run: dict, dataset: dict) -> dict:
    settings = _evaluate(config, run, dataset)
    own = {"eval": {**settings["eval"], "merge_check_rows": run["eval"]["merge_check_rows"]}}
    # The models that are measured are not quantized; the comparison with the one that was trained is.
    return {**settings, **own, **_pick(run["model"], "quantization")}


def evaluation_gpus(run: dict) -> int:
    """How many GPUs the evaluation of a run spreads a model over. No setting of the stage: it changes no result."""
    train = run["train"]
    return run["eval"]["gpu"] or (train["gpu"] // train["nodes"] if train["shard"] else 1)


def _benchmark(config: dict, run: dict, dataset: dict) -> dict:
    # Which benchmark it is, is not here: another one more needs no new answers to the others (rules/benchmark.smk).
    own = _pick(run["model"], "dtype", "attn_implementation", "chat_template_kwargs", "trust_remote_code")
    return {**own, "batch_size": run["eval"]["lm_eval"]["batch_size"]}


def _score(config: dict, run: dict, dataset: dict) -> dict:
    limits = ("merge_kl_limit", "merge_top1_limit", "quantization_kl_limit")
    what = ("contamination", "perplexity", "prompts", "row_expect", "forgetting", "forgetting_limit")
    keys = (*what, "confidence", "resamples", *limits)
    metrics = {benchmark.name: {"metric": benchmark.metric, "slug": benchmark.slug} for benchmark in benchmarks_of(run)}
    return {"eval": {**_pick(run["eval"], *keys), "benchmarks": metrics}, **_pick(run, "seed", "seeds")}


def _merge(config: dict, run: dict, dataset: dict) -> dict:
    return _pick(run["model"], "trust_remote_code")


def _model_card(config: dict, run: dict, dataset: dict) -> dict:
    return _pick(dataset, "languages") | _pick(run["model"], "chat_template_kwargs")


def _report(config: dict, run: dict, dataset: dict) -> dict:
    # What makes the run, as a config that can be used again. Trained from its first step it has the same bytes.
    own = {key: value for key, value in run.items() if key not in ("serve", "start_from", "export")}
    return {"run": own, "dataset": dataset, "seed": config["seed"]}


def _compared(config: dict, run: dict, dataset: dict) -> dict:
    """How tuned models are compared with each other: summary of all runs, compare of two."""
    return {"dataset": run["dataset"], **_pick(run["eval"], "confidence", "resamples"), "seed": config["seed"]}


def serve_settings(run: dict) -> dict:
    """What `make serve`, a command and not a stage, reads of a run's config."""
    model = ("name", "dtype", "attn_implementation", "chat_template_kwargs", "trust_remote_code")
    own = {key: value for key, value in run["serve"].items() if key != "container"}
    return {"serve": own, "model": _pick(run["model"], *model)}


def _smoke_test(config: dict, run: dict, dataset: dict) -> dict:
    # It listens on a free port of this machine only, whatever is configured.
    settings = serve_settings(run)
    own = {key: value for key, value in settings["serve"].items() if key not in ("host", "port", "api_key_env")}
    return {**settings, "serve": own, "eval": _pick(run["eval"], "prompts", "max_new_tokens")}


def _export_gguf(config: dict, run: dict, dataset: dict) -> dict:
    own = _pick(run["export"], "llama_cpp", "imatrix")
    # Without a matrix no rows are read.
    rows = _pick(run["export"], "calibration_rows") if own["imatrix"] else {}
    return {**own, **rows, **_pick(run["model"], "trust_remote_code")}


def _export_compressed(config: dict, run: dict, dataset: dict) -> dict:
    return {**_pick(run["export"], "calibration_rows"), **_pick(run["model"], "trust_remote_code")}


def _evaluate_export(config: dict, run: dict, dataset: dict) -> dict:
    """What smoke_test and evaluate read: it is served, asked and measured as these do."""
    settings = _smoke_test(config, run, dataset)
    asked = _pick(run["eval"], "perplexity", "max_rows", "forgetting", "merge_check_rows")
    return {**settings, "eval": {**settings["eval"], **asked}, "export": _pick(run["export"], "llama_cpp", "kl_limit")}


def _nothing(config: dict, run: dict, dataset: dict) -> dict:
    return {}


# Every stage, and what it reads.
STAGES: dict[str, Callable] = {
    "fetch_model": _fetch_model,
    "inspect_model": _fetch_model,
    "fetch_benchmark": _nothing,  # its settings are a benchmark's (rules/benchmark.smk)
    "fetch_dataset": _nothing,  # its settings are a source's, not a run's (rules/fetch.smk)
    "prepare": _prepare,
    "contamination": _contamination,
    "encode": _encode,
    "plan": _plan,
    "finetune": _finetune,
    "merge": _merge,
    "evaluate_base": _evaluate,
    "evaluate_tuned": _evaluate_tuned,
    "benchmark_base": _benchmark,
    "benchmark_tuned": _benchmark,
    "score": _score,
    "report": _report,
    "summary": _compared,
    "compare": _compared,
    "export_gguf": _export_gguf,
    "export_compressed": _export_compressed,
    "evaluate_export": _evaluate_export,
    "score_export": _score,
    "model_card": _model_card,
    "export_card": _model_card,
    "smoke_test": _smoke_test,
}
