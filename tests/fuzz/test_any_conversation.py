"""Any conversation under any template: what is trained is what the assistant says, or the row is refused by name."""

import json
import unicodedata

import pytest
from examples import examples
from families import FAMILIES
from fuzz.anything import ANY_ROW
from hypothesis import given
from hypothesis import strategies as st
from tokenizers_for_tests import CHATML, DEMO, assistant, system, turns, user

import encode
from moult.data.conversation import BadRow, find_format, normalise
from moult.data.first_pass import joined, json_of
from moult.data.labels import sequences_of
from moult.errors import MoultError
from moult.model.chat import Chat, Unrenderable, check_syntax

WORDS = st.lists(
    st.sampled_from(
        [
            *(
                "Hello",
                " ",
                "\n",
                "\t",
                "\r\n",
                "two",
                "é",
                "e\u0301",
                "中文",
                "🇳🇴",
                "אב",
                "\u200d",
                "\u00a0",
                "\ufeff",
                "\0",
            ),
            *(
                "'",
                '"',
                "\\n",
                "{{ x }}",
                "{% if %}",
                "<b>",
                "&amp;",
                "</think>",
                "<think>",
                "[INST]",
                "###",
                "user",
                "assistant",
                ":",
            ),
        ]
    ),
    min_size=1,
    max_size=8,
).map("".join)
TURN = st.tuples(
    WORDS, WORDS.filter(str.strip), st.sampled_from([None, None, "A thought.", "\nTwo\n\nlines. "]), st.booleans()
)

# prepare drops a conversation of which nothing is to be trained.
EXCHANGES = st.lists(TURN, min_size=1, max_size=3).filter(lambda turns: any(turn[3] for turn in turns))


def dense(text: str) -> str:
    return "".join(unicodedata.normalize("NFC", text).split())


@pytest.mark.parametrize("name", sorted(FAMILIES))
@examples(20)
@given(first=st.none() | WORDS, exchanges=EXCHANGES, tools=st.booleans())
def test_trained_is_what_the_assistant_says(name, first, exchanges, tools, chat_of):
    chat, family = chat_of(name), FAMILIES[name]
    messages = [] if first is None else [system(first)]
    for question, answer, thought, trained in exchanges:
        more = ({} if thought is None else {"reasoning_content": thought}) | ({} if trained else {"train": False})
        messages += [user(question), assistant(answer, **more)]
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}] if tools else None
    try:
        sequences = sequences_of(chat, {"messages": messages, **({"tools": tools} if tools else {})})
    except Unrenderable as refusal:
        assert refusal.reason and str(refusal)
        return
    said = turns(chat, messages, tools, sequences)
    assert list(said) == [
        index for index, message in enumerate(messages) if message["role"] == "assistant" and message.get("train", True)
    ]
    for index, text in said.items():
        assert text.endswith(family.stop)
        answer = messages[index]
        if "reasoning_content" not in answer and "think>" not in answer["content"]:
            assert dense(text) == dense(family.shows(answer["content"]) + family.stop)
        for part in ("content", "reasoning_content"):
            whole, shown = dense(answer.get(part, "")), dense(text)
            # What the prompt has begun already (`<think>`) is not trained.
            assert any(whole[start:] in shown for start in range(min(len(whole), 8) + 1))


@pytest.fixture(scope="module")
def demo():
    encode.set_chat(str(DEMO), CHATML, {}, False)


@examples(300)
@given(raw=ANY_ROW)
def test_any_row_is_encoded_or_refused(raw, demo):
    """What prepare lets through, however odd its tools and calls, comes out as sequences or as a reason."""
    try:
        row, _ = normalise(raw, {}, find_format(raw, {}, "auto"))
        row = json.loads(joined(json_of(row)))
    except BadRow:
        return
    [result] = encode.encode_batch([{"id": "odd:1", "group": "0", "source": 0, **row}])
    assert bool(result["sequences"]) != ("reason" in result)
    for sequence in result["sequences"]:
        assert len(sequence["input_ids"]) == len(sequence["labels"])
        trained = [label for label in sequence["labels"] if label != -100]
        assert trained and sequence["trained_bytes"] >= 0
        if "text" in row:
            # Nothing predicts the first token.
            assert encode._chat.decode([sequence["input_ids"][0], *trained]) == f"{row['text']}<|im_end|>"


PIECES = st.sampled_from(
    [
        *("{{ messages }}", "{{ m.content }}", "{% for m in messages %}", "{% endfor %}", "{% endif %}", "text", "{#"),
        *(
            "{% if m.role == 'user' %}",
            "{{ 1 // 0 }}",
            "{{ 10.0 ** 999 }}",
            "{{ '%d' % 'x' }}",
            "{{ messages[9].content }}",
        ),
        *("{{ m.x.y }}", "{{ raise_exception('no') }}", "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"),
        *(
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{% include 'x' %}",
            "{% generation %}",
            "{% endgeneration %}",
        ),
        *(
            "<|im_start|>assistant\n",
            "<|im_end|>",
            "{% set ns = namespace(a=1) %}",
            "{{ ns.b }}",
            "{{ messages | tojson }}",
        ),
        *(
            "{{ messages | map('x') | list }}",
            "{{ strftime_now('%Y') }}",
            "{{ '\\ud800' }}",
            "{% break %}",
            "{{ lipsum() }}",
        ),
        *(
            "{{ messages | sum }}",
            "{{ [] | first + 1 }}",
            "{{ 'x' | int('y') | round }}",
            "{{ range(9999999) | length }}",
        ),
    ]
)


@examples(200)
@given(pieces=st.lists(PIECES, max_size=6))
def test_any_template(pieces):
    """It is refused for its syntax, or the row for what it does."""
    template = "".join(pieces)
    try:
        check_syntax(template, "odd")
        chat = Chat(str(DEMO), template)
    except MoultError as error:
        assert error.what.startswith("chat template (odd)") and error.fix
        return
    try:
        assert sequences_of(chat, {"messages": [user("Hi"), assistant("Hello.")]})
    except Unrenderable as refusal:
        assert refusal.reason and str(refusal)
