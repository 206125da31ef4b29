"""What llama.cpp calls the way in which a tokenizer splits text, found by the structure of tokenizer.json.

Only what is the same is here. Some expressions llama.cpp writes anew (it has no `\\p{Lu}`), and these match not just the same.
"""

from moult.errors import MoultError

# What is common to three families; {n} stands for numbers.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|{n}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WITH_MARKS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

# (what splits the text, whether a word of the vocabulary is taken whole): llama.cpp's name (src/llama-vocab.cpp, b10605).
NAMES = {
    (("ByteLevel",), False): "gpt-2",
    (("Digits", "ByteLevel"), False): "smollm",
    ((_WORDS.replace("{n}", r"\p{N}{1,3}"), "bytes"), True): "llama-bpe",
    ((_WORDS.replace("{n}", r"\p{N}{1,3}"), "bytes"), False): "smaug-bpe",
    ((_WORDS.replace("{n}", r"\p{N}"), "bytes"), False): "qwen2",
    ((_WITH_MARKS, "bytes"), False): "qwen35",
}


def name_of(tokenizer: dict) -> str:
    """llama.cpp's name for the structure of a tokenizer.json. Raises MoultError, which says what llama.cpp does not have."""
    model = tokenizer["model"]
    for has, what in (
        (model.get("type") != "BPE", f"the model {model.get('type')}"),
        (model.get("byte_fallback"), "byte_fallback"),
        (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"), "prefixes or suffixes of words"),
        ((tokenizer.get("decoder") or {}).get("type") != "ByteLevel", "a decoder that is not ByteLevel"),
        # llama.cpp takes text as it is. That of NFC is the same, as long as it is composed, as nearly all text is.
        ((tokenizer.get("normalizer") or {}).get("type") not in (None, "NFC"), "its normalizer"),
    ):
        if has:
            raise _unknown(what)
    steps = tuple(_step(step) for step in _steps(tokenizer.get("pre_tokenizer")))
    name = NAMES.get((steps, bool(model.get("ignore_merges"))))
    if name is None:
        whole = ", with ignore_merges" if model.get("ignore_merges") else ""
        raise _unknown(f"the pre-tokenizer {' + '.join(steps) or 'null'}{whole}")
    return name


def _steps(pre: dict | None) -> list[dict]:
    if pre is None:
        return []
    if pre["type"] == "Sequence":
        return [step for part in pre["pretokenizers"] for step in _steps(part)]
    return [pre]


def _step(step: dict) -> str:
    """The step in a word, in full what is none of those that NAMES has."""
    kind = step["type"]
    if kind == "ByteLevel" and not step.get("add_prefix_space", True):
        return "ByteLevel" if step.get("use_regex", True) else "bytes"
    if kind == "Digits" and step.get("individual_digits"):
        return "Digits"
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return step["pattern"].get("Regex", str(step))
    return str(step)


def _unknown(what: str) -> MoultError:
    return MoultError(
        f"llama.cpp's converter does not know the tokenizer, and llama.cpp has nothing of just its structure: {what}",
        "set export.llama_cpp to a newer llama.cpp, which may know it; or leave the GGUF formats out of exports, and serve the "
        "merged model or fp8",
    )
