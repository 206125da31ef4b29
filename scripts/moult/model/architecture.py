"""Which of transformers' classes a model is, and the model without its weights."""

from pathlib import Path

from moult.errors import MoultError
from moult.files import read_json


def auto_class(config):
    """The auto class that makes a model that writes text of a config.

    AutoModelForCausalLM, or where that does not know the config (Mistral 3, Qwen3-VL: a text model with towers for images),
    the one for models of several kinds of input, which take text alone as well. Of some models (Qwen3.5) the first makes the
    text part without the towers, of others (Gemma 3) the whole.

    Raises MoultError if neither knows it, or if it is an encoder with a decoder.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MULTIMODAL_LM_MAPPING,
        AutoModelForCausalLM,
        AutoModelForMultimodalLM,
    )

    brings_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if brings_code or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING and not config.is_encoder_decoder:
        return AutoModelForMultimodalLM
    raise MoultError(
        f"{config.name_or_path}: transformers cannot continue a text with a model of the type {config.model_type}",
        "set model.name to a language model; it may take images or sound as well",
    )


def other_class(folder: str | Path, model) -> list[str]:
    """Why vLLM would not find the layers of an adapter of `model`: vLLM makes the class that config.json names. Where Moult
    trains another one (the text part of Qwen3.5), its names match no layer, and vLLM answers as the base
    (vllm-project/vllm#39369). Empty if the classes are the same."""
    named = read_json(Path(folder) / "config.json").get("architectures") or [type(model).__name__]
    return [] if type(model).__name__ in named else [f"tuned as {type(model).__name__}, not as {', '.join(named)}"]


def empty_model(folder: str | Path, trust_remote_code: bool):
    """The model of a folder's config.json on the meta device: shapes, no weights. Raises MoultError if there is none."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError, ImportError, StrictDataclassError) as error:
        known = read_json(Path(folder) / "config.json").get("model_type") in CONFIG_MAPPING
        raise MoultError(
            f"{folder}: transformers cannot build this model: {str(error).strip().splitlines()[0]}",
            "check config.json" if known else "check config.json, or set model.trust_remote_code",
        ) from error
