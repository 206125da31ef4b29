"""A model of any size without its weights: config.json, a small tokenizer, and a file with a header and a hole."""

import json
import math
import shutil
from pathlib import Path

from workflow import ROOT


def make_config_only(folder: Path, shape: dict) -> Path:
    """The manifest of the model, beside `folder`. `shape`: fields of a config.json.

    The file of weights has its full length and takes no room on the disk. It has no hash in the manifest: 140 GB of zeros
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
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        begin, end = end, end + 2 * math.prod(tensor.shape)
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    manifest = {
        "schema_version": 1,
        "name": "config-only",
        "commit": None,
        "folder": str(folder),
        "files": {},
        "ignored": [],
    }
    return write(folder.with_suffix(".json"), manifest)


def write(path: Path, value: dict) -> Path:
    path.write_text(json.dumps(value))
    return path
