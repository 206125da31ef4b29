"""A model of any size without its weights: config.json, a small tokenizer, and files with a header and a hole."""

import json
import math
import shutil
from pathlib import Path

from workflow import ROOT

SHARD = 4_000_000_000


def make_config_only(folder: Path, shape: dict) -> Path:
    """The manifest of the model, beside `folder`. `shape`: fields of a config.json.

    The files of weights have their full length and take no room on the disk. They have no hash in the manifest: 140 GB of zeros
    take minutes to read.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = dict(shape)
    config = AutoConfig.for_model(shape.pop("model_type"), bos_token_id=1, eos_token_id=2, pad_token_id=0, **shape)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ROOT / "config" / "demo" / "base" / name, folder)
    shards: list[dict] = [{}]
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        begin = max((entry["data_offsets"][1] for entry in shards[-1].values()), default=0)
        if begin > SHARD:  # transformers maps a file into memory as a whole
            shards.append({})
            begin = 0
        end = begin + 2 * math.prod(tensor.shape)
        shards[-1][name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    places = {}
    for number, entries in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_hole(folder / file, entries)
        places |= dict.fromkeys(entries, file)
    write(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    manifest = {
        "schema_version": 1,
        "name": "config-only",
        "commit": None,
        "folder": str(folder),
        "files": {},
        "ignored": [],
    }
    return write(folder.with_suffix(".json"), manifest)


def write_hole(path: Path, entries: dict) -> None:
    """A safetensors file with this header, and nothing where the tensors are."""
    raw = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + max(entry["data_offsets"][1] for entry in entries.values()))


def write(path: Path, value: dict) -> Path:
    path.write_text(json.dumps(value))
    return path
