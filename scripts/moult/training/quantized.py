"""A quantized base tried out on a small model of the same architecture, before a run: what fails, or computes something else."""

import torch

from moult.errors import MoultError, some
from moult.model.quantization import dequantized, on_meta, quantized, quantized_layers
from moult.model.shrunken import BROKEN, generic
from moult.training.arguments import show_backbone
from moult.training.targets import Targets
from moult.training.trial import (
    OF_THE_WHOLE,
    ROUNDING,
    distance,
    first_line,
    layers_without_gradient,
    start_off_zero,
    tokens_for,
)


def count_quantized(model, kind: str) -> dict:
    """How much of `model`, which is on the meta device, bitsandbytes quantizes. Raises MoultError if that is nothing.

    Returns {kind, layers, parameters, share of all parameters}.
    """
    layers = quantized_layers(on_meta(model, kind))
    if not layers:
        raise MoultError(
            f"model.quantization: bitsandbytes quantizes no layer of this model: {type(model).__name__} has only layers of "
            "classes that it does not know",
            "set model.quantization: null",
        )
    parameters = sum(layer.in_features * layer.out_features for layer in layers.values())
    share = parameters / sum(parameter.numel() for parameter in model.parameters())
    return {"kind": kind, "layers": len(layers), "parameters": parameters, "share": share}


def check_quantized(small, kind: str, targets: Targets, lora: dict) -> None:
    """Raises MoultError if the architecture does not stand quantized layers, or these LoRA settings do not.

    A layer's weight that is read past the layer (mamba's dt_proj) is packed bytes there. And bitsandbytes (0.50) cannot compute
    some shapes of int8 (DeepSeek V3's).
    """
    try:
        model = quantized(small, kind)
        difference = change_by_packing(model, dequantized(model, small))
    except BROKEN as error:
        raise MoultError(
            f"model.quantization: {kind} fails on a small model of this architecture: {first_line(error)}",
            "set model.quantization: null, or the other kind",
        ) from error
    if not difference < ROUNDING:
        raise MoultError(
            f"model.quantization: with {kind}, a small model of this architecture computes other logits than its weights give "
            f"(they differ by {difference:.1e} of the largest)",
            "set model.quantization: null, or the other kind",
        )
    packed = {generic(f"{name}.weight") for name in quantized_layers(model)}
    if wrapped := [name for name in targets.parameters if generic(name) in packed]:
        raise MoultError(
            f"lora.target_parameters: {some(wrapped)}: a quantized weight is packed, and peft would add to its bytes",
            "name the layers in lora.target_modules instead",
        )
    try:
        train_once(model, targets, lora)
    except BROKEN as error:
        raise MoultError(
            f"model.quantization: these LoRA settings fail on a quantized model: {first_line(error)}",
            "leave out what lora has beyond r, lora_alpha, lora_dropout and target_modules, or set model.quantization: null",
        ) from error


def change_by_packing(model, plain) -> float:
    """How far the logits of the quantized model are from those of the plain one with the same weights (trial.distance)."""
    inputs = {**tokens_for(plain), "use_cache": False}
    with torch.no_grad():
        # As in validation: int8 also rounds what goes into a layer. It must run; how far it is off is not asked.
        model.eval()(**inputs)
        for layer in quantized_layers(model).values():
            layer.train()
        ours, theirs = model(**inputs).logits, plain.eval()(**inputs).logits
    return distance(ours, theirs)


def train_once(model, targets: Targets, lora: dict) -> None:
    """A pass forward and backward with LoRA where it is to be, as TRL does it. Raises ValueError if it trains nothing there."""
    from peft import LoraConfig, get_peft_model
    from trl.trainer.utils import add_fused_lm_head

    wanted = {generic(name) for name in targets.layers}
    own = {name: value for name, value in lora.items() if name not in OF_THE_WHOLE}
    own |= {"r": 2, "target_modules": [name for name, _ in model.named_modules() if generic(name) in wanted]}
    stacked = {generic(name) for name in targets.parameters}
    own["target_parameters"] = [name for name, _ in model.named_parameters() if generic(name) in stacked] or None
    inputs = tokens_for(model)
    with torch.random.fork_rng(devices=[]):
        tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **own))
        show_backbone(tuned.get_base_model())
        add_fused_lm_head(tuned.get_base_model())
        start_off_zero(tuned)
        tuned.train()(**inputs, labels=inputs["input_ids"], fused_lm_head=True).log_probs.sum().backward()
    idle = layers_without_gradient(tuned)
    if idle:
        raise ValueError(f"LoRA gets no gradient on {some(sorted({generic(name) for name in idle}))}")
