"""What LoRA is put on: found by peft itself on the model without weights, less what cannot be trained."""

import copy
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from moult.errors import MoultError, some
from moult.model.lora import lora_config, lora_layers
from moult.model.shrunken import generic
from moult.training.trial import find_faults

# Of all parameters, what may be out of LoRA's reach without a word.
NEGLIGIBLE = 0.01


@dataclass
class Targets:
    """What LoRA is on.

    model: the PeftModel, on the meta device.
    layers: {module: {r, scaling, transposed, shape [out, in], kind}}.
    parameters: {parameter: {r, scaling, shape, experts, swapped, wrapper}}, for those that peft wraps where they are (the
        stacked weights of experts). `wrapper` is the name of their LoRA in the adapter; LoRA's in and out features are the
        last dimension and the one before it if `swapped`, else the other way round.
    left_out: {name with * for numbers: why} of what all-linear picks and LoRA cannot be on.
    exclude: lora.exclude_modules that does that, besides the config's own.
    """

    model: Any
    layers: dict[str, dict] = field(default_factory=dict)
    parameters: dict[str, dict] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    exclude: list[str] = field(default_factory=list)

    def added_settings(self, lora: dict) -> dict:
        """What of the config's `lora` is to be replaced so that peft leaves out what cannot be trained."""
        return {"exclude_modules": with_exclusion(lora, self.exclude)["exclude_modules"]} if self.exclude else {}


def is_linear(module) -> bool:
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Linear | Conv1D)


def name_of(model, wanted) -> str | None:
    return next((name for name, module in model.named_modules() if module is wanted), None)


def linear_names(model) -> list[str]:
    """The last parts of the names of the linear layers, without the head."""
    head = model.get_output_embeddings()
    layers = [name for name, module in model.named_modules() if is_linear(module) and module is not head]
    return sorted({name.rsplit(".", 1)[-1] for name in layers})


def tied_modules(model) -> set[str]:
    """Names of the modules that share the embedding's weight."""
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if output is None or output.weight is not embedding.weight:
        return set()
    return {name for name, module in model.named_modules() if module is output or module is embedding}


# --- with peft --------------------------------------------------------------------------------------------------------


def place_lora(model, lora: dict, small=None) -> Targets:
    """LoRA on `model` (on the meta device; it stays as it is). Raises MoultError for what cannot come out right.

    Args:
        lora: settings of peft.LoraConfig.
        small: a small model of the same architecture (moult.model.shrunken), or None where there is none to try it on.
    """
    left_out: dict[str, str] = {}
    try:
        targets = inject(model, lora, [])
    except MoultError:
        left_out = refused_by_peft(model, lora) if takes_all(lora) else {}
        if not left_out:
            raise
        targets = inject(model, lora, suffixes(model, left_out))
    check_targets(targets, lora, model)
    faults = find_faults(small, [*targets.layers, *targets.parameters], lora) if small is not None else {}
    if faults:
        check_explicit(faults, targets, lora)
        left_out |= faults
        targets = inject(model, lora, suffixes(model, left_out))
    targets.left_out = left_out
    return targets


def takes_all(lora: dict) -> bool:
    wanted = lora["target_modules"]
    return isinstance(wanted, str) and wanted.lower() == "all-linear"


def inject(model, lora: dict, exclude: list[str]) -> Targets:
    from peft.tuners.lora import ParamWrapper
    from transformers.pytorch_utils import Conv1D

    try:
        peft_model = with_lora(model, with_exclusion(lora, exclude))
    except (ValueError, RuntimeError, TypeError) as error:
        raise not_placed(error, model, lora) from error
    targets = Targets(peft_model, exclude=exclude)
    for name, layer in lora_layers(peft_model):
        entry = {"r": layer.r["default"], "scaling": float(layer.scaling["default"])}
        if isinstance(layer, ParamWrapper):
            wrapper = name_of(peft_model.base_model.model, layer)
            entry |= {"shape": list(layer.get_param().shape), "experts": layer.num_experts, "wrapper": wrapper}
            targets.parameters[name] = entry | {"swapped": layer._did_swap_in_out_features}
            continue
        base = layer.get_base_layer()
        transposed = isinstance(base, Conv1D)
        rows, columns, *_ = base.weight.shape
        entry |= {"transposed": transposed, "shape": [columns, rows] if transposed else [rows, columns]}
        targets.layers[name] = entry | {"kind": type(base).__name__}
    return targets


def with_lora(model, lora: dict):
    from peft import get_peft_model

    config = lora_config(lora)
    # Initialisations that look at the weights cannot run without them; the shapes are the same.
    config.init_lora_weights = True
    return get_peft_model(copy.deepcopy(model), config, low_cpu_mem_usage=True)


def with_exclusion(lora: dict, exclude: list[str]) -> dict:
    """The settings with more to exclude. peft takes a list of names or one regular expression."""
    own = lora.get("exclude_modules")
    if not exclude:
        return lora
    if isinstance(own, str):
        return {**lora, "exclude_modules": rf"{own}|(.*\.)?({'|'.join(map(re.escape, exclude))})"}
    return {**lora, "exclude_modules": sorted({*(own or []), *exclude})}


def not_placed(error: Exception, model, lora: dict) -> MoultError:
    reason, linear = str(error).strip().splitlines()[0], linear_names(model)
    hint = f"linear layers of this model: {some(linear, 20)}"
    if lora["target_modules"] in linear:
        hint = f"make it a list, [{lora['target_modules']}]: a text is a regular expression for the whole name"
    if "lora_dropout" in reason:
        return MoultError(f"lora.lora_dropout: {reason} (experts have it)", "set lora.lora_dropout: 0")
    if "incompatible" in reason:
        hint = "leave it out of lora.target_modules, or name it in lora.exclude_modules"
    return MoultError(f"lora.target_modules: {reason}", hint)


def refused_by_peft(model, lora: dict) -> dict[str, str]:
    """{name: why} of the linear layers that peft itself refuses (those of Mamba whose weights its kernels read)."""
    refused: dict[str, str] = {}
    why = refusal(model, lora, [])
    for name in linear_names(model) if why else []:
        without = refusal(model, lora, [*refused, name])
        if without != why:
            refused[name], why = str(why), without
        if why is None:
            return refused
    return {}


def refusal(model, lora: dict, exclude: list[str]) -> str | None:
    try:
        with_lora(model, with_exclusion(lora, exclude))
    except ValueError as error:
        # "[PEFT:LORA] Module 'out_proj' is incompatible with Mamba-based models (model_type='mamba'). Please ..."
        return re.sub(r"^\[.*?\] | \(model_type=.*", "", str(error).strip().splitlines()[0])
    return None


# --- checks -----------------------------------------------------------------------------------------------------------


def check_targets(targets: Targets, lora: dict, model) -> None:
    """Raises MoultError for LoRA where it is not wanted, and for names that nothing has."""
    linear, tied = linear_names(model), tied_modules(model)
    head = name_of(model, model.get_output_embeddings())
    for key, names, found, all_of_them in (
        ("target_modules", lora["target_modules"], targets.layers, linear),
        ("target_parameters", lora.get("target_parameters"), targets.parameters, stacked_names(model)),
    ):
        # peft is content when one of them matches.
        idle = [name for name in names or [] if not any(ends_with(place, name) for place in found)]
        if isinstance(names, list) and idle:
            have = f"linear layers of this model: {some(all_of_them, 20)}"
            if key == "target_parameters":
                have = f"parameters of this model that are no layer's: {some(all_of_them, 20)}"
            raise MoultError(f"lora.{key}: nothing is named {some(idle)}", have)
    if not targets.layers and not targets.parameters:
        raise MoultError("lora.target_modules: no layer matches", f"linear layers of this model: {some(linear, 20)}")
    hit = sorted(tied & set(targets.layers))
    if hit:
        raise MoultError(
            f"lora.target_modules: {some(hit)} share one weight (tied embeddings), and merging LoRA into one changes both",
            "leave them out; to train new tokens, set lora.modules_to_save: [embed_tokens] and ensure_weight_tying: true",
        )
    if head in targets.layers:
        raise MoultError(
            f"lora.target_modules: {head} cannot be tuned: TRL's fused loss reads its weight directly (TRL 1.16)",
            f"leave {head} out; all-linear does",
        )
    saved = [name for name in lora.get("modules_to_save") or [] if any(module.endswith(name) for module in tied)]
    if saved and not lora.get("ensure_weight_tying"):
        raise MoultError(
            f"lora.modules_to_save: {some(saved)} is tied to another weight, and training a copy of it would part the two",
            "set lora.ensure_weight_tying: true, or leave it out",
        )
    check_wrappers(targets, lora, head)


def check_wrappers(targets: Targets, lora: dict, head: str | None) -> None:
    from peft.tuners.lora import ParamWrapper
    from peft.utils.other import TrainableTokensWrapper

    if isinstance(targets.model.get_output_embeddings(), TrainableTokensWrapper):
        raise MoultError(
            f"lora.trainable_token_indices: {head} has the embedding's weight, and TRL's fused loss cannot use it wrapped "
            "(TRL 1.16)",
            "set lora.modules_to_save: [embed_tokens] and ensure_weight_tying: true instead",
        )
    layers = [
        (name, layer.get_base_layer())
        for name, layer in lora_layers(targets.model)
        if not isinstance(layer, ParamWrapper)
    ]
    without_bias = [name for name, base in layers if getattr(base, "bias", None) is None]
    if lora.get("lora_bias") and without_bias:
        raise MoultError(
            f"lora.lora_bias: {some(without_bias, 3)} of the base have no bias that the adapter's could be merged into",
            "leave it out",
        )


def check_explicit(faults: dict[str, str], targets: Targets, lora: dict) -> None:
    """Raises MoultError if a name that the config gives stands for nothing that can be trained."""
    everything = takes_all(lora)
    modules = [] if everything else lora["target_modules"]
    # Weights of experts that peft takes for all-linear cannot be excluded one by one.
    parameters = list(targets.parameters) if everything else lora.get("target_parameters")
    for key, wanted, found in (
        ("target_modules", modules, targets.layers),
        ("target_parameters", parameters, targets.parameters),
    ):
        for name in wanted if isinstance(wanted, list) else [wanted] if wanted else []:
            places = [place for place in found if isinstance(wanted, str) or ends_with(place, name)]
            bad = sorted({generic(place) for place in places} & set(faults))
            # A regular expression says what it means; a name may well be that of a tower for images too.
            if bad and (isinstance(wanted, str) or all(generic(place) in faults for place in places)):
                raise MoultError(
                    f"lora.{key}: LoRA cannot be trained on {some(bad)}: {faults[bad[0]]} (tried on a small model of the "
                    "same architecture)",
                    f"leave {name if isinstance(wanted, list) else 'it'} out",
                )


def ends_with(place: str, name: str) -> bool:
    return place == name or place.endswith(f".{name}")


def out_of_reach(model, targets: Targets, lora: dict) -> dict | None:
    """Which weights all-linear leaves out, and what to write to tune them too: weights of experts that are not layers, and
    layers that have the name of an expert's (DeepSeek's dense and shared ones: peft 0.21 takes the name for the experts
    alone). None where that is next to nothing."""
    if not takes_all(lora):
        return None
    sizes: Counter[str] = Counter()
    for name, parameter in stacked(model):
        # Of two dimensions are routers, and what is no weight of a sum (Mamba's A_log).
        if name not in targets.parameters and parameter.dim() == 3:
            sizes[ending(name)] += parameter.numel()
    for name, module in model.named_modules() if not lora.get("exclude_modules") else []:
        reached = name in targets.layers or f"{name}.weight" in targets.parameters or generic(name) in targets.left_out
        if is_linear(module) and module is not model.get_output_embeddings() and not reached:
            sizes[f"{ending(name)}.weight"] += module.weight.numel()
    total = sum(parameter.numel() for parameter in model.parameters())
    large = sorted(name for name, size in sizes.items() if size >= NEGLIGIBLE * total)
    return {"share": sum(sizes[name] for name in large) / total, "target_parameters": large} if large else None


# --- names ------------------------------------------------------------------------------------------------------------


def stacked_names(model) -> list[str]:
    """The last two parts of the names of the matrices that are not a layer's own: weights of experts, routers."""
    return sorted({ending(name) for name, _ in stacked(model)})


def ending(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def stacked(model) -> list[tuple[str, Any]]:
    """(name, parameter) of the matrices, stacked ones too, of modules that are neither layers nor embeddings."""
    from torch import nn

    layers = (nn.Embedding, nn.modules.conv._ConvNd)
    return [
        (f"{name}.{own}", parameter)
        for name, module in model.named_modules()
        if not is_linear(module) and not isinstance(module, layers)
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.dim() in (2, 3) and "bias" not in own
    ]


def suffixes(model, left_out: dict[str, str]) -> list[str]:
    """The shortest names that take in the linear layers of `left_out`, and no other of those that LoRA may be on."""
    linear = [name for name, module in model.named_modules() if is_linear(module)]
    out = {name for name in linear if generic(name) in left_out or name.rsplit(".", 1)[-1] in left_out}
    found = set()
    for name in sorted(out):
        parts = name.split(".")
        longer = (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))
        found.add(next(end for end in longer if out.issuperset(other for other in linear if ends_with(other, end))))
    return sorted(found)
