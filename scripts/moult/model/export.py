"""What goes beside weights, so that a folder can be loaded and served: tokenizer, template, generation config."""

import json
import shutil
from pathlib import Path

from moult.files import read_json, write_json, write_text

# Files of a tokenizer, as transformers names them. Copied byte for byte: re-serialising has broken them often enough
# (NVIDIA-NeMo/Automodel#2653, huggingface/text-generation-inference#1132).
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "tekken.json",
)

# In the examples of a model card, until `make publish` puts the repository's name there.
PLACE = "path/to/this/folder"


def copy_tokenizer(base: Path, out: Path, template: str, named: dict[str, str]) -> None:
    """The base's tokenizer files as they are, and the template that the run was trained with.

    `named` are templates besides it, {name: text}: transformers and vLLM take "tool_use" for conversations with tools. Where
    these files are, they go before what tokenizer_config.json has of templates.
    """
    for name in TOKENIZER_FILES:
        if (base / name).exists():
            shutil.copyfile(base / name, out / name)
    if template:
        write_text(out / "chat_template.jinja", template)
    for name, text in named.items():
        write_text(out / "additional_chat_templates" / f"{name}.jinja", text)


def write_generation_config(base: Path, out: Path, stop: dict) -> None:
    """The base's generation_config.json, with the tokens that end the trained turns among those that stop generation.

    `stop` is encode's report of them. Without this a base model that learnt to end turns with the template's token
    would go on behind it. Nothing is changed where the base stops there already.
    """
    path = base / "generation_config.json"
    if not stop["added"]:
        if path.exists():
            shutil.copyfile(path, out / path.name)
        return
    config = read_json(path) if path.exists() else {}
    write_json(out / path.name, {**config, "eos_token_id": stop["generation_stop_ids"]})


def adapter_config(raw: Path, base_name: str, revision: str | None) -> dict:
    """peft's adapter_config.json in one spelling: lists that are sets to peft are sorted, no path of this machine.

    peft writes `target_modules` in the order of a set, another in each process, and the folder that the base was loaded
    from, which is nowhere else (huggingface/peft#1800).
    """
    config = json.loads(raw.read_text(encoding="utf-8"))
    for name in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
        if isinstance(config.get(name), list):
            config[name] = sorted(config[name])
    return {**config, "base_model_name_or_path": base_name, "revision": revision, "inference_mode": True}
