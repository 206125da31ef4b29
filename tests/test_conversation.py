"""Rows of every format in the one shape; and what is no training row, by the name that the ledger gives it."""

import contextlib
import json

import pytest
from examples import examples
from hypothesis import given
from hypothesis import strategies as st

from moult.data import conversation
from moult.data.conversation import BadRow, find_format, normalise
from moult.data.first_pass import joined, json_of
from moult.data.readers import read_rows
from moult.files import canonical

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
PLAIN = [USER, ANSWER]


def shape(row: dict, columns: dict | None = None, wanted: str = "auto") -> dict:
    """The row as prepare sees it: its format found, normalised, fit for JSON."""
    columns = columns or {}
    normalised, _ = normalise(row, columns, find_format(row, columns, wanted))
    return json.loads(joined(json_of(normalised)))


def messages(*row_messages: dict, **row) -> list[dict]:
    return shape({"messages": list(row_messages), **row})["messages"]


# --- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": PLAIN}, PLAIN),
        ({"messages": json.dumps(PLAIN)}, PLAIN),
        ({"messages": [{"role": "Human", "content": "q"}, {"role": "Model", "content": "a"}]}, PLAIN),
        ({"messages": [{"role": None, "from": "user", "content": None, "value": "q"}, ANSWER]}, PLAIN),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, PLAIN),
        ({"prompt": "q", "completion": "a"}, PLAIN),
        ({"prompt": [USER], "completion": [ANSWER]}, PLAIN),
        ({"prompt": [USER], "completion": "a"}, PLAIN),
        ({"instruction": "q", "output": "a"}, PLAIN),
        ({"instruction": "q", "input": "", "output": "a", "history": ""}, PLAIN),
        ({"instruction": "q", "input": " ", "output": "a", "history": []}, PLAIN),
        ({"instruction": "", "input": "q", "output": "a"}, PLAIN),
        ({"instruction": "do", "input": "this", "output": "a"}, [{**USER, "content": "do\nthis"}, ANSWER]),
        ({"instruction": "q", "output": "a", "history": [["q", "a"]]}, PLAIN * 2),
        ({"instruction": "q", "output": "a", "history": '[["q", "a"]]'}, PLAIN * 2),
    ],
)
def test_conversations_of_every_format(row, expected):
    assert shape(row) == {"messages": expected}


def test_text_stays_text():
    assert shape({"text": " as it is\n"}) == {"text": " as it is\n"}
    assert shape({"body": "x", "text": "other"}, {"text": "body"}) == {"text": "x"}


@pytest.mark.parametrize(
    ("row", "columns", "wanted", "format_name"),
    [
        ({"messages": [], "text": "x", "prompt": "", "completion": ""}, {}, "auto", "messages"),
        ({"instruction": "i", "output": "o", "text": "all of it"}, {}, "auto", "alpaca"),
        ({"prompt": "metadata", "text": "x"}, {}, "auto", "text"),
        ({"messages": None, "text": "x"}, {}, "auto", "text"),
        ({"messages": [], "text": "x"}, {}, "text", "text"),
        ({"question": "q", "answer": "a"}, {"prompt": "question", "completion": "answer"}, "auto", "prompt_completion"),
        # A mapped column decides, whatever else is there.
        ({"messages": [], "text": "x"}, {"text": "text"}, "auto", "text"),
        (
            {"instruction": "i", "output": "o"},
            {"prompt": "instruction", "completion": "output"},
            "auto",
            "prompt_compl…",
        ),
        ({"messages": [], "x": "y"}, {"system": "x"}, "auto", "messages"),
    ],
)
def test_the_format_is_told_from_the_columns(row, columns, wanted, format_name):
    found = find_format(row, columns, wanted)
    assert found.startswith(format_name.rstrip("…"))


@pytest.mark.parametrize(
    ("row", "columns", "wanted", "message"),
    [
        (
            {"x": 1},
            {},
            "auto",
            "has the columns x, and needs messages; conversations; instruction + output; prompt + …",
        ),
        ({"messages": []}, {}, "alpaca", "has the columns messages, and needs instruction + output"),
        # A missing answer does not turn the row into one of another format.
        (
            {"instruction": "i", "output": None, "text": "t"},
            {},
            "auto",
            "has the columns instruction, text, and needs …",
        ),
        ({"q": "x", "a": None, "text": "t"}, {"prompt": "q", "completion": "a"}, "auto", "has the columns q, text, …"),
        # Nor does a typo in the mapping.
        (
            {"q": "x", "a": "y", "text": "t"},
            {"prompt": "q", "completion": "answr"},
            "auto",
            "has the columns a, q, text, and needs prompt + completion; mapped columns that are not there: answr",
        ),
        (
            {"text": "t"},
            {"messages": "chat"},
            "auto",
            "has the columns text, and needs messages; mapped columns that …",
        ),
    ],
)
def test_columns_that_make_no_format(row, columns, wanted, message):
    with pytest.raises(BadRow) as bad:
        find_format(row, columns, wanted)
    start, more, _ = message.partition("…")
    assert bad.value.reason == "missing_column"
    assert str(bad.value).startswith(start) if more else str(bad.value) == start


# --- parts of a message -----------------------------------------------------------------------------------------------


def test_blocks_of_content_become_text_reasoning_and_calls():
    blocks = [
        {"type": "reasoning", "value": "hm, "},
        {"type": "thinking", "thinking": "so"},
        {"type": "text", "text": "one "},
        {"type": "text", "value": "two"},
        {"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
    ]
    _, answer = messages(USER, {"role": "assistant", "content": blocks})
    calls = answer.pop("tool_calls")
    assert answer == {"role": "assistant", "content": "one two", "reasoning_content": "hm, so"}
    assert [call["function"] for call in calls] == [{"name": "f", "arguments": {"x": 1}}]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_kept(field):
    assert messages(USER, {**ANSWER, field: "hm"})[1] == {**ANSWER, "reasoning_content": "hm"}
    assert messages(USER, {"role": "assistant", "content": "", field: "hm"})[1]["reasoning_content"] == "hm"


def test_calls_get_ids_and_answers_are_joined_to_them():
    calls = [
        {"function": {"name": "f", "arguments": '{"x": 1}'}},
        {"id": "mine", "type": "function", "function": {"name": "g", "arguments": {"y": 2}}},
        {"name": "h", "parameters": {}},
        {"name": "i", "arguments": "free text"},
        {"function": None, "name": "j", "arguments": None},
    ]
    found = messages(
        USER,
        {"role": "assistant", "content": None, "tool_calls": calls},
        *({"role": "tool", "content": text} for text in ("1", "2", "3", "4")),
        {"role": "tool", "content": "5", "tool_call_id": "call00005", "name": "j"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]},
        {"role": "tool", "content": "6"},
        ANSWER,
    )
    assert [(call["id"], call["type"]) for call in found[1]["tool_calls"]] == [
        (name, "function") for name in ("call00001", "mine", "call00003", "call00004", "call00005")
    ]
    assert [call["function"]["arguments"] for call in found[1]["tool_calls"]] == [
        {"x": 1},
        {"y": 2},
        {},
        "free text",
        {},
    ]
    assert [message["tool_call_id"] for message in found if message["role"] == "tool"] == [
        *("call00001", "mine", "call00003", "call00004", "call00005"),
        "call00006",
    ]
    assert found[6]["name"] == "j"


def test_sharegpt_calls_and_observations():
    turns = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '[{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]'},
        {"from": "observation", "value": "1"},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "a"},
    ]
    found = shape({"conversations": turns})["messages"]
    assert [message["role"] for message in found] == ["system", "user", "assistant", "tool", "tool", "assistant"]
    assert [call["function"]["name"] for call in found[2]["tool_calls"]] == ["f", "g"]
    assert [message.get("tool_call_id") for message in found[3:5]] == ["call00001", "call00002"]


@pytest.mark.parametrize(
    "tools", ['[{"name": "f"}]', [{"name": "f"}], [{"type": "function", "function": {"name": "f"}}]]
)
def test_tools_are_wrapped_once(tools):
    assert shape({"messages": PLAIN, "tools": tools})["tools"] == [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize("tools", ["", "[]", [], None])
def test_no_tools_are_no_tools(tools):
    assert shape({"messages": PLAIN, "tools": tools}) == {"messages": PLAIN}


def test_a_system_column_goes_in_front_unless_the_row_has_a_system_turn():
    system = {"role": "system", "content": "s"}
    assert messages(*PLAIN, system="s") == [system, *PLAIN]
    assert messages(system, *PLAIN, system="other") == [system, *PLAIN]
    assert messages(*PLAIN, system="") == PLAIN
    assert shape({"prompt": "q", "completion": "a", "about": "s"}, {"system": "about"})["messages"][0] == system


def test_a_column_mapped_to_null_is_not_read():
    row = {"messages": PLAIN, "tools": "hammer", "system": "linux"}
    assert shape(row, {"tools": None, "system": None}) == {"messages": PLAIN}


@pytest.mark.parametrize(
    ("turn", "trained"),
    [
        ({"weight": 0}, False),
        ({"loss_weight": 0.0}, False),
        ({"train": False}, False),
        ({"training": 0}, False),
        ({"weight": 1}, True),
        ({"loss_weight": 1.0}, True),
        ({"train": True}, True),
        ({"weight": None}, True),
    ],
)
def test_a_turn_of_weight_0_is_context_only(turn, trained):
    first = messages({**USER, "weight": 0}, {**ANSWER, **turn}, *PLAIN)[1]
    assert first == (ANSWER if trained else {**ANSWER, "train": False})


@pytest.mark.parametrize(("behind", "cut"), [([], 0), ([USER], 1), ([USER, {"role": "tool", "content": "r"}], 2)])
def test_turns_behind_the_last_answer_are_cut_and_counted(behind, cut):
    result, left = normalise({"messages": [*PLAIN, *behind]}, {}, "messages")
    assert (result, left.turns_cut) == ({"messages": PLAIN}, cut)


# --- no training row --------------------------------------------------------------------------------------------------


def calling(arguments) -> dict:
    return {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": arguments}]}


BAD_MESSAGES = [
    ([], "no_assistant_turn", "has no assistant turn (roles: none)"),
    ([USER], "no_assistant_turn", "has no assistant turn (roles: user)"),
    ("nope", "bad_json", "messages is not JSON: Expecting value (column 1)"),
    ("[" * 100_000, "bad_json", "messages is not JSON: maximum recursion depth exceeded"),
    (5, "wrong_type", "messages is int '5', and must be a list"),
    ([5], "wrong_type", "messages[0] is int '5', and must be an object with role and content"),
    ([{**USER, "role": "alien"}, ANSWER], "unknown_role", "messages[0] has the role 'alien'; known: system, developer"),
    ([{"content": "q"}, ANSWER], "unknown_role", "messages[0] has the role None"),
    ([{**USER, "content": 5}, ANSWER], "wrong_type", "messages[0].content is int '5', and must be text"),
    ([USER, {"role": "assistant"}], "wrong_type", "messages[1].content is missing"),
    ([USER, {**ANSWER, "content": [{"type": "image"}]}], "unknown_content", "messages[1].content holds a block of the"),
    ([USER, {**ANSWER, "content": ["a"]}], "unknown_content", "messages[1].content holds a block of the type None"),
    (
        [USER, {**ANSWER, "content": [{"type": "text"}]}],
        "wrong_type",
        "messages[1].content is missing, and must be text",
    ),
    ([USER, {**ANSWER, "content": " \n"}], "empty", "an assistant turn is empty"),
    ([USER, {**ANSWER, "content": ""}, USER, {**ANSWER, "content": " "}], "empty", "all assistant turns are empty"),
    ([{**USER, "content": " "}, ANSWER], "empty", "no user turn says anything"),
    ([ANSWER], "no_user_turn", "has no user turn, and no system turn that could stand for one"),
    ([USER, {**ANSWER, "weight": 0}], "nothing_trained", "every assistant turn has weight 0"),
    (
        [USER, {**ANSWER, "weight": 0.5}],
        "unknown_weight",
        "messages[1].weight is 0.5; a turn is trained (1) or not (0)",
    ),
    ([{**USER, "train": True}, ANSWER], "unknown_weight", "messages[0].train asks to train a user turn"),
    ([USER, {**ANSWER, "content": "\ud800"}], "not_unicode", "messages[1].content holds half of a surrogate pair"),
    ([USER, calling({"x": "\udfff"})], "not_unicode", "holds half of a surrogate pair"),
    ([USER, calling('{"x": NaN}')], "bad_json", "tools or arguments hold what JSON cannot: Out of range float"),
    ([USER, calling({"x": 1e999})], "bad_json", "tools or arguments hold what JSON cannot: Out of range float"),
    ([USER, calling({"x": b"bytes"})], "bad_json", "tools or arguments hold what JSON cannot: Object of type bytes"),
    ([USER, {**ANSWER, "tool_calls": [{"x": 1}]}], "wrong_type", "messages[1] holds a tool call without a name: dict"),
    ([USER, {"role": "function_call", "content": "f(1)"}], "bad_json", "messages[1].tool_calls is not JSON: Expecting"),
    ([USER, {"role": "function_call"}], "wrong_type", "messages[1] holds a tool call without a name: missing"),
]
BAD_ROWS = [
    ({"prompt": "q", "completion": ""}, "empty", "an assistant turn is empty"),
    ({"prompt": " ", "completion": "a"}, "empty", "no user turn says anything"),
    ({"prompt": "q", "completion": 5}, "wrong_type", "completion is int '5', and must be text"),
    ({"instruction": "", "input": "", "output": "a"}, "empty", "no user turn says anything"),
    ({"instruction": "q", "output": "\n"}, "empty", "an assistant turn is empty"),
    (
        {"instruction": "q", "output": "a", "history": [["q"]]},
        "wrong_type",
        "history[0] is list \"['q']\", and must be [u",
    ),
    ({"instruction": "q", "output": "a", "history": "5"}, "wrong_type", "history is int '5', and must be a list"),
    ({"text": " \n"}, "empty", "the text is empty"),
    ({"text": {"a": 1}}, "wrong_type", "text is dict \"{'a': 1}\", and must be text"),
    ({"messages": PLAIN, "tools": "{"}, "bad_json", "tools is not JSON: Expecting property name"),
    (
        {"messages": PLAIN, "tools": {"name": "f"}},
        "wrong_type",
        "tools is dict \"{'name': 'f'}\", and must be a list of",
    ),
    ({"messages": PLAIN, "tools": [{"name": "\ud800"}]}, "not_unicode", "holds half of a surrogate pair"),
    (
        {"messages": PLAIN, "tools": [{"function": "f"}]},
        "wrong_type",
        "tools[0].function is str 'f', and must be an object",
    ),
    (
        {"messages": PLAIN, "tools": [{"name": 5}]},
        "wrong_type",
        "tools[0].function is dict \"{'name': 5}\", and must be",
    ),
    ({"messages": PLAIN, "system": 5}, "wrong_type", "system is int '5', and must be text"),
]
BAD = [({"messages": value}, reason, message) for value, reason, message in BAD_MESSAGES] + BAD_ROWS


@pytest.mark.parametrize(("row", "reason", "message"), BAD, ids=[f"{reason}: {message}" for _, reason, message in BAD])
def test_what_is_no_training_row(row, reason, message):
    with pytest.raises(BadRow) as bad:
        shape(row)
    assert bad.value.reason == reason
    assert str(bad.value).startswith(message)


# --- real data --------------------------------------------------------------------------------------------------------


def real(shared, name: str) -> list[dict]:
    file = shared / "datasets/llamafactory_demos" / name
    return [row for _, row in read_rows(file, file.name)]


@pytest.mark.parametrize("name", ["alpaca_en_demo.json", "alpaca_zh_demo.json"])
def test_real_alpaca_rows(shared, name):
    for row in real(shared, name):
        question, answer = shape(row)["messages"]
        assert row["instruction"] in question["content"]
        assert row["input"].strip() in question["content"]
        assert answer == {"role": "assistant", "content": row["output"]}


def test_real_tool_calls(shared):
    calls = 0
    for row in real(shared, "glaive_toolcall_en_demo.json"):
        result, left = normalise(row, {}, "sharegpt")
        assert len(result["messages"]) + left.turns_cut == len(row["conversations"])
        assert result.get("tools", []) == [{"type": "function", "function": tool} for tool in json.loads(row["tools"])]
        waiting = []
        for raw, message in zip(row["conversations"], result["messages"], strict=False):
            if raw["from"] == "function_call":
                call = json.loads(raw["value"])
                assert message["tool_calls"][0]["function"] == {"name": call["name"], "arguments": call["arguments"]}
                waiting.append(message["tool_calls"][0]["id"])
                calls += 1
            else:
                assert message["content"] == raw["value"]
            if raw["from"] == "observation":
                assert message["tool_call_id"] == waiting.pop(0)
    assert calls > 100


def test_real_content_blocks_and_loss_weights(shared):
    rows = real(shared, "v1_sft_demo.jsonl")
    for row in rows:
        plain = [
            {"role": turn["role"], "content": "".join(block["value"] for block in turn["content"])}
            for turn in row["messages"]
        ]
        # Its weights are what a turn has anyway: 0 for the user, 1 for the assistant.
        assert shape(row) == {"messages": plain}
    assert len(rows) == 500


def test_real_reasoning_with_tools(shared):
    rows = real(shared, "reason_tool_use_demo_50.jsonl")
    counts = dict.fromkeys(("text", "reasoning", "tool_call"), 0)
    for row in rows:
        result = shape(row)
        assert result.get("tools", []) == json.loads(row["tools"])
        for raw, message in zip(row["messages"], result["messages"], strict=True):
            blocks = {kind: [block["value"] for block in raw["content"] if block["type"] == kind] for kind in counts}
            assert message["content"] == "".join(blocks["text"])
            assert message.get("reasoning_content", "") == "".join(blocks["reasoning"])
            called = [call["function"] for call in message.get("tool_calls", [])]
            assert called == [json.loads(text) for text in blocks["tool_call"]]
            counts = {kind: count + len(blocks[kind]) for kind, count in counts.items()}
    assert (len(rows), counts) == (50, {"text": 221, "reasoning": 112, "tool_call": 68})


def test_real_text(shared):
    rows = real(shared, "c4_demo.jsonl")
    assert [shape(row) for row in rows] == [{"text": row["text"]} for row in rows]


# --- the usual turn takes a shorter way -------------------------------------------------------------------------------

SAID = st.sampled_from(
    ["", " ", "a", 'q"\\\n\u2028', "天气", "\ud800", None, 5, True, ["a"], [{"type": "text", "text": "b"}], {}]
)
ODD_ROLES = st.sampled_from(["user", "human", "gpt", "User", "tool", "function_call", "alien", None, 5, []])


@examples(300)
@given(
    item=st.dictionaries(st.sampled_from(["role", "from", "content", "value", "name"]), SAID | ODD_ROLES, max_size=3)
    | st.fixed_dictionaries({"role": ODD_ROLES, "content": SAID})
    | st.fixed_dictionaries({"from": ODD_ROLES, "value": SAID}),
)
def test_the_shorter_way_leads_to_the_same(item):
    def outcome(value):
        try:
            keys = set()
            return conversation._from_messages([value], keys), keys
        except BadRow as bad:
            return bad.reason, str(bad)

    class Other(dict):
        """No plain dict: it takes the long way."""

    assert outcome(item) == outcome(Other(item))
    with contextlib.suppress(BadRow):
        row = {"messages": conversation._from_messages([item, item], set()), "tools": [{"b": 1, "a": 1e-7}]}
        assert joined(json_of(row)).decode() == canonical(row)
