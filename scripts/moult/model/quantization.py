"""A base that is quantized for training (QLoRA, arXiv 2305.14314), with bitsandbytes.

bitsandbytes replaces layers: those whose class is exactly torch's Linear, or GPT-2's Conv1D. The head, embeddings, norms, the
stacked weights of experts, and layers of a class of their own (Falcon's) stay in 16 bits.
"""

import copy
import logging
import re
import sys

# Bits of a quantized weight, without its scales (nf4: 0.127 bits more, with double quantization; int8: a float32 for each row).
BITS = {"nf4": 4, "int8": 8}

# The names of bitsandbytes' optimizers (transformers 5.23, trainer_optimizer.py).
OPTIMIZERS = re.compile(r"bnb|paged|lion|ademamix|(?<!torch_)8bit")


def bitsandbytes_for(settings: dict) -> None:
    """Before peft is imported, which imports bitsandbytes wherever it is installed: that takes a second and says a line on
    stderr. For a stage whose settings do not need it, it is as if it were not installed; for the others it is silent."""
    # int8 also warns at every product of every layer that it computes in float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    needed = settings.get("quantization") or OPTIMIZERS.search(settings.get("train", {}).get("optim", ""))
    if not needed and "peft" not in sys.modules:
        sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # what Python's import system takes for missing


def bitsandbytes_config(kind: str, compute_dtype):
    """transformers.BitsAndBytesConfig of the config's model.quantization. `compute_dtype`: what a 4-bit weight becomes for each
    product, torch.dtype; bitsandbytes' own int8 computes in float16."""
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def quantized_layers(model) -> dict:
    """{name: layer} of what bitsandbytes has replaced in `model`."""
    if sys.modules.get("bitsandbytes") is None:  # nobody has imported it (bitsandbytes_for), so nothing is replaced
        return {}
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear4bit | Linear8bitLt)}


def settle(model) -> None:
    """Keep a quantized model from changing while it is used; in place, after loading.

    On a CPU with AVX512-BF16, bitsandbytes (0.50) packs a 4-bit weight anew at its first use in eval mode, and rounds its scales
    to bfloat16: after its first validation, another model would be trained, and a resumed run would differ.
    """
    for layer in quantized_layers(model).values():
        layer.support_avx512bf16_for_cpu = False
    if set(getattr(model, "hf_device_map", {}).values()) == {"cpu"}:
        # For peft (0.21) it is a model that is offloaded, and gets hooks.
        del model.hf_device_map


def on_meta(model, kind: str):
    """A copy of `model`, which is on the meta device, with bitsandbytes' layers in place of those that it replaces."""
    import torch
    from transformers.quantizers.auto import AutoHfQuantizer

    copied = copy.deepcopy(model)
    quantizer = AutoHfQuantizer.from_config(bitsandbytes_config(kind, torch.bfloat16))
    quantizer.preprocess_model(model=copied, device_map={"": "meta"})
    return copied


def quantized(model, kind: str):
    """A copy of `model`, which is in memory and small, as it is when it is loaded quantized; on the CPU, computed in float32."""
    import torch

    copied = type(model).from_pretrained(
        None,
        config=copy.deepcopy(model.config),
        state_dict={name: tensor.clone() for name, tensor in model.state_dict().items()},
        quantization_config=bitsandbytes_config(kind, torch.float32),
        dtype=torch.float32,
        device_map={"": "cpu"},
    )
    settle(copied)
    return copied


def dequantized(model, original):
    """A copy of `original` with the weights that its quantized form `model` has: what `model` should compute."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight
    from transformers.pytorch_utils import Conv1D

    copied = copy.deepcopy(original)
    for name, layer in quantized_layers(model).items():
        weight = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None)).float()
        twin = copied.get_submodule(name)
        twin.weight.data = weight.T.contiguous() if isinstance(twin, Conv1D) else weight
    return copied
