"""A model of the same architecture that is small enough to run at once: fewer layers, narrower, weights of chance.

plan tries out on it what needs a real forward and backward pass: which layers LoRA can train, what merging gives, whether
packed rows see each other. It is made from the config alone, by rules that know no model's name: each width is divided by
the same number, so that what must be equal (heads x head size = hidden size) stays equal; numbers of heads, groups and
experts stay. Of the layers the first are kept, up to where each kind of layer has come once.
"""

import copy
import math
import re

# Fields of a config that are widths, and those that only look like it.
WIDTH = re.compile(
    r"(hidden|intermediate|ffn|embedding|head|feed_forward)_size|_dim$|_rank$|_width$|^d_|_d_(head|ssm)$|^dim_|headdim$"
    r"|^n_(embd|inner)$|^dff$|kv_channels$|mrope_section"
)
NOT_WIDTH = re.compile(r"vocab|kernel|conv|window|^num_|layers|_filter_|d_state")

# What the widths are divided by, in the order in which it is tried.
DIVISORS = (16, 32, 64, 8, 4, 2, 1)

VOCABULARY = 256
CHUNK = 16  # tokens that Mamba works on at a time; its plain implementation fills up to them
SMALL = 4_000_000  # parameters of a model that is run as it is
LIMIT = 100_000_000  # most parameters of one that is run, in float32

# What a model may raise when its config has come out of proportion, or where it needs a GPU.
BROKEN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def shrink(model):
    """A model of the same architecture as `model` (which may be on the meta device), on the CPU, in float32; None if none can
    be made."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for layers in dict.fromkeys((needed_layers(model), model.config.get_text_config().num_hidden_layers)):
            for divisor in DIVISORS if size(model) > SMALL else (1,):
                small = build(model, layers, divisor)
                if small is not None:
                    return small
    return None


def needed_layers(model) -> int:
    """How many of the first layers have one of each kind, and at least two."""
    depth, kinds = model.config.get_text_config().num_hidden_layers, layer_kinds(model)
    if kinds is None or size(model) <= SMALL:
        return depth
    return min(depth, max(2, 1 + max(kinds.index(kind) for kind in set(kinds))))


def layer_kinds(model) -> list[tuple] | None:
    """What each layer is, equal for those that are alike: the shapes in it, and what the config says of it. None for a model
    whose layers are not in one list."""
    config = model.config.get_text_config()
    depth = config.num_hidden_layers
    stacks = [module for name, module in model.named_modules() if name.endswith(("layers", ".h", "blocks"))]
    stack = next((module for module in stacks if hasattr(module, "__len__") and len(module) == depth), None)
    if stack is None:
        return None
    lists = [value for value in vars(config).values() if isinstance(value, list | str) and len(value) == depth]
    lists = [value for value in lists if len(set(map(str, value))) < depth]  # not those that number the layers
    return [
        (
            tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters()),
            *(str(value[index]) for value in lists),
        )
        for index, layer in enumerate(stack)
    ]


def build(model, layers: int, divisor: int):
    """The model with `layers` layers and its widths divided by `divisor`; None if it is too large or does not run."""
    import torch

    config = shrunken_config(model.config, layers, divisor)
    try:
        with torch.device("meta"):
            if size(type(model)._from_config(copy.deepcopy(config))) > LIMIT:
                return None
        small = type(model)._from_config(config, dtype=torch.float32)
        if generic_names(small) != generic_names(model):
            return None
        randomise(small)
        with torch.no_grad():
            logits = small.eval()(input_ids=torch.arange(9)[None] + 3, use_cache=False).logits
    except BROKEN:
        return None
    return small if logits.isfinite().all() else None


def shrunken_config(config, layers: int, divisor: int):
    """A copy of a config, with what it holds of other configs, for fewer layers and narrower ones."""
    config = copy.deepcopy(config)
    depth = config.get_text_config().num_hidden_layers
    if divisor > 1:
        narrow(config, divisor)
    if layers < depth:
        text = config.get_text_config()
        for name, value in list(vars(text).items()):
            if isinstance(value, list | str) and len(value) == depth:
                setattr(text, name, value[:layers])
        text.num_hidden_layers = layers
    return config


def narrow(config, divisor: int) -> None:
    """Divide what is a width, in place, and cut the vocabulary. `config`: a config or a dict of one."""
    fields = config if isinstance(config, dict) else vars(config)
    for name, value in list(fields.items()):
        if hasattr(value, "to_dict") or (isinstance(value, dict) and "label" not in name):
            narrow(value, divisor)
            continue
        if isinstance(value, bool) or value is None:
            continue
        if "vocab" in name and isinstance(value, int):
            value = min(value, VOCABULARY)
        elif name.endswith("_token_id"):
            value = divide(value, lambda number: number if number < VOCABULARY else 1)
        elif name.endswith("chunk_size") and "attention" not in name and isinstance(value, int):
            value = min(value, CHUNK)
        elif re.search(r"(long|short)_factor|mrope_section", name):
            value = (
                value[: max(1, len(value) // divisor)]
                if "factor" in name
                else [max(1, part // divisor) for part in value]
            )
        elif WIDTH.search(name) and not NOT_WIDTH.search(name):
            value = divide(value, lambda number: max(min(number, 4), number // divisor))
        else:
            continue
        if isinstance(config, dict):
            config[name] = value
        else:
            setattr(config, name, value)


def divide(value, by):
    if isinstance(value, list):
        return [divide(part, by) for part in value]
    return by(value) if type(value) is int else value


def randomise(model) -> None:
    """Weights so large that each layer has a say: those of a fresh model are so small that differences are rounded away."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1 / math.sqrt(parameter.shape[-1]))
            elif not parameter.any():  # scales that start as 0 let no gradient through
                parameter.normal_(0, 0.5)


def generic_names(model) -> set[str]:
    """The names of the modules without the numbers of layers and experts."""
    return {generic(name) for name, _ in model.named_modules()}


def generic(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def of_one_layer(name: str) -> str:
    """The name without the numbers behind the first, the layer's: those of experts."""
    first = re.search(r"\.\d+(?=\.|$)", name)
    return name[: first.end()] + generic(name[first.end() :]) if first else name


def size(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
