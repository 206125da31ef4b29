"""Memory that others have measured when they trained, from their tables; and the shapes of the models."""

from dataclasses import dataclass, field

# Fields of the published config.json that say how large a model is.
SHAPES: dict[str, tuple[str, dict]] = {
    "Llama-2-7B": (
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 32000,
        },
    ),
    "Llama-2-13B": (
        "llama",
        {
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "num_key_value_heads": 40,
            "vocab_size": 32000,
        },
    ),
    "Llama-3.2-3B": (
        "llama",
        {
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 128256,
            "tie_word_embeddings": True,
        },
    ),
    "Llama-3.1-8B": (
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
    ),
    "Qwen-7B": (
        "qwen2",
        {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 151936,
        },
    ),
}

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Figure:
    """gb: what the source gives, in 10^9 bytes. known: what the simulation gives where that is further off than 15 %."""

    source: str
    model: str
    rows: int
    length: int
    gb: float
    lora: dict
    step: dict = field(default_factory=dict)
    known: float | None = None

    def __str__(self) -> str:
        bits = self.step.get("quantization") or "16-bit"
        return f"{self.source} {self.model} {bits} {self.rows}x{self.length}"


def lora(r: int, targets) -> dict:
    return {"r": r, "lora_alpha": 2 * r, "target_modules": targets}


QWEN = {"checkpointing": True, "fused": False}
LITGPT = {"fused": False, "autocast": False, "float32_adapter": False}
TORCHTUNE = {"checkpointing": True, "autocast": False, "float32_adapter": False}
LLAMA_FACTORY = {"checkpointing": True, "fused": False, "quantization": "nf4"}
NF4 = {"quantization": "nf4"}

# Known deviations: they hold the logits of all tokens otherwise (Qwen at 8192; TRL's fused loss holds none), load the base in
# 16 bits first (LitGPT's nf4), or give what nvidia-smi shows, which counts CUDA itself (LLaMA-Factory, LongLoRA).
FIGURES = [
    *(
        Figure("Qwen README", "Qwen-7B", 1, length, gb, lora(64, ALL), QWEN, known)
        for length, gb, known in (
            (256, 20.1, None),
            (1024, 21.5, None),
            (2048, 23.8, None),
            (4096, 29.7, None),
            (8192, 36.6, 42.7),
        )
    ),
    *(
        Figure("Qwen README", "Qwen-7B", 1, length, gb, lora(64, ALL), QWEN | NF4, known)
        for length, gb, known in ((2048, 13.9, None), (8192, 23.5, 33.1))
    ),
    Figure("LitGPT", "Llama-2-7B", 1, 1304, 21.3, lora(8, ["q_proj", "v_proj"]), LITGPT),
    Figure("LitGPT", "Llama-2-7B", 2, 1304, 29.1, lora(8, ["q_proj", "v_proj"]), LITGPT),
    Figure("LitGPT", "Llama-2-13B", 1, 1304, 38.1, lora(8, ["q_proj", "v_proj"]), LITGPT),
    Figure("LitGPT", "Llama-2-7B", 1, 1304, 14.1, lora(8, ["q_proj", "v_proj"]), LITGPT | NF4, 10.5),
    Figure("torchtune", "Llama-3.1-8B", 2, 2048, 17.4, lora(8, "all-linear"), TORCHTUNE),
    Figure("torchtune", "Llama-3.1-8B", 2, 2048, 7.95, lora(8, "all-linear"), TORCHTUNE | NF4),
    Figure(
        "peft MetaMathQA",
        "Llama-3.2-3B",
        4,
        768,
        22.3,
        lora(32, ["q_proj", "v_proj"]),
        {"fused": False, "autocast": False, "attention": "dense"},
    ),
    *(
        Figure("LLaMA-Factory", "Llama-2-7B", 1, length, gb, lora(8, "all-linear"), LLAMA_FACTORY, known)
        for length, gb, known in ((1024, 6, 5.06), (4096, 9, None), (16384, 19, None), (32768, 32, None))
    ),
    Figure("LongLoRA", "Llama-2-7B", 1, 8192, 25.7, lora(8, ATTENTION), LITGPT | {"checkpointing": True}, 20.6),
]
