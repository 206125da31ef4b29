"""Write the model cards: what the adapter and the merged model are, how good they are, how to load them.

    python scripts/model_card.py --run demo --settings '{"languages": ["en"], "chat_template_kwargs": {}}' \\
        --model results/models/config--demo--base.json --metrics results/demo/metrics.json \\
        --adapter results/demo/adapter --merged results/demo/merged --cards results/demo/cards

After score, which has the figures. Each card is README.md in its folder, where the hub and people look for it, and a copy is
kept in --cards, because no stage owns another's folder. `make publish` uploads a folder with its card. Nothing is
made up: what is not known (a licence, a hub name) is left out.
"""

import json
from pathlib import Path

from moult.files import read_json, write_text
from moult.measuring.table import ROWS, between_seeds, comparison
from moult.model.chat import FROZEN_DATE, prints_date
from moult.model.export import PLACE
from moult.model.manifest import open_model
from moult.run.cli import stage_parser
from moult.run.stage import stage
from moult.serving.launch import adapter_arguments, text_of


def main() -> None:
    parser = stage_parser(__doc__, "model_card")
    parser.add_argument("--run", required=True, help="name of the run")
    parser.add_argument("--model", required=True, help="manifest of the base model; its card names the licence")
    parser.add_argument("--plan", required=True, help="plan.json: whether and how vLLM serves the adapter")
    parser.add_argument("--metrics", required=True, help="metrics.json")
    parser.add_argument("--adapter", required=True, help="adapter folder, which gets its card")
    parser.add_argument("--merged", required=True, help="merged model's folder, which gets its card")
    parser.add_argument("--cards", required=True, help="folder of the copies to write")
    args = parser.parse_args()

    with stage("model_card", args.log_file, args.settings) as log:
        write_cards(args, log)


def write_cards(args, log) -> None:
    metrics, plan = read_json(args.metrics), read_json(args.plan)
    base_card = front_matter(open_model(args.model)[0] / "README.md")
    for kind, folder in (("adapter", args.adapter), ("merged", args.merged)):
        text = card(kind, args.run, folder, metrics, plan, base_card, args.settings)
        write_text(Path(folder, "README.md"), text)
        write_text(Path(args.cards, f"{kind}.md"), text)
    log.info(base_card.get("license") or "the base names no licence, so the cards name none")


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


def card(kind: str, run: str, folder: str, metrics: dict, plan: dict, base_card: dict, settings: dict) -> str:
    import yaml

    base, data = metrics["provenance"]["base"], metrics["provenance"]["data"]
    sources = ", ".join(f"`{source['name']}`{at(source)}" for source in data)
    what = (
        f"A LoRA adapter for `{base['name']}`"
        if kind == "adapter"
        else f"`{base['name']}` with a LoRA adapter merged into it"
    )
    header = yaml.safe_dump(metadata(kind, run, metrics, base_card, settings), sort_keys=False, allow_unicode=True)
    return f"""---
{header}---

# {run}

{what}, tuned on {sources}. Base model: `{base["name"]}`{at(base)}.

## Base against tuned

Verdict: **{metrics["verdict"]["verdict"]}**. {figures(metrics)}
## Use

{(LOAD[kind] + ASK).format(place=PLACE, base=base["name"], auto=plan["auto_class"])}
{with_vllm(kind, run, folder, base["name"], plan["serve"], settings)}
{template_note(text_of(folder, "chat_template.jinja"), settings)}## How it was made

{provenance(metrics)}
Made with Moult {metrics["provenance"]["versions"]["moult"]}.
"""


def at(source: dict) -> str:
    return f" (commit `{source['commit'][:12]}`)" if source.get("commit") else ""


def metadata(kind: str, run: str, metrics: dict, base_card: dict, settings: dict) -> dict:
    """What the hub reads. Only what came from the hub is named there: a path is no repository."""
    provenance = metrics["provenance"]
    on_hub = sorted({part["name"] for part in provenance["data"] if part["commit"]})
    found: dict = {}
    if provenance["base"]["commit"]:
        found |= {"base_model": provenance["base"]["name"]}
        found |= {"base_model_relation": "adapter" if kind == "adapter" else "finetune"}
    found |= {key: base_card[key] for key in ("license", "license_name", "license_link") if base_card.get(key)}
    if on_hub:
        found["datasets"] = on_hub
    if settings["languages"]:
        found["language"] = settings["languages"]
    found |= {"library_name": "peft" if kind == "adapter" else "transformers", "pipeline_tag": "text-generation"}
    found |= {"tags": ["lora", "moult"]}
    if metrics["likelihood"]:
        tuned = metrics["likelihood"]["tuned"]
        measured = [
            {
                "type": name,
                "value": round(tuned[key]["value"], 4),
                "name": f"{name} ({ROWS[metrics['data']['measured_on']]} rows)",
            }
            for name, key in (("perplexity", "perplexity"), ("accuracy", "token_accuracy"))
        ]
        dataset = {"name": ", ".join(part["name"] for part in provenance["data"]), "type": "text"}
        task = {"type": "text-generation"}
        found["model-index"] = [{"name": run, "results": [{"task": task, "dataset": dataset, "metrics": measured}]}]
    return found


def figures(metrics: dict) -> str:
    """The table that the demo prints, which has the intervals."""
    data = metrics["data"]
    return (
        f"Measured on {data['sequences']:,} {ROWS[data['measured_on']]} sequences with {data['trained_tokens']:,} tokens of "
        f"answers, none of them trained on; answers are greedy.\n\n```\n{comparison(metrics)}\n"
        f"{between_seeds(metrics['seeds'])}```\n"
    )


# How the model is loaded; `{auto}` is the auto class that plan found.
LOAD = {
    "merged": """With transformers:

```python
from transformers import AutoTokenizer, {auto}

model = {auto}.from_pretrained("{place}")
""",
    "adapter": """With peft:

```python
from peft import PeftModel
from transformers import AutoTokenizer, {auto}

model = PeftModel.from_pretrained({auto}.from_pretrained("{base}"), "{place}")
""",
}
ASK = """tokenizer = AutoTokenizer.from_pretrained("{place}")
messages = [{{"role": "user", "content": "Hello"}}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=256)[0, prompt["input_ids"].shape[1] :]))
```
"""


def with_vllm(kind: str, run: str, folder: str, base: str, serve: dict, settings: dict) -> str:
    """The command that serves it as it was measured. `serve` is what the plan says of it."""
    import shlex

    kwargs = settings["chat_template_kwargs"]
    template = f" --default-chat-template-kwargs {shlex.quote(json.dumps(kwargs, sort_keys=True))}" if kwargs else ""
    if kind == "merged":
        commands = f"vllm serve {PLACE} --served-model-name {run}{template}"
    elif serve["reasons"]:
        return f"vLLM cannot serve this adapter ({', '.join(serve['reasons'])}): serve the merged model.\n"
    else:
        own = " ".join(adapter_arguments(folder, "adapter"))
        commands = (
            f"hf download {PLACE} --local-dir adapter\n"
            f"vllm serve {base} --enable-lora --max-lora-rank {serve['max_lora_rank']} --lora-modules {run}=adapter \\\n"
            f"    {own}{template}"
        )
    return f"With vLLM, behind an OpenAI-compatible API:\n\n```bash\n{commands}\n```\n"


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


if __name__ == "__main__":
    main()
