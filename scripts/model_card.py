"""Write the model cards: what the adapter and the merged model are, how good they are, how to load them.

    python scripts/model_card.py --run demo --settings '{"languages": ["en"], "chat_template_kwargs": {}}' \\
        --model results/models/config--demo--base.json --metrics results/demo/metrics.json \\
        --adapter results/demo/adapter --merged results/demo/merged --cards results/demo/cards

After score, which has the figures. Each card is README.md in its folder, where the hub and people look for it, and a copy is
kept in --cards, because no stage owns another's folder. `make publish` uploads a folder with its card. Nothing is
made up: what is not known (a licence, a hub name) is left out.
"""

from pathlib import Path

from moult.files import read_json, write_text
from moult.measuring.card import (
    at,
    figures,
    front_matter,
    header,
    metadata,
    provenance,
    results,
    sources_of,
    template_note,
    template_option,
    vllm_command,
)
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


def card(kind: str, run: str, folder: str, metrics: dict, plan: dict, base_card: dict, settings: dict) -> str:
    base = metrics["provenance"]["base"]
    sources = sources_of(metrics)
    what = (
        f"A LoRA adapter for `{base['name']}`"
        if kind == "adapter"
        else f"`{base['name']}` with a LoRA adapter merged into it"
    )
    how = ("adapter", "peft") if kind == "adapter" else ("finetune", "transformers")
    told = metadata(metrics, base_card, settings, *how) | results(run, metrics)
    return f"""{header(told)}
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
    if kind == "merged":
        commands = vllm_command(PLACE, run, settings)
    elif serve["reasons"]:
        return f"vLLM cannot serve this adapter ({', '.join(serve['reasons'])}): serve the merged model.\n"
    else:
        own = " ".join(adapter_arguments(folder, "adapter"))
        commands = (
            f"hf download {PLACE} --local-dir adapter\n"
            f"vllm serve {base} --enable-lora --max-lora-rank {serve['max_lora_rank']} --lora-modules {run}=adapter \\\n"
            f"    {own}{template_option('--default-chat-template-kwargs', settings)}"
        )
    return f"With vLLM, behind an OpenAI-compatible API:\n\n```bash\n{commands}\n```\n"


if __name__ == "__main__":
    main()
