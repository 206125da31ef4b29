"""How fast training is: tokens, padding, operations, the GPU's share that is used, waiting for data.

The operations of one token, with a frozen base of N parameters: 2 N forward and 2 N back through the base, whose own gradients
are not computed; 2 N once more where activations are recomputed (gradient checkpointing). So 4 N or 6 N. Full tuning has 6 N
or 8 N, which is what other tools divide by. N counts the parameters that a token is multiplied with: not the table of input
embeddings, where a row is looked up, and of the experts only those that a token goes through. Attention adds, for a row of s
tokens, 2 s² x heads x head size forward in each layer (scores and values, of a causal row one half), as often again.
"""

import re
from dataclasses import asdict, dataclass

# Dense bfloat16 with float32 sums, in TFLOP/s, from NVIDIA's data sheets (B200, H200, H100, A100, A6000, L40S, L4; halved
# where they count sparsity) and its white papers on Blackwell, Ada and GA102 (GeForce). The first name that fits counts.
PEAKS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 NVL": 835.5,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "A100": 312.0,
    "A6000": 154.8,
    "L40S": 362.1,
    "L4": 121.0,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


def peak_of(gpu: str) -> float | None:
    """The peak of a GPU by the name that torch gives it, in TFLOP/s. None if it is not in the table, or is another chip of
    a similar name, or a part of a GPU (MIG)."""
    if "MIG" in gpu:
        return None
    return next((peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b(?! (Ti|D|Laptop))", gpu)), None)


@dataclass
class Work:
    """What this process has done since the last line of the log.

    tokens: real ones. squares: the sum of the squared lengths of the rows. padded: tokens with padding. waited: seconds for
    data.
    """

    tokens: float = 0
    squares: float = 0
    padded: float = 0
    waited: float = 0

    def add(self, **more: float) -> None:
        for name, value in more.items():
            setattr(self, name, getattr(self, name) + value)

    def figures(self) -> list[float]:
        return list(asdict(self).values())


@dataclass
class Cost:
    """Operations of a model. matrices: N. attention: of a row of length 1, forward, all layers. passes: 2, or 3 if
    activations are recomputed."""

    matrices: float
    attention: float

    def operations(self, tokens: float, squares: float, checkpointed: bool) -> float:
        passes = 3 if checkpointed else 2
        # Back through attention both of its inputs get gradients: twice the forward pass.
        return passes * 2 * self.matrices * tokens + (passes + 1) * self.attention * squares


def cost_of(model) -> Cost:
    """The cost of a base model, by its parameters and its config. Attention is left out where the config does not say how
    large it is; windows are not."""
    config = model.config.get_text_config()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    lookup = embedding is not None and (head is None or head.weight is not embedding.weight)
    matrices = 0.0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or (lookup and parameter is embedding.weight):
            continue
        # bitsandbytes packs two numbers of 4 bits into one.
        shape = getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape)
        matrices += shape.numel() * (active_experts(config) if ".experts." in name else 1)
    heads, layers = getattr(config, "num_attention_heads", None), getattr(config, "num_hidden_layers", None)
    if not isinstance(heads, int) or not isinstance(layers, int):
        return Cost(matrices, 0.0)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Cost(matrices, 2.0 * layers * heads * width)


def active_experts(config) -> float:
    """The share of the experts that a token goes through."""
    used = getattr(config, "num_experts_per_tok", None)
    there = next(
        (
            getattr(config, name)
            for name in ("num_experts", "num_local_experts", "n_routed_experts")
            if getattr(config, name, None)
        ),
        None,
    )
    return used / there if isinstance(used, int) and there else 1.0


def line(work: Work, seconds: float, cost: Cost, checkpointed: bool, processes: int, device) -> dict[str, float]:
    """What a line of training_log.jsonl says about speed. `work` is of all processes, `tflops` and `mfu` of one GPU."""
    import torch

    found = {
        "seconds": seconds,
        "tokens_per_second": work.tokens / seconds,
        "padding_share": 1 - work.tokens / work.padded,
        "data_wait_share": work.waited / processes / seconds,
        "tflops": cost.operations(work.tokens, work.squares, checkpointed) / seconds / processes / 1e12,
    }
    if device.type == "cuda":
        peak = peak_of(torch.cuda.get_device_name(device))
        found |= {
            **({"mfu": found["tflops"] / peak} if peak else {}),
            "peak_memory_allocated": torch.cuda.max_memory_allocated(device),
            "peak_memory_reserved": torch.cuda.max_memory_reserved(device),
        }
    return found


# Of the keys of a line, those of which the whole run has a mean by time, and those of which it has the largest.
MEANS = ("tokens_per_second", "padding_share", "data_wait_share", "tflops", "mfu")
LARGEST = ("peak_memory_allocated", "peak_memory_reserved")

# What differs between two runs that are otherwise the same, also if one of them was interrupted.
SPEED = ("seconds", *MEANS, *LARGEST, "resumed_from")


def summary(history: list[dict]) -> dict[str, float | None]:
    """The same for a whole run, from the lines of its log; null for what they do not say."""
    lines = [entry for entry in history if "tokens_per_second" in entry]
    seconds = sum(entry["seconds"] for entry in lines)
    result: dict[str, float | None] = {"seconds": seconds}
    for name in MEANS:
        known = all(name in entry for entry in lines) and seconds > 0
        result[name] = sum(entry[name] * entry["seconds"] for entry in lines) / seconds if known else None
    for name in LARGEST:
        result[name] = max((entry[name] for entry in lines if name in entry), default=None)
    return result
