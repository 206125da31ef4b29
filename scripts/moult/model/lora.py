"""What is known of a LoRA config without training: how its adapter can be merged, and whether vLLM serves it as it is."""

import re

# vLLM 0.32/0.33, config/lora.py: the ranks that --max-lora-rank takes.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

# The values of init_lora_weights that need nothing but the base's weights. The others (eva, corda, lora_ga, loftq) need a
# pass over the data or a quantized base; peft would start some of them otherwise, without a word.
STARTS = r"gaussian|orthogonal|olora|mica|pissa(_niter_\d+)?"


def lora_config(settings: dict):
    """peft.LoraConfig of the config's `lora` section. Raises MoultError for values that peft refuses, or would misread."""
    from peft import LoraConfig

    from moult.errors import MoultError

    start = settings.get("init_lora_weights")
    if isinstance(start, str) and not re.fullmatch(STARTS, start):
        raise MoultError(
            f"lora.init_lora_weights: Moult cannot start from {start}",
            "set true, false, gaussian, orthogonal, olora, mica, pissa or pissa_niter_<number>",
        )
    try:
        return LoraConfig(task_type="CAUSAL_LM", **settings)
    except (TypeError, ValueError) as error:
        raise MoultError(f"lora: {error}", "fix the lora section of the config") from None


def lora_layers(model):
    """(name in the base, LoRA layer) of each layer and each parameter that a PeftModel has LoRA on.

    peft wraps the module that holds a parameter, and wraps it again for the next one: `experts.base_layer` is the wrapper of
    the first of the parameters of `experts`.
    """
    from peft.tuners.lora import LoraLayer, ParamWrapper

    for name, module in model.base_model.model.named_modules():
        if isinstance(module, ParamWrapper):
            yield f"{name.replace('.base_layer', '')}.{module.parameter_name}", module
        elif isinstance(module, LoraLayer):
            yield name, module


def not_linear(model) -> list[str]:
    """Kinds of the layers that a PeftModel has LoRA on and that are not matrices: peft has its own sums for them."""
    from peft.tuners.lora import Linear, ParamWrapper

    kinds = {
        type(layer.get_base_layer()).__name__
        for _, layer in lora_layers(model)
        if not isinstance(layer, Linear | ParamWrapper)
    }
    return [f"LoRA on {kind}" for kind in sorted(kinds)]


def needs_peft(settings: dict) -> list[str]:
    """Why an adapter of these settings cannot be merged tensor by tensor, and peft must do it with the whole model."""
    reasons = {
        "use_dora": settings.get("use_dora"),
        "modules_to_save": settings.get("modules_to_save"),
        "bias": settings.get("bias", "none") != "none",
        "lora_bias": settings.get("lora_bias"),
        "trainable_token_indices": settings.get("trainable_token_indices"),
        "init_lora_weights": isinstance(settings.get("init_lora_weights"), str)
        and settings["init_lora_weights"] not in ("gaussian", "orthogonal"),
        "use_qalora": settings.get("use_qalora"),
        "use_bdlora": settings.get("use_bdlora") is not None,
        "kasa_config": settings.get("kasa_config") is not None,
        "velora_config": settings.get("velora_config") is not None,
        "monteclora_config": settings.get("monteclora_config") is not None,
    }
    return sorted(name for name, given in reasons.items() if given)


def vllm_refuses(settings: dict, ranks: set[int]) -> list[str]:
    """Why vLLM cannot serve an adapter of these settings, so that only the merged model can be served.

    `ranks` are the ranks in use. From vLLM 0.33's lora/peft_helper.py and config/lora.py; it reads one r and one
    lora_alpha for the whole adapter.
    """
    reasons = [name for name in needs_peft(settings) if name != "init_lora_weights"]
    if isinstance(settings.get("init_lora_weights"), str):
        reasons.append("init_lora_weights")
    reasons += [name for name in ("rank_pattern", "alpha_pattern", "target_parameters") if settings.get(name)]
    if max(ranks) > VLLM_RANKS[-1]:
        reasons.append(f"rank over {VLLM_RANKS[-1]}")
    return sorted(set(reasons))
