"""What the cards of all models of a run have in common: what the hub reads, the figures, and how it was made."""

import json
import shlex
from pathlib import Path

from moult.measuring.table import ROWS, between_seeds, comparison
from moult.model.chat import FROZEN_DATE, prints_date


def front_matter(path: Path) -> dict:
    """The metadata of a card: the YAML between its first two lines of dashes. {} where there is none."""
    import yaml

    if not path.is_file():
        return {}
    parts = path.read_text(encoding="utf-8", errors="replace").lstrip("\ufeff").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        found = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def metadata(metrics: dict, base_card: dict, settings: dict, relation: str, library: str, *tags: str) -> dict:
    """What the hub reads. Only what came from the hub is named there: a path is no repository.

    relation: to the base model. library: what loads it. tags: besides Moult's own.
    """
    provenance = metrics["provenance"]
    on_hub = sorted({part["name"] for part in provenance["data"] if part["commit"]})
    found: dict = {}
    if provenance["base"]["commit"]:
        found |= {"base_model": provenance["base"]["name"], "base_model_relation": relation}
    found |= {key: base_card[key] for key in ("license", "license_name", "license_link") if base_card.get(key)}
    if on_hub:
        found["datasets"] = on_hub
    if settings["languages"]:
        found["language"] = settings["languages"]
    return found | {"library_name": library, "pipeline_tag": "text-generation", "tags": [*tags, "lora", "moult"]}


def results(run: str, metrics: dict) -> dict:
    """The figures of the tuned model, as the hub reads them. {} if the likelihood was not measured."""
    if not metrics["likelihood"]:
        return {}
    tuned = metrics["likelihood"]["tuned"]
    measured = [
        {
            "type": name,
            "value": round(tuned[key]["value"], 4),
            "name": f"{name} ({ROWS[metrics['data']['measured_on']]} rows)",
        }
        for name, key in (("perplexity", "perplexity"), ("accuracy", "token_accuracy"))
    ]
    dataset = {"name": ", ".join(part["name"] for part in metrics["provenance"]["data"]), "type": "text"}
    task = {"type": "text-generation"}
    return {"model-index": [{"name": run, "results": [{"task": task, "dataset": dataset, "metrics": measured}]}]}


def header(metadata: dict) -> str:
    """What a card begins with."""
    import yaml

    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n"


def at(source: dict) -> str:
    return f" (commit `{source['commit'][:12]}`)" if source.get("commit") else ""


def sources_of(metrics: dict) -> str:
    """The data of the training."""
    return ", ".join(f"`{source['name']}`{at(source)}" for source in metrics["provenance"]["data"])


def figures(metrics: dict) -> str:
    """The table that the demo prints, which has the intervals."""
    data = metrics["data"]
    return (
        f"Measured on {data['sequences']:,} {ROWS[data['measured_on']]} sequences with {data['trained_tokens']:,} tokens of "
        f"answers, none of them trained on; answers are greedy.\n\n```\n{comparison(metrics)}\n"
        f"{between_seeds(metrics['seeds'])}```\n"
    )


def vllm_command(place: str, run: str, settings: dict) -> str:
    """What serves a whole model as it was measured."""
    return f"vllm serve {place} --served-model-name {run}{template_option('--default-chat-template-kwargs', settings)}"


def template_option(option: str, settings: dict) -> str:
    """The option of a server that gives the variables of the chat template, " " before it. "" if there are none."""
    kwargs = settings["chat_template_kwargs"]
    return f" {option} {shlex.quote(json.dumps(kwargs, sort_keys=True))}" if kwargs else ""


def template_note(template: str | None, settings: dict) -> str:
    """With which variables and which date of its chat template the model was trained and measured."""
    note = ""
    if kwargs := settings["chat_template_kwargs"]:
        given = ", ".join(f"{name}={value!r}" for name, value in sorted(kwargs.items()))
        note += f"It was trained and measured with these variables of the chat template: `{given}`.\n\n"
    if prints_date(template):
        note += f"The chat template can print today's date. It was trained and measured with {FROZEN_DATE} in its place.\n\n"
    return note


def provenance(metrics: dict) -> str:
    made = metrics["provenance"]
    rows = {f"LoRA {key}": value for key, value in sorted(made["training"]["lora"].items())}
    if quantization := made["training"].get("quantization"):
        rows["base, in training"] = f"quantized to {quantization}"
    keys = ("learning_rate", "lr_scheduler_type", "per_device_train_batch_size", "gradient_accumulation_steps")
    rows |= {key: made["training"]["train"][key] for key in keys if key in made["training"]["train"]}
    rows |= {
        "step of the adapter": f"{made['step']} of {made['steps']}",
        **({"training ended at step": made["ended"]["step"]} if made["ended"]["step"] < made["steps"] else {}),
        "seed": made["seed"],
        "chat template, SHA-256": made["template_sha256"],
    }
    rows |= {"adapter, SHA-256": made["adapter_sha256"]}
    rows |= {name: made["versions"][name] for name in ("torch", "transformers", "trl", "peft")}
    lines = [
        f"| {name} | {json.dumps(value) if isinstance(value, list | dict) else value} |" for name, value in rows.items()
    ]
    return "\n".join(["| | |", "| --- | --- |", *lines, ""])
