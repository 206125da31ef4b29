"""What is trained under each published chat template, for each kind of conversation: the whole table of families.py."""

import json
import re
import unicodedata

import pytest
from families import CALLS, CASES, FAMILIES, TOOLS, Refused
from tokenizers_for_tests import (
    CHATML,
    assistant,
    decode,
    make_tokenizer,
    server_ids,
    turns,
    user,
)

from moult.data.conversation import normalise
from moult.data.labels import sequences_of
from moult.data.sequence import IGNORE
from moult.model.chat import Chat, Unrenderable
from moult.model.tokenizer import load_tokenizer


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FAMILIES)
def test_table(name, case, chat_of):
    chat, family, messages = chat_of(name), FAMILIES[name], CASES[case]
    tools = TOOLS if case in CALLS else None
    expected = family.cells.get(case) or [
        family.shows(message["content"]) for message in messages if message["role"] == "assistant"
    ]
    row = {"messages": messages, **({"tools": tools} if tools else {})}
    if isinstance(expected, Refused):
        with pytest.raises(Unrenderable, match=re.escape(expected.says)) as refusal:
            sequences_of(chat, row)
        assert refusal.value.reason == expected.reason
        return
    sequences = sequences_of(chat, row)
    assert list(turns(chat, messages, tools, sequences).values()) == [text + family.stop for text in expected]
    assert len(sequences) == (len(expected) if case in family.split else 1)
    last = sequences[-1]
    assert last.input_ids[: last.answer_start] == server_ids(chat, messages[:-1], tools)
    assert all(sequence.answer_start == -1 for sequence in sequences[:-1])
    assert chat.pad_id not in chat.stop_ids | {last.labels[-1]}


def test_every_published_template_is_in_the_table(shared):
    published = {path.stem for path in (shared / "chat_templates").glob("*.jinja")}
    assert len(published) == 12
    assert published == {family.template for family in FAMILIES.values()} - {"", "shipped"}


# --- a SentencePiece tokenizer: spaces are part of the words, and characters that it lacks vanish ---------------------


@pytest.mark.parametrize("case", [case for case in CASES if case not in CALLS])
@pytest.mark.parametrize("name", ["Llama 2", "Gemma 2", "Phi 3.5", "Zephyr", "shipped ChatML on the demo"])
def test_sentencepiece(name, case, chat_of, shared, tmp_path):
    """The same as on MiniMind's tokenizer, but for the characters that TinyStories' vocabulary does not have."""
    family, messages = FAMILIES[name], CASES[case]
    source, settings, stop = shared / "models" / "TinyStories-656K", dict(family.tokenizer), family.stop
    if family.template == "shipped":
        folder, stop = source, "<|end_story|>"  # ChatML ends turns with the tokenizer's own EOS
    else:
        folder = make_tokenizer(tmp_path / "model", source, **settings)
    chat = Chat(str(folder), chat_of(name).template)
    expected = family.cells.get(case) or [
        family.shows(message["content"]) for message in messages if message["role"] == "assistant"
    ]
    if isinstance(expected, Refused):
        with pytest.raises(Unrenderable, match=re.escape(expected.says)):
            sequences_of(chat, {"messages": messages})
        return
    vocabulary = set("".join(load_tokenizer(str(source)).get_vocab())) | {" "}
    written = ["".join(char for char in text if char in vocabulary) + stop for text in expected]
    sequences = sequences_of(chat, {"messages": messages})
    assert list(turns(chat, messages, None, sequences).values()) == written
    assert len(sequences[-1].input_ids) > sequences[-1].answer_start > 0


# --- real conversations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Qwen3's own", "shipped ChatML on Qwen3"])
@pytest.mark.parametrize("file", ["glaive_toolcall_en_demo.json", "reason_tool_use_demo_50.jsonl"])
def test_tool_calling_and_reasoning_demos(file, name, chat_of, shared):
    """Every assistant turn of every row is one trained span: what the template adds to the prompt, and nothing else."""
    chat, text = chat_of(name), (shared / "datasets" / "llamafactory_demos" / file).read_text(encoding="utf-8")
    rows = json.loads(text) if file.endswith(".json") else [json.loads(line) for line in text.splitlines()]
    checked = 0
    for raw in rows:
        row, _ = normalise(raw, {}, "sharegpt" if "conversations" in raw else "messages")
        messages, tools = row["messages"], row.get("tools")
        said = turns(chat, messages, tools, sequences_of(chat, row))
        assert list(said) == [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        for index, answer in said.items():
            settings = {"tools": tools, "chat_template": chat.template, "tokenize": False}
            prompt = chat.tokenizer.apply_chat_template(messages[:index], add_generation_prompt=True, **settings)
            through = chat.tokenizer.apply_chat_template(messages[: index + 1], **settings)
            assert nfc(prompt + answer) == nfc(through.removesuffix("\n"))
            assert answer.endswith("<|im_end|>") and "<|im_start|>" not in answer
            checked += 1
    assert checked > 2 * len(rows)


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


# --- against other people's masks -------------------------------------------------------------------------------------


MARKED = ["shipped ChatML on MiniMind", "shipped ChatML on Qwen3", "the demo's own"]


def rendered(name: str) -> list[str]:
    """The cases that a family's template can show."""
    return [case for case in CASES if not isinstance(FAMILIES[name].cells.get(case), Refused)]


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name in MARKED for case in rendered(name) if case not in FAMILIES[name].split],
)
def test_mask_is_that_of_transformers(name, case, chat_of):
    """`{% generation %}` markers, as transformers itself reads them, give the same labels token for token."""
    chat, messages = chat_of(name), CASES[case]
    tools = TOOLS if case in CALLS else None
    theirs = chat.tokenizer.apply_chat_template(
        messages, tools=tools, chat_template=chat.template, return_assistant_tokens_mask=True
    )
    [ours] = sequences_of(chat, {"messages": messages, "tools": tools})
    size = len(ours.input_ids)  # behind the last stop token the template writes a newline
    assert theirs["input_ids"][:size] == ours.input_ids
    assert [label != IGNORE for label in ours.labels] == [mask == 1 for mask in theirs["assistant_masks"][:size]]
    assert not any(theirs["assistant_masks"][size:])


TRL_FAMILIES = {"qwen3": "Qwen3", "qwen2_5": "Qwen2.5", "gemma": "Gemma 2", "llama3": "Llama 3.1", "phi3_5": "Phi 3.5"}


@pytest.mark.parametrize(
    ("theirs", "case"),
    [
        (theirs, case)
        for theirs, name in TRL_FAMILIES.items()
        for case in rendered(name)
        if not (theirs == "llama3" and case in CALLS)  # it has no tools, Llama 3.1 has
    ],
)
def test_mask_is_that_of_trl(theirs, case, chat_of):
    """TRL patches markers into the templates of known families; we need none, and train the same.

    What it marks besides is whitespace, and what ends not the turn but the conversation. Where Phi's <|assistant|> has taken
    an answer's first spaces, transformers marks that token.
    """
    trl = pytest.importorskip("trl.chat_template_utils")
    messages, tools = CASES[case], TOOLS if case in CALLS else None
    chat = Chat(chat_of(TRL_FAMILIES[theirs]).tokenizer.name_or_path, getattr(trl, f"{theirs}_chat_template"))
    assert not chat.marks_answers(None)
    sequence = sequences_of(chat, {"messages": messages, "tools": tools})[-1]
    marked = chat.tokenizer.apply_chat_template(
        messages,
        tools=tools,
        chat_template=getattr(trl, f"{theirs}_training_chat_template"),
        return_assistant_tokens_mask=True,
    )
    ids, mask = marked["input_ids"], marked["assistant_masks"]
    begin, size = 0, len(sequence.input_ids)
    if theirs == "qwen3" and len(messages) > 2 and case != "reasoned call":
        # Its patched template keeps the reasoning of earlier turns: compare the last, from its first trained token on.
        begin = sequence.answer_start
        size -= begin
        ids, mask = ids[-size - 1 :], mask[-size - 1 :]
    assert ids[:size] == sequence.input_ids[begin:]
    labels = [*sequence.labels[begin:], *[IGNORE] * (len(ids) - size)]
    assert all(mask[at] for at in range(size) if labels[at] != IGNORE)
    besides = {decode(chat, [ids[at]]).strip() for at in range(len(ids)) if mask[at] and labels[at] == IGNORE}
    assert besides <= {"", "<|endoftext|>"} | ({"<|assistant|>"} if (theirs, case) == ("phi3_5", "spaces") else set())


# --- the date ---------------------------------------------------------------------------------------------------------


def test_dates_in_a_template_are_frozen(tmp_path):
    """The same tokens tomorrow: Granite, among others, writes today's date into the system turn."""
    template = "{{ strftime_now('%d %B %Y') }}" + CHATML
    messages = [user("Hi"), assistant("Hello")]
    folder = make_tokenizer(tmp_path / "model")
    chat = Chat(str(folder), template)
    [sequence] = sequences_of(chat, {"messages": messages})
    assert decode(chat, sequence.input_ids).startswith("01 January 2026<|im_start|>user")
    unfrozen = chat.tokenizer.apply_chat_template(messages, chat_template=template + " ", tokenize=False)
    assert not unfrozen.startswith("01 January 2026")
