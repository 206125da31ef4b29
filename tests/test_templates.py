"""What is trained under each published chat template, for each kind of conversation: the whole table.

A cell is what the assistant's turns say when their trained tokens are decoded, without the token that ends them; or why
the row is refused. The context of each turn is checked against what a server would make of the same messages.
"""

import json
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tokenizers_for_tests import (
    CHATML,
    DEMO,
    answered,
    assistant,
    call,
    decode,
    make_tokenizer,
    server_ids,
    system,
    turns,
    user,
)

from moult.data.conversation import normalise
from moult.data.labels import sequences_of
from moult.data.sequence import IGNORE
from moult.model.chat import Chat, Unrenderable, choose_template
from moult.model.tokenizer import load_tokenizer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
OSLO, ROME = call("get_weather", 1, city="Oslo"), call("get_weather", 2, city="Rome")
RAIN, SUN = '{"sky": "rain"}', '{"sky": "sun"}'

CASES = {
    "one turn": [user("What is two plus two?"), assistant("It is four.")],
    "two turns": [user("Name a river."), assistant("The Rhine."), user("And a lake?"), assistant("Lake Inari.")],
    "system": [system("Answer in one word."), user("Colour of snow?"), assistant("White.")],
    "spaces": [
        user("  Indent it.\n"),
        assistant("\n  def f():\n    pass\n  "),
        user("\tAnd now? "),
        assistant(" x = 1 "),
    ],
    "reasoning": [
        user("Six times seven?"),
        assistant("It is 42.", reasoning_content="Seven sixes are 42."),
        user("Plus one?"),
        assistant("It is 43.", reasoning_content="One more."),
    ],
    "inline reasoning": [
        user("Six times seven?"),
        assistant("<think>\nSeven sixes are 42.\n</think>\n\nIt is 42."),
        user("Plus one?"),
        assistant("It is 43."),
    ],
    "call": [user("Weather in Oslo?"), assistant("", tool_calls=[OSLO]), answered(RAIN), assistant("It rains.")],
    "call with words": [
        user("Weather in Oslo?"),
        assistant("Let me look.", tool_calls=[OSLO]),
        answered(RAIN),
        assistant("It rains."),
    ],
    "two calls": [
        user("Weather in Oslo and Rome?"),
        assistant("", tool_calls=[OSLO, ROME]),
        answered(RAIN),
        answered(SUN, 2),
        assistant("Rain and sun."),
    ],
    "reasoned call": [
        user("Weather in Oslo?"),
        assistant("", reasoning_content="I must ask.", tool_calls=[OSLO]),
        answered(RAIN),
        assistant("It rains.", reasoning_content="Rain it is."),
    ],
}
CALLS = [case for case in CASES if "call" in case]


@dataclass
class Refused:
    reason: str
    says: str


@dataclass
class Family:
    """A template with the tokenizer it was made for.

    shows: what the template makes of an answer's content. `cells` holds the cases that are otherwise: what the turns say, or
    Refused. split: the cases where each turn has a sequence of its own; else they share one.
    """

    stop: str
    shows: object = str
    cells: dict = field(default_factory=dict)
    split: tuple = ()
    template: str = ""  # a file of the shared templates; else `source`'s own, or the shipped ChatML
    source: str = "tokenizers/minimind"
    tokenizer: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)


def drops(what: str, *cases: str) -> dict:
    return dict.fromkeys(cases, Refused("template_drops", f"leaves out {what}"))


def refuses(words: str, *cases: str) -> dict:
    return dict.fromkeys(cases, Refused("template_error", words))


def mismatch(words: str, *cases: str) -> dict:
    return dict.fromkeys(cases, Refused("prompt_mismatch", words))


def think(reasoning: str, content: str) -> str:
    return f"<think>\n{reasoning}\n</think>\n\n{content}"


TRIMMED = str.strip
NO_REASONING = drops("the assistant's reasoning_content", "reasoning", "reasoned call")
ALTERNATE = refuses("must alternate user/assistant", *CALLS)
MULTI = ("two turns", "spaces", "reasoning", "inline reasoning")
LLAMA = {"tokenizer": {"bos": "<s>", "eos": "</s>", "stops": ("</s>",)}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
CALL_ROME = CALL.replace("Oslo", "Rome")
QWEN_CALLS = {
    "call": [CALL, "It rains."],
    "call with words": [f"Let me look.\n{CALL}", "It rains."],
    "two calls": [f"{CALL}\n{CALL_ROME}", "Rain and sun."],
}
QWEN3 = {
    "stop": "<|im_end|>",
    "template": "Qwen-Qwen3-0.6B",
    "tokenizer": {"stops": ("<|im_end|>", "<|endoftext|>")},
}
# Reasoning is shown behind the last question only; an answer without any gets an empty block there.
QWEN3_CELLS = {
    "reasoning": [think("Seven sixes are 42.", "It is 42."), think("One more.", "It is 43.")],
    "inline reasoning": [think("Seven sixes are 42.", "It is 42."), think("", "It is 43.")],
    **{case: [think("", text) for text in said] for case, said in QWEN_CALLS.items()},
    "reasoned call": [think("I must ask.", CALL), think("Rain it is.", "It rains.")],
}
CHATML_CELLS = {
    **QWEN_CALLS,
    "reasoning": QWEN3_CELLS["reasoning"],
    "reasoned call": QWEN3_CELLS["reasoned call"],
}
MISTRAL_TOKENS = (
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_CALLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)
MISTRAL_CALL = '{"name": "get_weather", "arguments": {"city": "Oslo"}, "id": "call00001"}'
MISTRAL_CALL_2 = '{"name": "get_weather", "arguments": {"city": "Rome"}, "id": "call00002"}'

FAMILIES = {
    "Qwen2.5": Family(
        stop="<|im_end|>",
        template="Qwen-Qwen2.5-7B-Instruct",
        tokenizer={"stops": ("<|im_end|>", "<|endoftext|>")},
        cells={**QWEN_CALLS, **NO_REASONING},
    ),
    "Qwen3": Family(
        **QWEN3,
        shows=lambda content: think("", content.lstrip("\n")),
        cells=QWEN3_CELLS,
        split=(*MULTI, "call", "call with words", "two calls"),
    ),
    "Qwen3 without thinking": Family(
        **QWEN3,
        settings={"enable_thinking": False},
        shows=lambda content: content.lstrip("\n"),
        cells={
            **QWEN_CALLS,
            **mismatch("<think>", "reasoning", "reasoned call"),
            **mismatch("<think>\\nSeven sixes", "inline reasoning"),
        },
        split=("two turns", "spaces", "call", "call with words", "two calls"),
    ),
    "Alpaca": Family(
        stop="</s>",
        template="alpaca",
        **LLAMA,
        shows=TRIMMED,
        cells={**NO_REASONING, **ALTERNATE},
        split=MULTI,
    ),
    "ChatML (as published)": Family(
        stop="<|im_end|>",
        template="chatml",
        tokenizer={"bos": "<s>", "eos": "</s>", "stops": ("</s>",)},  # the template's stop token is none of the model's
        shows=TRIMMED,
        cells={**NO_REASONING, **ALTERNATE},
        split=MULTI,
    ),
    # Asks with <think>, and shows every answer without its reasoning.
    "DeepSeek-R1-Distill": Family(
        stop="<｜end▁of▁sentence｜>",
        template="deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
        tokenizer={
            "bos": "<｜begin▁of▁sentence｜>",
            "eos": "<｜end▁of▁sentence｜>",
            "specials": ("<｜User｜>", "<｜Assistant｜>"),
        },
        cells={**mismatch("<｜Assistant｜><think>", *set(CASES).difference(CALLS)), **drops("the tools", *CALLS)},
    ),
    "Gemma 2": Family(
        stop="<end_of_turn>",
        template="google-gemma-2-2b-it",
        tokenizer={
            "bos": "<bos>",
            "eos": "<eos>",
            "specials": ("<start_of_turn>", "<end_of_turn>"),
            "stops": ("<eos>", "<end_of_turn>"),
        },
        shows=TRIMMED,
        cells={**NO_REASONING, **ALTERNATE, **refuses("System role not supported", "system")},
    ),
    "Granite 3.3": Family(
        stop="<|end_of_text|>",
        template="ibm-granite-granite-3.3-2B-Instruct",
        tokenizer={
            "bos": "<|end_of_text|>",
            "eos": "<|end_of_text|>",
            "pad": "<|end_of_text|>",
            "specials": ("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
        },
        cells={**drops("the call of get_weather", "call", "call with words", "two calls"), **NO_REASONING},
    ),
    # The file as published: its indentation is part of what it writes.
    "Llama 2": Family(
        stop="</s>",
        template="llama-2-chat",
        **LLAMA,
        shows=lambda content: f"\n\n         {content.strip()} ",
        cells={**NO_REASONING, **ALTERNATE},
    ),
    "Llama 3.1": Family(
        stop="<|eot_id|>",
        template="meta-llama-Llama-3.1-8B-Instruct",
        tokenizer={
            "bos": "<|begin_of_text|>",
            "eos": "<|eot_id|>",
            "specials": ("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>", "<|end_of_text|>"),
            "stops": ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        },
        shows=TRIMMED,
        cells={
            "call": ['{"name": "get_weather", "parameters": {"city": "Oslo"}}', "It rains."],
            **drops("the assistant's content", "call with words"),
            **refuses("only supports single tool-calls", "two calls"),
            **NO_REASONING,
        },
    ),
    # Its special tokens take the whitespace behind them, and <|endoftext|> ends the conversation, not the turn.
    "Phi 3.5": Family(
        stop="<|end|>",
        template="microsoft-Phi-3.5-mini-instruct",
        tokenizer={
            "bos": "<s>",
            "eos": "<|endoftext|>",
            "specials": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
            "eats_space": True,
            "stops": ("<|end|>", "<|assistant|>", "<|endoftext|>"),
        },
        shows=str.lstrip,
        cells={**NO_REASONING, **drops("what the tool turn says", *CALLS)},
    ),
    # The system turn moves to the last question, so an answered one has lost it.
    "Mistral Nemo": Family(
        stop="</s>",
        template="mistralai-Mistral-Nemo-Instruct-2407",
        tokenizer={
            "bos": "<s>",
            "eos": "</s>",
            "specials": MISTRAL_TOKENS,
        },
        cells={
            "call": [f"[TOOL_CALLS][{MISTRAL_CALL}]", "It rains."],
            "two calls": [f"[TOOL_CALLS][{MISTRAL_CALL}, {MISTRAL_CALL_2}]", "Rain and sun."],
            **drops("the assistant's content", "call with words"),
            **mismatch("Colour of snow?", "system"),
            **NO_REASONING,
        },
    ),
    "Zephyr": Family(
        stop="</s>",
        template="zephyr",
        **LLAMA,
        shows=TRIMMED,
        cells={**NO_REASONING, **ALTERNATE},
        split=MULTI,
    ),
    "Qwen3's own": Family(
        stop="<|im_end|>",
        source="tokenizers/qwen3",
        shows=lambda content: think("", content.lstrip("\n")),
        cells=QWEN3_CELLS,
        split=(*MULTI, "call", "call with words", "two calls"),
    ),
    # Asks with an empty <think> block unless told otherwise. Its last newlines and an answer's first space are one token.
    "MiniMind's own": Family(
        stop="<|im_end|>",
        source="tokenizers/minimind",
        shows=lambda content: content.lstrip("\n"),
        cells={**QWEN_CALLS, **mismatch("<think>", "reasoning", "inline reasoning", "reasoned call")},
        split=("spaces",),
    ),
    "MiniMind's own, thinking": Family(
        stop="<|im_end|>",
        source="tokenizers/minimind",
        settings={"open_thinking": True},
        shows=lambda content: think("", content.lstrip("\n")).removeprefix("<think>\n"),
        cells={case: [text.removeprefix("<think>\n") for text in said] for case, said in QWEN3_CELLS.items()},
    ),
    "the demo's own": Family(stop="<|im_end|>", source="demo", cells={**NO_REASONING, **drops("the tools", *CALLS)}),
    "shipped ChatML on the demo": Family(stop="<|im_end|>", template="shipped", source="demo", cells=CHATML_CELLS),
    "shipped ChatML on MiniMind": Family(stop="<|im_end|>", template="shipped", cells=CHATML_CELLS),
    # The first answer's newline and that of the prompt are one token together.
    "shipped ChatML on Qwen3": Family(
        stop="<|im_end|>", template="shipped", source="tokenizers/qwen3", cells=CHATML_CELLS, split=("spaces",)
    ),
}


@pytest.fixture(scope="module")
def chat_of(shared, tmp_path_factory):
    """A family's Chat, made once."""
    made: dict[str, Chat] = {}

    def make(name: str) -> Chat:
        if name not in made:
            family = FAMILIES[name]
            source = DEMO if family.source == "demo" else shared / family.source
            folder, setting = source, None
            if family.template == "shipped":
                setting = "chatml"
            elif family.template:
                folder = make_tokenizer(tmp_path_factory.mktemp("family"), source, **family.tokenizer)
                setting = str(shared / "chat_templates" / f"{family.template}.jinja")
            template, _ = choose_template(str(folder), setting, str(Path(DEMO).parents[1] / "chat_templates"))
            made[name] = Chat(str(folder), template, family.settings)
        return made[name]

    return make


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
    assert not chat.has_generation_markers
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
