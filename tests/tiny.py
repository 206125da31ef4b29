"""Tiny models, adapters and token folders, made on the spot."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"

SIZES = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "default": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "max_position_embeddings": 64,
        "head_dim": 16,
    },
}


def make_model(folder: Path, kind: str = "llama", dtype=torch.float32, shard: str = "50GB", **changes) -> Path:
    """A model of random weights in `folder`, saved in `dtype`, in shards of at most `shard`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, vocab_size=128, **ids, **{**SIZES.get(kind, SIZES["default"]), **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def make_tokens(
    folder: Path, rows: int = 16, length: int = 24, vocabulary: int = 128, template: str = TEMPLATE
) -> Path:
    """What encode writes, of random tokens; the first third of each row is context."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    for part in ("train", "val", "test"):
        table = []
        for index in range(rows):
            size = length - index % 5
            ids = torch.randint(3, vocabulary, (size,), generator=generator).tolist()
            context = size // 3
            table.append(
                {
                    "id": f"{part}:{index}",
                    "group": f"{part}{index}",
                    "source": 0,
                    "length": size,
                    "input_ids": ids,
                    "labels": [-100] * context + ids[context:],
                    "answer_start": context,
                    "trained_bytes": size,
                }
            )
        pq.write_table(pa.Table.from_pylist(table), folder / f"{part}.parquet")
    (folder / "chat_template.jinja").write_text(template)
    lengths = {"longest_kept": length, "longest": length}
    report = {
        "template": {"sha256": "0" * 64},
        "stop": {"added": [], "generation_stop_ids": [2], "token_ids": [2]},
        "pad_token_id": 0,
        "vocabulary": vocabulary,
        "max_length": length,
        "train": {"sequences": rows, "tokens": rows * length, "length": lengths},
        "val": {"sequences": rows, "length": lengths},
        "test": {"sequences": rows, "length": lengths},
    }
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def make_adapter(base: Path, folder: Path, lora: dict, scale: float = 0.1) -> Path:
    """An adapter for `base` as finetune leaves it, with random A and B (an untrained B is zero)."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from moult.model.lora import lora_config

    torch.manual_seed(3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), lora_config(lora))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)
    model.save_pretrained(folder)
    return folder


def change_tensors(folder: Path, change, name: str = "model.safetensors") -> None:
    """Rewrite a safetensors file with `change` applied to its {name: tensor} dict."""
    tensors = load_file(folder / name)
    save_file(change(tensors) or tensors, folder / name, metadata={"format": "pt"})


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target
