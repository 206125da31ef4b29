"""How the parameters of a model in memory come from the tensors of its files, and the way back: transformers' own conversion.

In transformers 5 a parameter may have another name in memory than in the files (models with towers for images), and may be
made of several tensors (experts are stacked, projections joined). from_pretrained converts by a table
(transformers.conversion_mapping), and save_pretrained turns it round. The same is done here for single parameters, and by
the names that the files really have: they may be of an older layout. (transformers 5.23, core_model_loading)
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moult.errors import MoultError, some
from moult.model.safetensors import Tensor


@dataclass(frozen=True)
class Source:
    """Tensors of the files that become parameters of the model together.

    tensors: {name in the files: name when they are converted}.
    parameters: {name in the model: shape}.
    converter: transformers' WeightConverter, or None where one tensor is one parameter.
    """

    tensors: dict[str, str]
    parameters: dict[str, tuple[int, ...]]
    converter: Any = None


@dataclass(frozen=True)
class _Table:
    """transformers' conversion for a model: `members` has, for each parameter (of several that come together, the first), the
    tensors that it is made of, each with the pattern of the converter that takes it, or None."""

    renamings: list
    converters: dict[str, Any]  # by pattern
    shapes: dict[str, tuple[int, ...]]  # of all parameters
    members: dict[str, list[tuple[str, str | None]]]


def _read_table(model, tensors: Mapping[str, Tensor]) -> _Table:
    """As convert_and_load_state_dict_in_model goes about it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key
    from transformers.core_model_loading import rename_source_key as rename

    entries = get_model_conversion_mapping(model)
    renamings = [entry for entry in entries if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in entries if isinstance(entry, WeightConverter)]
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    base = (model.base_model_prefix, shapes)
    members: dict[str, list[tuple[str, str | None]]] = {}
    for name in sorted(tensors, key=dot_natural_key):
        parameter, pattern = rename(name, renamings, converters, *base)
        if parameter not in shapes and name in shapes:
            parameter, pattern = rename(name, [], [], *base)
        if parameter in shapes:
            members.setdefault(parameter, []).append((name, pattern))
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    return _Table(renamings, by_pattern, shapes, members)


def stored_as(model, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """{parameter: the tensor of the files that it is}, without parameters that are made of several. Arguments: see `sources`."""
    table = _read_table(model, tensors)
    return {
        parameter: members[0][0]
        for parameter, members in table.members.items()
        if members[0][1] is None and tensors[members[0][0]].shape == table.shapes[parameter]
    }


def sources(model, tensors: Mapping[str, Tensor]) -> list[Source]:
    """What each parameter is made of. Tensors that the model's class does not load are in none.

    Args:
        model: as transformers makes it, with or without weights, without LoRA.
        tensors: those of the files.
    """
    import torch
    from transformers.core_model_loading import apply_renamings

    table = _read_table(model, tensors)
    result = []
    for parameter, members in table.members.items():
        if members[0][1] is None:
            result += [Source({name: parameter}, {parameter: table.shapes[parameter]}) for name, _ in members]
            continue
        converter = copy.deepcopy(table.converters[members[0][1]])
        for name, pattern in members:
            converter.add_tensor(parameter, name, pattern, torch.empty(tensors[name].shape, device="meta"))
        made = converter.convert(parameter, model=model, config=model.config)
        renamed = {name: apply_renamings(name, table.renamings) for name, _ in members}
        result.append(Source(renamed, {name: table.shapes[name] for name in made}, converter))
    return result


def in_files(source: Source, values: Mapping[str, Any], model) -> dict[str, Any]:
    """{name in the files: value} of `values`, which has one for each of the source's parameters, of any device and dtype.

    The conversion moves numbers about and never adds any, so that what is added to a parameter is converted as well.
    """
    if source.converter is None:
        (parameter,) = source.parameters
        return dict.fromkeys(source.tensors, values[parameter])
    back = source.converter.reverse_transform()
    for parameter in source.parameters:
        key, pattern = back.rename_source_key(parameter)
        back.add_tensor(key, parameter, pattern, values[parameter])
    made = back.convert(key, model=model, config=model.config)
    # The files may lack the prefix of the base model, which is put on behind the conversion.
    prefix = f"{model.base_model_prefix}."
    made = {name.removeprefix(prefix): value[0] if isinstance(value, list) else value for name, value in made.items()}
    if set(made) != {renamed.removeprefix(prefix) for renamed in source.tensors.values()}:
        raise MoultError(
            f"{some(list(source.parameters))}: transformers does not turn them back into {some(list(source.tensors))}",
            "leave these weights out: lora.exclude_modules, lora.target_parameters",
        )
    return {name: made[renamed.removeprefix(prefix)] for name, renamed in source.tensors.items()}


def check_way_back(source: Source, tensors: Mapping[str, Tensor], model) -> None:
    """Raises MoultError unless the conversion turned round gives the tensors of the files, in their shapes."""
    import torch

    empty = {name: torch.empty(shape, device="meta") for name, shape in source.parameters.items()}
    for name, value in in_files(source, empty, model).items():
        if tuple(value.shape) != tensors[name].shape:
            raise MoultError(
                f"{name} is {tensors[name].shape} in the files, and {tuple(value.shape)} as transformers turns it back",
                "leave these weights out: lora.exclude_modules, lora.target_parameters",
            )
