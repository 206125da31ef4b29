"""Merges of small models, made in this process, and a model of two gigabytes."""

import json
from argparse import Namespace
from pathlib import Path

import torch
from planning import TRAIN, Log
from tiny import make_tokens

import merge
import plan


def make_plan(base: Path, tmp_path: Path, lora: dict) -> Path:
    model = {"dtype": "float32", "quantization": None, "attn_implementation": None}
    model |= {"chat_template_kwargs": {}, "trust_remote_code": False}
    tokens = make_tokens(tmp_path / "tokens")
    arguments = Namespace(model=str(base), tokens=str(tokens), eval={}, out=str(tmp_path / "plan.json"))
    plan.plan({"lora": lora, "train": TRAIN, **model}, arguments, Log())
    return tmp_path / "plan.json"


def run_merge(base: Path, adapter: Path, tmp_path: Path) -> tuple[Path, Log]:
    log = Log()
    arguments = Namespace(
        model=str(base),
        plan=str(tmp_path / "plan.json"),
        tokens=str(tmp_path / "tokens"),
        adapter=str(adapter),
        merged=str(tmp_path / "merged"),
        summary=str(tmp_path / "merge.json"),
        threads=1,
    )
    merge.merge({"trust_remote_code": False}, arguments, log)
    return tmp_path / "merged", log


def make_large_model(folder: Path, config) -> Path:
    """Random bfloat16 weights in four shards, without building the model."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    torch.manual_seed(0)
    names = list(shapes)
    index = {}
    for shard in range(4):
        part = names[shard * len(names) // 4 : (shard + 1) * len(names) // 4]
        file = f"model-0000{shard + 1}-of-00004.safetensors"
        tensors = {name: torch.empty(shapes[name], dtype=torch.bfloat16).normal_(std=0.02) for name in part}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def make_large_adapter(targets: dict, folder: Path, lora: dict) -> Path:
    from safetensors.torch import save_file

    from moult.model.lora import lora_config

    torch.manual_seed(1)
    tensors = {}
    for module, target in targets.items():
        rows, columns = target["shape"]
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(target["r"], columns) * 0.02
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, target["r"]) * 0.02
    config = lora_config({**lora, "target_modules": sorted({module.rsplit(".", 1)[-1] for module in targets})})
    config.save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
