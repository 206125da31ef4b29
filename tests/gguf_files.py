"""Small GGUF files, and the parts of tokenizer.json, made on the spot."""

import struct
from pathlib import Path

# A vocabulary in which no text but that of EOS ends generation in llama.cpp.
TOKENS = ["<pad>", "<|im_start|>", "<|im_end|>", "a", "b", "<stop>", "<other stop>", "<third stop>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
FIELDS = {
    "general.architecture": "llama",
    "general.name": "mine",
    "llama.context_length": 512,
    "llama.block_count": 1,
    "llama.attention.head_count": 2,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 0,
    "tokenizer.chat_template": TEMPLATE,
}
# {name: (number of the type, shape as torch has it)}
TENSORS = {"token_embd.weight": (8, (len(TOKENS), 32)), "blk.0.attn_norm.weight": (0, (32,))}


def write_gguf(path: Path, changes: dict | None = None, tensors: dict = TENSORS) -> Path:
    """A file with FIELDS and `changes` (None takes a field away), and the headers of `tensors`."""
    fields = {key: value for key, value in {**FIELDS, **(changes or {})}.items() if value is not None}
    parts = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(fields))]
    parts += [text(key) + value_of(value) for key, value in fields.items()]
    for place, (name, (kind, shape)) in enumerate(tensors.items()):
        parts += [text(name), struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))]
        parts += [struct.pack("<IQ", kind, place * 4096)]
    path.write_bytes(b"".join(parts))
    return path


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def value_of(value) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    kind = 8 if isinstance(value[0], str) else 5
    items = b"".join(text(item) if kind == 8 else struct.pack("<i", item) for item in value)
    return struct.pack("<IIQ", 9, kind, len(value)) + items


# Steps that split text, as tokenizer.json has them.
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT_2 = {**BYTES, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


def tokenizer_json(*steps: dict, normalizer=None, **model) -> dict:
    pre = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": list(steps)}
    model = {"type": "BPE", "byte_fallback": False, "ignore_merges": False, **model}
    return {"model": model, "pre_tokenizer": pre, "normalizer": normalizer, "decoder": {"type": "ByteLevel"}}


def split(regex: str, behavior: str = "Isolated") -> dict:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": False}


def steps_of(names: tuple[str, ...]) -> list[dict]:
    """The steps that moult/exporting/pretokenizer.py has these names for."""
    return [{"ByteLevel": GPT_2, "bytes": BYTES, "Digits": DIGITS}.get(name) or split(name) for name in names]
