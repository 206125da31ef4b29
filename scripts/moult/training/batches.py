"""How rows become batches: behind each other without padding where that is exact, else in the order of their lengths."""

from dataclasses import dataclass

from moult.model.estimates import largest

# cuDNN's attention makes a plan for each new shape (H100). Lengths in steps of 64 are few shapes, and whole tiles.
LENGTH_STEP = 64

# Hidden size from which a CPU that has bfloat16 is faster with it: 1.4 x at 384, 0.9 x at 96 (a Xeon with AVX512-BF16).
WIDE = 256


@dataclass
class Batches:
    """What the config leaves open, decided for one device.

    padding_free: rows behind each other in one sequence. order: transformers' train_sampling_strategy. attention: the
    implementation to set on the model, None for its own. unmasked: padded rows need no mask. multiple: rows are padded to a
    multiple of it. bfloat16: whether a CPU computes in it; on a GPU model.dtype decides.
    """

    padding_free: bool = False
    order: str = "random"
    attention: str | None = None
    unmasked: bool = False
    multiple: int | None = None
    bfloat16: bool = False


def choose_batches(settings: dict, exact: dict, device: str, config) -> Batches:
    """The fastest batches that change nothing of what is computed. What the config says is kept.

    Args:
        exact: of packing.try_batches, from plan.json.
        config: the model's.
    """
    from moult.model.varlen import NAME

    train = settings["train"]
    flat = (
        exact["varlen"] is None and settings["attn_implementation"] is None and kernel_runs(device, settings["dtype"])
    )
    wanted = train["padding_free"]
    free = bool(train["packing"] or (flat if wanted == "auto" else wanted))
    order = train["train_sampling_strategy"]
    if order == "auto":
        order = "random" if free else "group_by_length"
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or LENGTH_STEP
    return Batches(
        padding_free=free and not train["packing"],  # TRL packs without it
        order=order,
        attention=NAME if flat and free else None,
        unmasked=exact["unmasked"] is None,
        multiple=LENGTH_STEP if device == "cuda" and not free and positions % LENGTH_STEP == 0 else None,
        bfloat16=device == "cpu"
        and settings["dtype"] == "bfloat16"
        and not settings["quantization"]
        and (largest(text, "hidden_size") or 0) >= WIDE
        and computes_bfloat16(),
    )


def computes_bfloat16() -> bool:
    """Whether this CPU multiplies matrices of bfloat16 by itself. Elsewhere autocast makes training slower."""
    import torch

    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def kernel_runs(device: str, dtype: str) -> bool:
    """Whether the attention of moult.model.varlen runs on this device. On a GPU it is FlashAttention 2: half precision, and
    compute capability 8.0 (Ampere) or newer. On a CPU it is plain torch."""
    import torch

    if device == "cpu":
        return True
    return dtype != "float32" and torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0)


class Collator:
    """TRL's collator, which also counts what is in a batch, and leaves out a mask that is not needed."""

    def __init__(self, collate, unmasked: bool):
        self.collate, self.unmasked = collate, unmasked

    def __call__(self, rows: list[dict]) -> dict:
        batch = self.collate(rows)
        if self.unmasked:
            batch.pop("attention_mask", None)
        lengths = [length for row in rows for length in row.get("seq_lengths", [len(row["input_ids"])])]
        batch["counts"] = (sum(lengths), sum(length**2 for length in lengths), batch["input_ids"].numel())
        return batch
