"""What a run will need, from the shapes: memory of a GPU, disk, a cluster's job. Estimates, not measurements."""

import math

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def estimate_activations(config, stacked: int, tokens: int, dtype: str) -> tuple[int, int] | None:
    """Bytes that forward and backward pass need besides weights and optimizer, without and with gradient checkpointing; None
    for a config that does not say how large its layers are.

    Args:
        stacked: numbers in the stacked weights of experts that LoRA is on.
        tokens: of the longest batch.

    What a decoder layer keeps for its backward pass, per token: about 10 vectors of the hidden and 4 of the intermediate size
    in the compute dtype, and two of the hidden size in float32 for the norms; attention keeps no scores (SDPA); peft adds LoRA
    to stacked experts by a copy of them with the sum, kept for the backward pass. With gradient checkpointing only one hidden
    vector per layer, and one layer in full. The fused loss keeps logits of one chunk only.
    """
    config = config.get_text_config()
    width = BYTES[dtype]
    hidden, layers = largest(config, "hidden_size"), largest(config, "num_hidden_layers")
    if not hidden or not layers or not largest(config, "vocab_size"):
        return None
    intermediate = largest(config, "intermediate_size") or largest(config, "n_inner") or 4 * hidden
    per_layer = tokens * (width * (10 * hidden + 4 * intermediate) + 8 * hidden)
    logits = 3 * 4 * 256 * config.vocab_size
    full = layers * per_layer + stacked * width
    checkpointed = layers * tokens * hidden * width + per_layer + stacked * width // layers
    return full + logits, checkpointed + logits


def largest(config, name: str) -> int | None:
    """A number of the config, the largest where it is a list with one for each layer (Gemma 3n); None if it is neither."""
    value = getattr(config, name, None)
    if isinstance(value, list) and value and all(isinstance(part, int) for part in value):
        return max(value)
    return value if isinstance(value, int) else None


def cache_bytes(config, length: int, width: int) -> float:
    """Keys and values of one sequence while it is generated. Layers with a window keep no more than that.

    Args:
        config: the model's; for what it does not say, the most that it could be (as many heads for keys as for queries, which
            are as wide as the hidden size together, and no window).
        width: bytes of a number.
    """
    config = config.get_text_config()
    layers, hidden = largest(config, "num_hidden_layers") or 1, largest(config, "hidden_size") or 0
    heads = largest(config, "num_attention_heads")
    per_token = 2.0 * width * hidden
    if heads:
        per_head = largest(config, "head_dim") or hidden // heads
        per_token = 2.0 * width * (largest(config, "num_key_value_heads") or heads) * per_head
    window, kinds = largest(config, "sliding_window"), getattr(config, "layer_types", None)
    short = sum(kind == "sliding_attention" for kind in kinds) if kinds and window else 0
    return per_token * ((layers - short) * length + short * min(length, window or length))


def estimate_disk(tensors: dict, trainable: int, train: dict, tokens: int) -> dict:
    """Bytes that the run writes: checkpoints (adapter and two moments, float32; the kept, the best, the one being written),
    the adapter, the merged model, and while it trains the tokens and their labels, unpacked and perhaps packed."""
    merged = sum(tensor.end - tensor.begin for tensor in tensors.values())
    checkpoint = trainable * 12
    checkpoints = checkpoint * (train["save_total_limit"] + 2)
    adapter = trainable * 4
    tokens = tokens * 8 * (2 if train["packing"] else 1)
    return {
        "checkpoints": checkpoints,
        "adapter": adapter,
        "merged": merged,
        "tokens": tokens,
        "total": checkpoints + adapter + merged + tokens,
    }


def estimate_job(base: int, steps: dict, settings: dict, report: dict) -> dict:
    """What finetune asks of a cluster for its first attempt; a job that needs more gets more at the next, and goes on.

    mem_mb, on each node: 6,000 for Python, CUDA and the data, and for each process what it loads at a time: the base goes
    straight to the GPU, file by file, of 5 GB at most (transformers), beside 3 GB for CUDA.
    runtime, minutes: 30, and 6 operations per parameter and token (forward, backward through the frozen base, and forward
    again with gradient checkpointing) and a quarter for validation, at 25 TFLOP/s on each GPU, which is slow; at most a day,
    the limit of many partitions.
    """
    train = settings["train"]
    width = BYTES[settings["dtype"]]
    tokens = steps["total"] * steps["sequences_per_step"] * report["train"]["tokens"] / steps["sequences"]
    minutes = 30 + 1.25 * 6 * base * tokens / (25e12 * train["gpu"]) / 60
    return {
        "mem_mb": math.ceil(6000 + train["gpu"] // train["nodes"] * min(base * width / 1e6, 8000)),
        "runtime": math.ceil(min(minutes, 24 * 60)),
    }
