"""What a GGUF file says of its model, read without its weights, and whether that is the model which was measured.

The form of the file: docs/gguf.md of ggml. The gates are those by which llama.cpp (build b10605, src/llama-vocab.cpp) reads it.
"""

import math
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from moult.errors import MoultError

# --- reading ----------------------------------------------------------------------------------------------------------

# Types of values, as struct has them. 8 is text, 9 an array.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9

# Types of tensors (ggml.h), those that the formats can have.
TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K"}
TYPES |= {12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 20: "IQ4_NL", 23: "IQ4_XS", 30: "BF16"}

# Weights that a type takes together: a row is a multiple of it, or the tensor gets another type.
BLOCKS = {"Q8_0": 32, "Q6_K": 256, "Q5_K_M": 256, "Q4_K_M": 256}


class Tensor(NamedTuple):
    """A tensor of the file. `shape` is as torch has it, the row last; `begin` is its first byte."""

    type: str
    shape: tuple[int, ...]
    begin: int


class Header(NamedTuple):
    """{key: value} and {name: tensor}."""

    fields: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def architecture(self) -> str:
        return self.fields["general.architecture"]

    def of_architecture(self, name: str) -> Any:
        """The value of a key that has the architecture before it, such as `context_length`; None without it."""
        return self.fields.get(f"{self.architecture}.{name}")

    def types(self) -> dict[str, int]:
        """{type: number of tensors}"""
        return dict(Counter(tensor.type for tensor in self.tensors.values()))

    def fallback(self, shown: str) -> int:
        """How many tensors have another type because their rows do not fit the blocks of the format `shown`."""
        block = BLOCKS.get(shown, 1)
        wide = [tensor for tensor in self.tensors.values() if len(tensor.shape) > 1 and tensor.type != "F32"]
        return sum(tensor.shape[-1] % block > 0 for tensor in wide)


def read_header(path: str | Path) -> Header:
    """Raises MoultError for what is not a whole GGUF file of version 2 or 3."""
    try:
        with Path(path).open("rb") as file:
            magic, version, tensors, fields = struct.unpack("<4sIQQ", file.read(24))
            if magic != b"GGUF" or version not in (2, 3):
                raise ValueError("not GGUF of version 2 or 3")
            values = {_text(file): _value(file, *_numbers(file, "I", 1)) for _ in range(fields)}
            found = [_tensor(file) for _ in range(tensors)]
            align = values.get("general.alignment", 32)
            data = math.ceil(file.tell() / align) * align
    except (ValueError, KeyError, struct.error) as error:
        raise MoultError(f"{path}: not a whole GGUF file ({error})", "delete it and run again") from None
    return Header(values, {name: Tensor(kind, shape, data + begin) for name, kind, shape, begin in found})


def _numbers(file: BinaryIO, kind: str, count: int) -> tuple:
    form = f"<{count}{kind}"
    return struct.unpack(form, file.read(struct.calcsize(form)))


def _text(file: BinaryIO) -> str:
    (size,) = _numbers(file, "Q", 1)
    text = file.read(size)
    if len(text) < size:
        raise ValueError("it ends in a text")
    return text.decode("utf-8", errors="surrogateescape")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _TEXT:
        return _text(file)
    if kind != _ARRAY:
        return _numbers(file, _NUMBERS[kind], 1)[0]
    (kind,), (count,) = _numbers(file, "I", 1), _numbers(file, "Q", 1)
    if kind in _NUMBERS:
        return list(_numbers(file, _NUMBERS[kind], count))
    return [_value(file, kind) for _ in range(count)]


def _tensor(file: BinaryIO) -> tuple[str, str, tuple[int, ...], int]:
    name, (dimensions,) = _text(file), _numbers(file, "I", 1)
    shape = _numbers(file, "Q", dimensions)
    (kind,), (begin,) = _numbers(file, "I", 1), _numbers(file, "Q", 1)
    return name, TYPES.get(kind, f"type {kind}"), shape[::-1], begin


# --- where llama.cpp stops --------------------------------------------------------------------------------------------

# Tokens of these texts end generation, whatever the file says.
ENDS = {"<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"}
ENDS |= {"<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<eos>"}
ENDS |= {"<end_of_utterance>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["}

# So do these, of fill-in-the-middle: of each group the one that the file names, or else one of these texts.
FILL = {
    "fim_pad": {"<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"},
    "fim_rep": {"<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"},
    "fim_sep": {"<|file_sep|>"},
}

EOS, EOT, EOM = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
PADDING, TEMPLATE = "tokenizer.ggml.padding_token_id", "tokenizer.chat_template"


def ends_generation(fields: dict) -> set[int]:
    """The ids of the tokens at which llama.cpp stops (`special_eog_ids`). A GGUF file has no list of them."""
    tokens = fields["tokenizer.ggml.tokens"]
    found = {id for id, text in enumerate(tokens) if text in ENDS}
    for key, texts in FILL.items():
        named = fields.get(f"tokenizer.ggml.{key}_token_id")
        found |= {id for id, text in enumerate(tokens) if text in texts} if named is None else {named}
    found |= {fields[key] for key in (EOS, EOT, EOM) if fields.get(key) is not None}
    ends = {tokens[id]: id for id in found if id < len(tokens)}
    # Two families have one of these texts for something else.
    if ends.keys() & {"<|call|>", "<|calls|>"} and ends.keys() & {"<|return|>", "<|flush|>"}:
        found.discard(ends.get("<|end|>", -1))
    if "<|tool_response>" in ends:
        found.discard(ends.get("</s>", -1))
    return found


def adds(fields: dict, token: str) -> bool:
    """Whether llama.cpp adds the token `bos` or `eos` to a text. Without a word in the file it depends on the tokenizer."""
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    usual = {"bos": kind != "gpt2" or pre in ADD_BOS, "eos": kind == "t5"}[token]
    return fields.get(f"tokenizer.ggml.add_{token}_token", usual)


# Of the tokenizers of kind gpt2, those to whose texts llama.cpp adds BOS unless the file says otherwise.
ADD_BOS = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"}
ADD_BOS |= {"tekken", "chameleon", "gemma4"}


# --- the gates --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """What was measured.

    name: of the model. template: the text, "" for a run on plain text. stops: tokens that end generation, the trained one
    first. padding: its token. context: the longest sequence, in tokens, None if config.json has none.
    """

    name: str
    template: str
    stops: list[int]
    padding: int | None
    context: int | None


class Problem(NamedTuple):
    """A gate that the file does not pass. `change`: {key: value} that puts it right; empty if nothing in the file can."""

    gate: str
    what: str
    change: dict[str, Any]


def problems(header: Header, expected: Expected) -> list[Problem]:
    """What the file says otherwise than the run. All changes together leave none that has a change."""
    found: list[Problem] = []
    fields = dict(header.fields)

    def say(gate: str, what: str, change: dict[str, Any] | None = None) -> None:
        fields.update(change or {})
        found.append(Problem(gate, what, change or {}))

    if fields.get("general.name") != expected.name:
        say("name", f"the file is called {fields.get('general.name')!r}", {"general.name": expected.name})
    eos = fields.get(EOS)
    if expected.stops and eos not in expected.stops:
        say("eos", f"EOS is token {eos}, at which the run does not stop", {EOS: expected.stops[0]})
    padding = fields.get(PADDING)
    if expected.padding is not None and padding != expected.padding:
        say("padding", f"the padding is token {padding}, of the run {expected.padding}", {PADDING: expected.padding})
    for stop in expected.stops:
        if stop not in ends_generation(fields):
            free = next((key for key in (EOT, EOM) if fields.get(key) is None), None)
            say("stops", f"llama.cpp would not stop at token {stop}", {free: stop} if free else None)
    template = fields.get(TEMPLATE, "")
    if template != expected.template:
        sizes = f"{len(template):,} characters, of the run {len(expected.template):,}"
        say("template", f"the chat template is another ({sizes})", {TEMPLATE: expected.template})
    # The template has written all the special tokens of the prompt.
    if expected.template:
        for gate, token in (("bos", "BOS"), ("added_eos", "EOS")):
            if adds(fields, token.lower()):
                key = f"tokenizer.ggml.add_{token.lower()}_token"
                say(gate, f"llama.cpp would add {token} to what the template has written", {key: False})
    context = header.of_architecture("context_length")
    if expected.context is not None and context != expected.context:
        say("context", f"the context is {context} tokens, in config.json {expected.context}")
    tokens, embedding = len(fields["tokenizer.ggml.tokens"]), header.tensors.get("token_embd.weight")
    if embedding is not None and embedding.shape[0] != tokens:
        say("tokens", f"there are {tokens:,} tokens, but embeddings of {embedding.shape[0]:,}")
    return found


def check_header(path: Path, expected: Expected) -> Header:
    """Raises MoultError if the file says something otherwise than the run."""
    header = read_header(path)
    if wrong := problems(header, expected):
        raise MoultError(
            f"{path.name} is not the model that was measured: " + "; ".join(problem.what for problem in wrong),
            WHAT_TO_DO,
        )
    return header


WHAT_TO_DO = "set export.llama_cpp to a newer llama.cpp, which may know the model better, or serve the merged model"
