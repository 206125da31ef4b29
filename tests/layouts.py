"""Tiny models of random weights whose parameters are not the tensors of their files one by one, or have towers."""

from pathlib import Path

import torch
from tiny import SIZES

TEXT = {**SIZES["default"], "vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
TOWER = {**SMALL, "image_size": 32, "patch_size": 8}
QWEN_TOWER = {"hidden_size": 32, "depth": 1, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64}

# What is told of the architecture besides the sizes. `towers`: of a model for images and text, that of its two parts.
KINDS = {
    "gemma3": {
        "towers": ({}, TOWER),
        "mm_tokens_per_image": 4,
        **{f"{name}_token_index": 120 + index for index, name in enumerate(("image", "boi", "eoi"))},
    },
    "mistral3": {
        "towers": ({"model_type": "mistral"}, {**TOWER, "model_type": "pixtral", "head_dim": 16}),
        "image_token_index": 120,
    },
    "qwen3_vl": {
        "towers": (
            {"rope_parameters": {**ROPE, "mrope_section": [4, 2, 2], "mrope_interleaved": True}},
            {**QWEN_TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": []},
        ),
    },
    "qwen3_5": {
        "towers": (
            {
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "linear_key_head_dim": 16,
                "linear_value_head_dim": 16,
                "num_hidden_layers": 4,
                "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
            },
            {**QWEN_TOWER, "num_position_embeddings": 16},
        ),
    },
    "qwen3_moe": {**EXPERTS, "num_experts": 4, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "mixtral": {"num_experts_per_tok": 2, "num_local_experts": 4},
    "gpt_oss": {"num_experts_per_tok": 2, "num_local_experts": 4, "sliding_window": 32},
    "phi3": {},
}


def make_any(folder: Path, kind: str, dtype=torch.float32, shard: str = "50GB", **changes) -> Path:
    """A model of one of KINDS in `folder`, its files as transformers writes them."""
    from transformers import AutoConfig

    from moult.model.architecture import auto_class

    settings = {**KINDS[kind], **changes}
    if "towers" in settings:
        text, tower = settings.pop("towers")
        settings |= {"text_config": {**TEXT, **text}, "vision_config": tower}
    else:
        settings = {**TEXT, **settings}
    config = AutoConfig.for_model(kind, **settings)
    torch.manual_seed(0)
    whole = auto_class(config)
    if "text_config" in settings:
        from transformers import AutoModelForMultimodalLM as whole
    model = whole.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3 / parameter.shape[-1] ** 0.25)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def load(folder: Path, dtype="auto"):
    from moult.model.device import read_model

    return read_model(folder, dtype, trust_remote_code=False).eval()


def adapt(base: Path, folder: Path, lora: dict, scale: float = 0.1) -> Path:
    """An adapter for `base` as finetune leaves it, with random A and B."""
    from peft import get_peft_model

    from moult.model.lora import lora_config

    torch.manual_seed(3)
    model = get_peft_model(load(base), lora_config(lora))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)
    model.save_pretrained(folder)
    return folder
