"""Write the card of exports that are uploaded together: what they are, how good each is, how to run it.

    python scripts/export_card.py --run demo --what gguf --settings '{"languages": ["en"], "chat_template_kwargs": {}}' \\
        --model results/models/config--demo--base.json --template results/demo/tokens/chat_template.jinja \\
        --metrics results/demo/metrics.json --exports results/demo/exports/gguf-q8_0/export.json \\
        --card results/demo/cards/gguf.md

After score_export. `make publish WHAT=gguf` uploads the files of the exports, with the card as README.md. As in the other cards
(model_card), what is not known is left out.
"""

from pathlib import Path

from moult.exporting.upload import modelfile_name
from moult.files import read_json, write_text
from moult.measuring.card import (
    at,
    figures,
    front_matter,
    header,
    metadata,
    provenance,
    sources_of,
    template_note,
    template_option,
    vllm_command,
)
from moult.measuring.exported import markdown_table
from moult.model.export import PLACE
from moult.model.manifest import open_model
from moult.run.cli import stage_parser
from moult.run.stage import stage
from moult.workflow.exports import ADAPTER, UPLOADS, gguf_file


def main() -> None:
    parser = stage_parser(__doc__, "export_card")
    parser.add_argument("--run", required=True, help="name of the run")
    parser.add_argument("--what", required=True, choices=UPLOADS, help="what is uploaded together")
    parser.add_argument("--model", required=True, help="manifest of the base model; its card names the licence")
    parser.add_argument("--template", required=True, help="chat template of the run")
    parser.add_argument("--metrics", required=True, help="metrics.json")
    parser.add_argument("--exports", nargs="+", required=True, help="export.json of each format")
    parser.add_argument("--card", required=True, help="card to write")
    args = parser.parse_args()

    with stage("export_card", args.log_file, args.settings) as log:
        exports = [read_json(path) for path in args.exports]
        base_card = front_matter(open_model(args.model)[0] / "README.md")
        template = Path(args.template).read_text(encoding="utf-8")
        text = card(args.what, args.run, exports, read_json(args.metrics), template, base_card, args.settings)
        write_text(args.card, text)
        log.info("%s: %s", args.card, ", ".join(export["shown"] for export in exports))


def card(
    what: str, run: str, exports: list[dict], metrics: dict, template: str, base_card: dict, settings: dict
) -> str:
    base, versions = metrics["provenance"]["base"], metrics["provenance"]["versions"]
    if what == "gguf":
        title, told = "GGUF", metadata(metrics, base_card, settings, "finetune", "gguf", "gguf")
        form, use = "in GGUF, for llama.cpp, Ollama and LM Studio", use_of_gguf(run, exports, settings)
    else:
        title, form = exports[0]["shown"], f"in {exports[0]['shown']} (compressed-tensors), for vLLM"
        told = metadata(metrics, base_card, settings, "finetune", "transformers", "compressed-tensors", "vllm")
        use = f"With vLLM, behind an OpenAI-compatible API:\n\n```bash\n{vllm_command(PLACE, run, settings)}\n```\n"
    made = {name: version for export in exports for name, version in export["versions"].items() if name not in versions}
    return f"""{header(told)}
# {run}: {title}

`{base["name"]}` with a LoRA adapter merged into it, tuned on {sources_of(metrics)}, {form}.
Base model: `{base["name"]}`{at(base)}.

## Is it the model that was measured?

{markdown_table(exports)}
Each file has answered, through the server named, the questions that the merged model had answered. Mean KL: how far its
predictions are from the merged model's, in nats per token. Verdict: against the base model. In brackets: the
{100 * metrics["data"]["confidence"]:g} % interval of the difference. The speed is that of the machine that has checked it.

## Base against merged model

Verdict: **{metrics["verdict"]["verdict"]}**. {figures(metrics)}
## Use

{use}
{template_note(template, settings)}## How it was made

{provenance(metrics)}
Made with Moult {versions["moult"]}{"".join(f", {name} {version}" for name, version in sorted(made.items()))}.
"""


def use_of_gguf(run: str, exports: list[dict], settings: dict) -> str:
    """For llama.cpp, Ollama and LM Studio. The examples take the first file."""
    whole = [export for export in exports if export["format"] != ADAPTER]
    option = template_option("--chat-template-kwargs", settings)
    parts = []
    if whole:
        shown, others = whole[0]["shown"], ", ".join(f"`:{export['shown']}`" for export in whole[1:])
        also = f" (also with {others})" if others else ""
        parts.append(LLAMA_CPP.format(place=PLACE, shown=shown, option=option, also=also))
        parts.append(OLLAMA.format(place=PLACE, shown=shown))
        if "Modelfile" in whole[0]["files"]:
            files = {"gguf": gguf_file(run, whole[0]["format"]), "modelfile": modelfile_name(run, whole[0]["format"])}
            found = whole[0]["ollama"]  # what `ollama create` does with the template (moult/exporting/ollama.py)
            but = "" if found["kept"] else f"; but Ollama may replace the template by its own {found['nearest']}"
            parts.append(MODELFILE.format(place=PLACE, run=run, but=but, **files))
        parts.append(LM_STUDIO.format(place=PLACE))
    if len(whole) < len(exports):
        parts.append(BESIDE_THE_BASE.format(place=PLACE, file=gguf_file(run, ADAPTER), option=option))
    return "\n".join(parts)


LLAMA_CPP = """With llama.cpp, behind an OpenAI-compatible API{also}:

```bash
llama-server -hf {place}:{shown}{option}
```
"""
OLLAMA = """With Ollama:

```bash
ollama run hf.co/{place}:{shown}
```
"""
MODELFILE = """Ollama then chooses a context length, and perhaps a chat template, by itself. The Modelfile has the model's{but}:

```bash
hf download {place} {gguf} {modelfile} --local-dir {run}
ollama create {run} -f {run}/{modelfile}
ollama run {run}
```
"""
LM_STUDIO = """With LM Studio: search for `{place}` in the app, or

```bash
lms get https://huggingface.co/{place}
```
"""
BESIDE_THE_BASE = """The adapter alone, beside a GGUF of the base model:

```bash
hf download {place} {file} --local-dir .
llama-server -m base.gguf --lora {file}{option}
```
"""


if __name__ == "__main__":
    main()
