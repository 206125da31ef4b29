"""An adapter in GGUF: llama.cpp adds it to the base while it computes. Is it peft's, number for number?"""

import re
import sys
from pathlib import Path

from moult.errors import MoultError, some
from moult.exporting.gguf import LlamaCpp, rewrite
from moult.exporting.header import Header, read_header
from moult.files import read_json

ALPHA = "adapter.lora.alpha"
USE_MERGED = "export the merged model instead: gguf-bf16, gguf-q8_0"
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def alpha_of(config: dict, ranks: dict[str, int]) -> float:
    """The one alpha by which llama.cpp, which scales by alpha / rank, scales as peft does.

    Args:
        config: adapter_config.json.
        ranks: {module: its rank}.

    Raises MoultError if there is none.
    """
    scale = {module: scaling(config, module) for module in ranks}
    alphas = sorted({round(scale[module] * rank, 6) for module, rank in ranks.items()})
    if len(alphas) != 1:
        raise MoultError(
            f"the adapter's layers have different scales (alpha_pattern, rank_pattern): {some(alphas)} times 1 / rank; GGUF has "
            "one for all",
            USE_MERGED,
        )
    return float(alphas[0])


def scaling(config: dict, module: str) -> float:
    """peft's scale of a layer (peft 0.21, lora/layer.py). A pattern counts for a module that ends with it."""

    def of_pattern(patterns: str, usual: str) -> float:
        found = (key for key in config.get(patterns) or {} if re.match(rf"(.*\.)?({key})$", module))
        key = next(found, None)
        return config[usual] if key is None else config[patterns][key]

    rank, alpha = of_pattern("rank_pattern", "r"), of_pattern("alpha_pattern", "lora_alpha")
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def check_plain(adapter: Path, names: list[str]) -> None:
    """Raises MoultError for what is not plain LoRA: llama.cpp would leave it out."""
    others = [name for name in names if not _NAME.fullmatch(name)]
    if others:
        raise MoultError(f"{adapter}: GGUF has plain LoRA only, and this adapter has {some(others)}", USE_MERGED)


def same_adapter(llama: LlamaCpp, path: Path, base: Header, adapter: Path) -> Header:
    """Check that a GGUF adapter holds the tensors of peft's, each once, and scales them as peft does. The alpha is put right
    where the converter, which knows nothing of rsLoRA, has written another.

    Args:
        base: of the base's GGUF file, with the numbers of its layers and heads.

    Raises MoultError for the first difference.
    """
    import torch
    from safetensors.torch import load_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    check_plain(adapter, list(tensors))
    modules = sorted({_NAME.fullmatch(name)[1] for name in tensors})  # type: ignore[index]
    parts = {
        module: [tensors[f"base_model.model.{module}.lora_{side}.weight"].float() for side in "AB"]
        for module in modules
    }
    alpha = alpha_of(read_json(adapter / "adapter_config.json"), {module: len(a) for module, (a, _) in parts.items()})
    header = read_header(path)
    if abs(header.fields[ALPHA] - alpha) > 1e-6 * alpha:
        rewrite(llama, path, {ALPHA: alpha})
        header = read_header(path)
    names = gguf_names(llama, base, modules)
    left = set(header.tensors)
    with path.open("rb") as file:
        for module, pair in parts.items():
            for side, wanted in zip("ab", pair, strict=True):
                name = f"{names[module]}.weight.lora_{side}"
                tensor = header.tensors.get(name)
                if tensor is None or tensor.type != "F32":
                    raise MoultError(
                        f"{path.name}: {name} of {module} is {'not there' if tensor is None else tensor.type}",
                        USE_MERGED,
                    )
                file.seek(tensor.begin)
                count = wanted.numel()
                found = torch.frombuffer(bytearray(file.read(4 * count)), dtype=torch.float32)
                if tensor.shape != tuple(wanted.shape) or not any(
                    torch.equal(found.view_as(wanted), form) for form in forms(wanted, side, base)
                ):
                    raise MoultError(
                        f"{path.name}: {name} is not {module}.lora_{side.upper()} of the adapter", USE_MERGED
                    )
                left.discard(name)
    if left:
        raise MoultError(f"{path.name}: tensors that the adapter does not have: {some(sorted(left))}", USE_MERGED)
    return header


def forms(wanted, side: str, base: Header):
    """The tensor as it is; of a B, with the rows of each head in the order that llama.cpp's rotary embeddings want (converter,
    LlamaModel.permute)."""
    yield wanted
    for heads in {base.of_architecture("attention.head_count"), base.of_architecture("attention.head_count_kv")}:
        if side == "b" and isinstance(heads, int) and wanted.shape[0] % (2 * heads) == 0:
            halves = wanted.reshape(heads, 2, -1, wanted.shape[-1])
            yield halves.swapaxes(1, 2).reshape(wanted.shape)


def gguf_names(llama: LlamaCpp, base: Header, modules: list[str]) -> dict[str, str]:
    """{module: its name in GGUF}. Raises MoultError for one that has none."""
    sys.path.insert(0, str(llama.folder / "gguf-py"))
    try:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    finally:
        del sys.path[0]
    architecture = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == base.architecture)
    found = get_tensor_name_map(architecture, base.of_architecture("block_count"))
    names = {module: found.get_name(module) for module in modules}
    if missing := [module for module, name in names.items() if name is None]:
        raise MoultError(f"llama.cpp has no name for the layers {some(missing)} of the adapter", USE_MERGED)
    return names
