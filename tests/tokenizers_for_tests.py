"""Tokenizers made on the spot, and what must hold of every trained turn."""

import json
from itertools import groupby
from pathlib import Path

import pytest

from moult.data.labels import sequences_of
from moult.data.sequence import IGNORE, Sequence
from moult.model.chat import FROZEN_DATE, Chat, Unrenderable, on_day

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "config" / "demo" / "base"
SHIPPED = str(ROOT / "config" / "chat_templates")
CHATML = (ROOT / "config" / "chat_templates" / "chatml.jinja").read_text(encoding="utf-8")


def make_tokenizer(
    folder: Path,
    source: Path = DEMO,
    bos: str | None = None,
    eos: str | None = "<|im_end|>",
    pad: str | None = None,
    specials: tuple = (),
    eats_space: bool = False,
    stops: tuple | None = None,
    template: str | None = None,
    change=None,
) -> Path:
    """A model folder without weights: the vocabulary of `source` with a family's special tokens added to it.

    Args:
        specials: more special tokens; with `eats_space` each takes the whitespace behind it, as Phi's do.
        stops: what generation_config.json names; None for no such file.
        change: called with the tokenizer before it is saved.
    """
    from transformers import AddedToken, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    more = [AddedToken(token, rstrip=eats_space, normalized=False, special=True) for token in specials]
    named = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    tokenizer.add_special_tokens(
        {"extra_special_tokens": more, **{name: token for name, token in named.items() if token}}
    )
    for name, token in named.items():
        if token is None:
            setattr(tokenizer, name, None)
    tokenizer.chat_template = template
    if change:
        change(tokenizer)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": len(tokenizer)}))
    if stops is not None:
        stop_ids = {"eos_token_id": tokenizer.convert_tokens_to_ids(list(stops))}
        (folder / "generation_config.json").write_text(json.dumps(stop_ids))
    return folder


def poor(tokenizer):
    """A vocabulary of small letters and newline; other characters vanish without a trace."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    specials = ["<|im_start|>", "<end>"]
    letters = ["\n", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    other = Tokenizer(models.BPE({token: id for id, token in enumerate([*specials, *letters])}, []))
    other.normalizer = normalizers.Replace(" ", "▁")
    other.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    other.add_special_tokens(specials)
    tokenizer._tokenizer = other


def adds_bos(tokenizer):
    from tokenizers import processors

    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], special_tokens=[(bos, tokenizer.bos_token_id)]
    )


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def call(name: str, number: int = 1, **arguments) -> dict:
    return {"id": f"call{number:05d}", "type": "function", "function": {"name": name, "arguments": arguments}}


def answered(text: str, number: int = 1) -> dict:
    return {"role": "tool", "content": text, "tool_call_id": f"call{number:05d}"}


TOOLS = [{"type": "function", "function": {"name": "look_up", "description": "Finds it.", "parameters": {}}}]
ASKED = [user("Where is it?"), assistant("Here.")]

# ChatML in its shortest form; the tests change parts of it.
PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# Templates that print today's date.
DATED = "{{ 'Today Date: ' + strftime_now('%d %b %Y') + '\n' }}" + PLAIN
# As Llama's.
WITH_VARIABLE = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ 'Today Date: ' + date_string + '\n' }}" + PLAIN
)
# As Granite's: who says something to the system says everything.
UNLESS_SYSTEM = "{% if messages[0].role != 'system' %}" + DATED.replace(PLAIN, "") + "{% endif %}" + PLAIN


def spans(labels: list[int]) -> list[tuple[int, int]]:
    """(start, end) of what is trained in one piece."""
    found, at = [], 0
    for trained, piece in groupby(labels, key=lambda label: label != IGNORE):
        size = len(list(piece))
        if trained:
            found.append((at, at + size))
        at += size
    return found


def turns(chat, messages: list[dict], tools: list[dict] | None, sequences: list[Sequence]) -> dict[int, str]:
    """{index of an assistant turn: what its trained tokens say}.

    Asserts that every trained span has as its context, token for token, what a server makes of the messages before one
    assistant turn, that no turn has two spans, and that a label is the token it stands for.
    """
    found: dict[int, str] = {}
    wanted = [index for index, message in enumerate(messages) if message["role"] == "assistant" and index]
    asked = {index: server_ids(chat, messages[:index], tools) for index in wanted}
    for sequence in sequences:
        ids, labels = sequence.input_ids, sequence.labels
        assert len(ids) == len(labels)
        for start, end in spans(labels):
            assert labels[start:end] == ids[start:end]
            turn = [index for index in wanted if asked[index] == ids[:start]]
            assert len(turn) == 1, f"{decode(chat, ids[:start])!r} is asked {len(turn)} times"
            assert turn[0] not in found, f"messages[{turn[0]}] is trained twice"
            # With its context: a SentencePiece decoder takes the space off the beginning of a text.
            found[turn[0]] = decode(chat, ids[:end])[len(decode(chat, ids[:start])) :]
    return dict(sorted(found.items()))


def server_ids(chat, messages: list[dict], tools: list[dict] | None) -> list[int]:
    """The prompt as transformers, and so a server, makes it on the day that training stands still on: nothing of
    moult.model.chat but the template, its settings and that day."""
    shown = [{key: value for key, value in message.items() if key != "train"} for message in messages]
    template = chat.template_for(tools)
    with on_day(template, FROZEN_DATE):
        return chat.tokenizer.apply_chat_template(
            shown, tools=tools, chat_template=template, add_generation_prompt=True, **chat.template_kwargs
        )["input_ids"]


def decode(chat, ids: list[int]) -> str:
    return chat.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def refusal(chat: Chat, messages: list[dict], tools: list[dict] | None = None) -> tuple[str, str]:
    with pytest.raises(Unrenderable) as error:
        sequences_of(chat, {"messages": messages, "tools": tools})
    return error.value.reason, str(error.value)


def said(chat: Chat, messages: list[dict], tools: list[dict] | None = None) -> list[str]:
    return list(turns(chat, messages, tools, sequences_of(chat, {"messages": messages, "tools": tools})).values())
