"""How rows become batches: behind each other without padding where that is exact, else in the order of their lengths."""

from dataclasses import dataclass

# cuDNN's attention makes a plan for each new shape (H100). Lengths in steps of 64 are few shapes, and whole tiles.
LENGTH_STEP = 64


@dataclass
class Batches:
    """What the config leaves open, decided for one device.

    padding_free: rows behind each other in one sequence. order: transformers' train_sampling_strategy. attention: the
    implementation to set on the model, None for its own. unmasked: padded rows need no mask. multiple: rows are padded to a
    multiple of it.
    """

    padding_free: bool = False
    order: str = "random"
    attention: str | None = None
    unmasked: bool = False
    multiple: int | None = None


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
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or LENGTH_STEP
    return Batches(
        padding_free=free and not train["packing"],  # TRL packs without it
        order=order,
        attention=NAME if flat and free else None,
        unmasked=exact["unmasked"] is None,
        multiple=LENGTH_STEP if device == "cuda" and not free and positions % LENGTH_STEP == 0 else None,
    )


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
