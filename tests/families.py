"""The published chat templates, and what is trained under each: the table of chat/test_templates.py.

A cell is what the assistant's turns say when their trained tokens are decoded, without the token that ends them; or why
the row is refused. The context of each turn is checked against what a server would make of the same messages.
"""

from dataclasses import dataclass, field

from tokenizers_for_tests import (
    answered,
    assistant,
    call,
    system,
    user,
)

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
