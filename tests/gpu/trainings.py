"""What tests/gpu/benchmark.py trains, and on what."""

import random
from dataclasses import dataclass, field
from pathlib import Path

from recipe_tables import SHAPES

from moult.files import read_jsonl

ROOT = Path(__file__).resolve().parents[2]

TINY = {**SHAPES["Qwen/Qwen3-0.6B"], "vocab_size": 768, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
TINY |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}

# Batches that keep a large GPU busy: a pass of the small model over 3,000 tokens took an H100 as long as one over 8,000, because
# the processor could not start its kernels faster.
SMALL_BATCH = {"per_device_train_batch_size": 32, "gradient_accumulation_steps": 1}
LARGE_BATCH = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1}
PADDED = {"padding_free": False, "train_sampling_strategy": "random"}


@dataclass(frozen=True)
class Training:
    """A training to measure. model: `small` or `large`."""

    name: str
    model: str
    train: dict = field(default_factory=dict)
    quantization: str | None = None


TRAININGS = [
    Training("padding-free", "small"),
    Training("padded", "small", PADDED),
    Training("packed", "small", {"packing": True}),
    Training("8 B, packed", "large", {"packing": True}),
    Training("8 B, packed, checkpointed", "large", {"packing": True, "gradient_checkpointing": True}),
    Training("8 B, packed, QLoRA", "large", {"packing": True, "gradient_checkpointing": True}, "nf4"),
    Training("packed, checkpointed", "small", {"packing": True, "gradient_checkpointing": True}),
    Training("QLoRA", "small", {}, "nf4"),
]


def made_up_rows(count: int) -> list[dict]:
    """Prompts and answers of the demo's words, as long as those of GSM8K: most are short, some are five times as long."""
    chance = random.Random(0)
    words = sorted(
        {word for row in read_jsonl(ROOT / "config/demo/data/house_format.jsonl") for word in row["question"].split()}
    )

    def text(mean: float) -> str:
        return " ".join(chance.choices(words, k=max(4, min(300, int(chance.lognormvariate(mean, 0.5))))))

    return [{"prompt": text(3.2), "completion": text(3.6)} for _ in range(count)]
