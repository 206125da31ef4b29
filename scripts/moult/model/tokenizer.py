"""The tokenizer of a model folder: its own chat templates, what it makes of text, and the tokens that end its answers."""

import codecs
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from moult.errors import MoultError
from moult.files import read_json

# What a model has of templates, as transformers has it in `tokenizer.chat_template`: one text, or several by name.
# "default" is for any conversation, "tool_use" for those with tools, others only for who asks for them by name.
Template = str | dict[str, str]


@contextlib.contextmanager
def without_torch(own_code: bool) -> Iterator[None]:
    """Meanwhile transformers finds no torch, unless it is there already, or the tokenizer's `own_code` may ask for it.

    It imports torch beside each tokenizer, and does not need it: 1.1 of the 2.2 seconds that encode took to start.
    """
    if own_code or "torch" in sys.modules:
        yield
        return
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # it would tell that there is no torch
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


def load_tokenizer(folder: str, trust_remote_code: bool = False):
    """The tokenizer in a model folder. Raises MoultError where there is none that is whole."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, or what tokenizers raises
        if not (Path(folder) / "tokenizer.json").exists():
            raise MoultError(f"{folder}: no tokenizer.json, and nothing to make one of", "add the tokenizer") from error
        raise MoultError(
            f"{folder}: no tokenizer can be loaded: {str(error).splitlines()[0]}", "download or copy the model again"
        ) from error
    if not tokenizer.is_fast:
        raise MoultError(
            f"{folder}: the tokenizer has no tokenizer.json",
            "convert it: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    return tokenizer


def backend_of(tokenizer):
    """The object of the library `tokenizers` that transformers' class hands texts and tokens to, if it does nothing else.

    It gives the same in two thirds of the time. None for a class that treats texts or tokens in a way of its own.
    """
    from transformers import PreTrainedTokenizerFast

    own = type(tokenizer)
    methods = ("__call__", "_encode_plus", "decode", "_decode")
    if any(getattr(own, name) is not getattr(PreTrainedTokenizerFast, name) for name in methods):
        return None
    tokenizer("")  # each call sets what tokenizer.json says of truncation and padding aside
    return tokenizer.backend_tokenizer


def own_templates(folder: str, tokenizer) -> dict[str, str]:
    """{name: text} of the chat templates in a model folder; without one, {}.

    transformers has read them from chat_template.jinja and additional_chat_templates/, or else tokenizer_config.json. The
    chat_template.json that processors read stands in where these have no default. Raises MoultError for a template that
    cannot be read, and for a name that is not the name of a file (the templates are written to files of their names).
    """
    found = tokenizer.chat_template or {}
    templates = {"default": found} if isinstance(found, str) else dict(found)
    legacy = Path(folder, "chat_template.json")
    if "default" not in templates and legacy.is_file():
        try:
            templates["default"] = json.loads(read_text(legacy))["chat_template"]
        except (ValueError, KeyError, TypeError):
            raise MoultError(
                f'{legacy}: not of the form {{"chat_template": "..."}}', "fix it, or set model.chat_template"
            ) from None
    for name, text in templates.items():
        if not isinstance(text, str) or Path(name).name != name:
            raise MoultError(f"{folder}: the chat template {name!r} is not a text with a plain name", "fix the model")
    return {name: text.removeprefix("\ufeff") for name, text in templates.items()}


def read_text(path: Path) -> str:
    """A text file without its byte order mark, which Windows writes and a template would show (PowerShell's `>`: UTF-16)."""
    with path.open("rb") as file:
        utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    try:
        return path.read_text(encoding="utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise MoultError(f"{path}: not UTF-8 (byte {error.start:,})", "save it as UTF-8") from None


def text_ids(tokenizer, text: str) -> list[int]:
    """The tokens of plain text that is to be continued: with the BOS that the tokenizer adds, without an EOS that it adds.

    Behind an EOS a model answers something else (vllm-project/vllm#7492). What the text itself ends with stays.
    """
    made = tokenizer(text, return_special_tokens_mask=True)
    ids, added = made["input_ids"], made["special_tokens_mask"]
    size = len(ids)
    while size > 1 and added[size - 1]:
        size -= 1
    return ids[:size]


def normalised(tokenizer, text: str) -> str:
    """The text as the tokenizer takes it: NFKC, lower case or whatever its normaliser makes of it."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return normalizer.normalize_str(text) if normalizer else text


def stop_ids(folder: str, tokenizer) -> set[int]:
    """The tokens that end generation: the tokenizer's EOS and those of the generation config."""
    # Without a generation config transformers and vLLM make one of the model's.
    paths = [Path(folder) / name for name in ("generation_config.json", "config.json")]
    path = next((path for path in paths if path.exists()), None)
    own = read_json(path).get("eos_token_id") if path else None
    ids = set(own if isinstance(own, list) else [own]) | {tokenizer.eos_token_id}
    return {id for id in ids if id is not None}
