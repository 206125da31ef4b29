"""Nothing that a row holds is ignored in silence: it is read, or refused by name, or listed in the ledger and on the console."""

import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preparing import ANSWER, USER, pairs, run, write

from moult.data.conversation import find_format, normalise
from moult.data.fields import BadRow, LeftOut
from moult.errors import MoultError

PLAIN = [USER, ANSWER]
CALL = {"name": "add", "arguments": '{"a": 1}'}
TOOL = {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}}
JSON_PROMPT = json.dumps([{"role": "system", "content": "s"}, USER])
JSON_ANSWER = json.dumps([ANSWER])


def shape(row: dict, columns: dict | None = None, wanted: str = "auto") -> tuple[dict, LeftOut]:
    columns = columns or {}
    return normalise(row, columns, find_format(row, columns, wanted))


def messages(*turns: dict, **row) -> list[dict]:
    return shape({"messages": list(turns), **row})[0]["messages"]


def refused(row: dict, columns: dict | None = None) -> tuple[str, str]:
    with pytest.raises(BadRow) as bad:
        shape(row, columns)
    return bad.value.reason, str(bad.value)


# --- columns and keys that nobody reads -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "columns", "unread"),
    [
        ({"messages": PLAIN, "id": 7, "text": "t"}, {}, {"id", "text"}),
        ({"messages": PLAIN, "a": None, "b": "", "c": [], "d": {}, "e": 0}, {}, {"e"}),
        ({"q": "q", "a": "a", "prompt": "x"}, {"prompt": "q", "completion": "a"}, {"prompt"}),
        ({"instruction": "q", "input": "i", "output": "a", "history": [["q", "a"]], "score": 1}, {}, {"score"}),
        ({"instruction": "q", "input": "i", "output": "a"}, {"input": None}, {"input"}),
        ({"text": "t", "system": "s", "tools": [TOOL]}, {}, {"system", "tools"}),
        ({"messages": PLAIN, "system": "s", "tools": [TOOL]}, {}, set()),
        ({"messages": PLAIN, "system": "s", "tools": [TOOL]}, {"system": None, "tools": None}, {"system", "tools"}),
        # The row has a system turn of its own: another one is left out, the same one is not.
        ({"messages": [{"role": "system", "content": "s"}, *PLAIN], "system": "other"}, {}, {"system"}),
        ({"messages": [{"role": "system", "content": "s"}, *PLAIN], "system": "s"}, {}, set()),
        ({"messages": PLAIN, "system": "s", "system_prompt": "other"}, {}, {"system_prompt"}),
    ],
)
def test_columns_that_are_not_used(row, columns, unread):
    assert shape(row, columns)[1].columns == unread


@pytest.mark.parametrize(
    ("answer", "unread"),
    [
        (ANSWER, set()),
        ({**ANSWER, "refusal": None, "audio": {}, "weight": 1, "name": "bot", "reasoning": "hm"}, set()),
        ({**ANSWER, "id": 5, "likes": 0}, {"messages[].id", "messages[].likes"}),
        ({**ANSWER, "value": "other"}, {"messages[].value"}),
        ({**ANSWER, "thinking": "a", "reasoning": "b"}, {"messages[].thinking"}),
        (
            {"role": "assistant", "content": [{"type": "text", "text": "a", "citations": [1]}]},
            {"messages[].content[].citations"},
        ),
        (
            {
                **ANSWER,
                "tool_calls": [{"id": "x", "type": "function", "index": 0, "function": CALL | {"strict": True}}],
            },
            {"messages[].tool_calls[].index", "messages[].tool_calls[].function.strict"},
        ),
        ({**ANSWER, "tool_calls": [{**CALL, "index": 0}]}, {"messages[].tool_calls[].index"}),
        ({**ANSWER, "tool_calls": [CALL], "function_call": CALL}, {"messages[].function_call"}),
    ],
)
def test_keys_of_messages_that_are_not_used(answer, unread):
    assert shape({"messages": [USER, answer]})[1].keys == unread


def test_the_ledger_and_the_console_name_them_with_their_share(tmp_path, caplog):
    rows = [
        {"messages": [{**USER, "content": f"q {n}"}, {**ANSWER, "mood": "calm"} if n % 4 else ANSWER]}
        for n in range(20)
    ]
    rows = [{**row, "topic": f"t{n}", **({"rating": n} if n < 3 else {})} for n, row in enumerate(rows)]
    rows += [{"messages": [], "of_a_broken_row": 1}, {**rows[0], "\ud800": "no text"}]
    val = write(tmp_path / "val.jsonl", [{**row, "url": "x"} for row in pairs(4, 50)])
    with caplog.at_level(logging.INFO):
        source = write(tmp_path / "rows.jsonl", rows)
        result = run(tmp_path, source=source, val_source=val, broken="drop", columns={"group": "topic"})
    assert result.ledger["unused_columns"] == {
        "rating": {"rows": 4, "share": 0.1818},
        "\\ud800": {"rows": 1, "share": 0.0455},
    }
    assert result.ledger["unused_keys"] == {"messages[].mood": {"rows": 15, "share": 0.6818}}
    assert result.val_ledger["unused_columns"] == {"url": {"rows": 4, "share": 1.0}}
    told = [record.getMessage() for record in caplog.records if "not used" in record.getMessage()]
    assert told == [
        r"columns that are not used: rating (18.2 % of the rows), \ud800 (4.55 % of the rows)",
        "keys that are not used: messages[].mood (68.2 % of the rows)",
        "val_source: columns that are not used: url (100 % of the rows)",
    ]


def test_columns_of_a_table_count_where_they_hold_something(tmp_path):
    rows = [{**row, "note": "n" if index < 5 else None, "empty": None} for index, row in enumerate(pairs(20))]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    result = run(tmp_path, source=str(tmp_path / "a.parquet"))
    assert result.ledger["unused_columns"] == {"note": {"rows": 5, "share": 0.25}}


# --- what is read under another name ----------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [None, "", "Let me add."])
@pytest.mark.parametrize("call", [CALL, json.dumps(CALL), {"name": "add", "arguments": {"a": 1}}])
def test_a_function_call_is_a_tool_call(content, call):
    turn = {"role": "assistant", "content": content, "function_call": call}
    answer = {"role": "function", "name": "add", "content": "2"}
    _, called, result, _ = messages(USER, turn, answer, ANSWER)
    function = {"name": "add", "arguments": {"a": 1}}
    assert called["content"] == (content or "")
    assert called["tool_calls"] == [{"id": "call00001", "type": "function", "function": function}]
    assert result == {"role": "tool", "name": "add", "content": "2", "tool_call_id": "call00001"}


@pytest.mark.parametrize("nothing", [None, "", {}, {"name": None, "arguments": None}, {"name": "", "arguments": ""}])
def test_no_function_call_is_none(nothing):
    assert messages(USER, {**ANSWER, "function_call": nothing}) == PLAIN


def test_a_function_call_that_is_none_is_refused():
    row = {"messages": [USER, {"role": "assistant", "content": None, "function_call": "add(1)"}]}
    assert refused(row)[0] == "bad_json"


@pytest.mark.parametrize("functions", [[TOOL], json.dumps([TOOL]), [{"type": "function", "function": TOOL}]])
def test_functions_are_tools(functions):
    row, left = shape({"messages": PLAIN, "functions": functions})
    assert row["tools"] == [{"type": "function", "function": TOOL}]
    assert left.columns == set()


@pytest.mark.parametrize("other", ["def f(): ...", ["f", "g"], [{"signature": "f()"}], 5, {"f": 1}])
def test_other_things_are_called_functions_too(other):
    row, left = shape({"messages": PLAIN, "functions": other})
    assert "tools" not in row
    assert left.columns == {"functions"}


def test_functions_beside_tools_or_unwanted_are_left_out():
    other = {"name": "other"}
    row, left = shape({"messages": PLAIN, "tools": [TOOL], "functions": [other]})
    assert [tool["function"] for tool in row["tools"]] == [TOOL] and left.columns == {"functions"}
    row, left = shape({"messages": PLAIN, "functions": [other]}, {"tools": None})
    assert "tools" not in row and left.columns == {"functions"}


@pytest.mark.parametrize(
    "row", [{"prompt": "q", "completion": "a"}, {"instruction": "q", "output": "a"}, {"messages": PLAIN}]
)
def test_a_system_prompt_is_a_system_turn(row):
    given = {**row, "system_prompt": "Answer like a pirate."}
    found, left = shape(given)
    assert found["messages"] == [{"role": "system", "content": "Answer like a pirate."}, *PLAIN]
    assert left.columns == set()
    found, left = shape(given, {"system": None})
    assert found["messages"] == PLAIN and left.columns == {"system_prompt"}
    found, left = shape({**given, "system_prompt": 5})
    assert found["messages"] == PLAIN and left.columns == {"system_prompt"}


# --- conversations in disguise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "completion", "contents"),
    [
        (JSON_PROMPT, JSON_ANSWER, ["s", "q", "a"]),
        (f" {JSON_PROMPT}\n", "a", ["s", "q", "a"]),
        ([USER], JSON_ANSWER, ["q", "a"]),
        ('[{"from": "human", "value": "q"}]', '[{"from": "gpt", "value": "a"}]', ["q", "a"]),
        # JSON that is what it says, and no conversation.
        ("q", JSON_ANSWER, ["q", JSON_ANSWER]),
        ('["q"]', "[]", ['["q"]', "[]"]),
        ("[1, 2", '[{"role": "manager", "content": "x"}]', ["[1, 2", '[{"role": "manager", "content": "x"}]']),
        ('[{"role": "user"}]', "a", ['[{"role": "user"}]', "a"]),
        # A dialogue that the model is to write.
        (JSON_PROMPT, JSON_PROMPT, ["s", "q", JSON_PROMPT]),
        ("[" * 100_000, "a", ["[" * 100_000, "a"]),
    ],
    ids=range(10),
)
def test_prompts_that_are_json_of_messages(prompt, completion, contents):
    found = shape({"prompt": prompt, "completion": completion})[0]["messages"]
    assert [message["content"] for message in found] == contents


def test_messages_as_python_prints_them():
    reason, what = refused({"prompt": str([USER]), "completion": "a"})
    assert (reason, what) == ("bad_json", "prompt is messages as Python prints them; write them as JSON")
    assert shape({"prompt": f"What does print({[USER]}) print?", "completion": str([USER])})


def test_text_that_is_json_of_messages():
    row = {"chat": JSON_PROMPT}
    reason, what = refused(row, {"text": "chat"})
    assert reason == "wrong_format"
    assert what == "chat is JSON of messages; set datasets.<name>.columns: {messages: chat}, or format: text"
    assert shape(row, {"text": "chat"}, "text")[0] == {"text": JSON_PROMPT}
    assert shape({"text": JSON_PROMPT, "messages": PLAIN})[0] == {"messages": PLAIN}


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"message_id": "1", "parent_id": None, "text": "q", "role": "prompter"}, "is one message of a tree"),
        ({"message_tree_id": "1", "prompt": {"text": "q", "replies": []}}, "is a tree of messages (message_tree_id)"),
        ({"message_id": "1", "parent_id": None, "message": "q"}, "is a tree of messages"),
    ],
)
def test_trees_are_not_taken_for_text(row, what):
    reason, said = refused(row)
    assert reason == "tree" and said.startswith(what) and "scripts/tools/conversations_of_trees.py" in said
    if "text" in row:
        assert shape(row, wanted="text")[0] == {"text": "q"}


# --- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mark", ["<image>", "<video>", "<audio>", "<|image_1|>", "<image_1>", "<|image_pad|>", "<IMG>"]
)
@pytest.mark.parametrize("column", ["images", "image", "videos", "audio"])
def test_text_about_a_picture_is_refused(column, mark):
    asked = {"role": "user", "content": f"{mark}What is this?"}
    said = f"{mark} stands for what {{}} holds, and only text is trained"
    assert refused({"messages": [asked, ANSWER], column: ["a.png"]}) == ("not_text", said.format(column))
    assert refused({"messages": [{**asked, column: ["a.png"]}, ANSWER]}) == (
        "not_text",
        said.format(f"messages[].{column}"),
    )
    assert refused({"text": f"{mark} a cat", column: "a.png"}) == ("not_text", said.format(column))


@pytest.mark.parametrize(
    ("said", "images"),
    [("<image>", []), ("<image>", None), ("q", ["a.png"]), ('<img src="a.png"> and 1 < image > 0', ["a.png"])],
)
def test_text_for_itself_is_not(said, images):
    row, left = shape({"messages": [{**USER, "content": said}, ANSWER], "images": images})
    assert row["messages"][0]["content"] == said
    assert left.columns == ({"images"} if images else set())


# --- turns ------------------------------------------------------------------------------------------------------------

SYSTEM = {"role": "system", "content": "Write a line."}
EMPTY = {"role": "assistant", "content": " \n"}


@pytest.mark.parametrize("first", [SYSTEM, {"role": "tool", "content": "7"}])
def test_without_a_user_turn_the_template_decides(first):
    assert messages(first, ANSWER)[0]["content"] == first["content"]
    assert messages(first, ANSWER, ANSWER)[1:] == [ANSWER, ANSWER]


@pytest.mark.parametrize("turns", [[ANSWER], [{**SYSTEM, "content": " "}, ANSWER], [ANSWER, SYSTEM, ANSWER]])
def test_an_answer_that_nothing_asks_for_has_a_reason_of_its_own(turns):
    reason, what = refused({"messages": turns})
    assert (reason, what) == ("no_user_turn", "has no user turn, and no system turn that could stand for one")


def test_broken_error_stops_at_rows_without_a_user_turn(tmp_path):
    source = write(tmp_path / "rows.jsonl", [*pairs(9), {"messages": [ANSWER]}])
    with pytest.raises(
        MoultError, match=r"^1 of 10 rows cannot be training rows:\n    rows.jsonl:10: has no user turn"
    ):
        run(tmp_path, source=source)
    assert run(tmp_path, source=source, broken="drop").ledger["dropped"] == {"no_user_turn": 1}


def test_rows_without_a_user_turn_are_grouped_by_what_comes_before_the_answer(tmp_path):
    rows = [{"messages": [{**SYSTEM, "content": f"s {n % 10}"}, {**ANSWER, "content": f"a {n}"}]} for n in range(40)]
    result = run(tmp_path, source=write(tmp_path / "rows.jsonl", rows), val_size=8, test_size=None)
    assert (result.val_summary["groups"], result.train_summary["groups"]) == (2, 8)


@pytest.mark.parametrize(
    ("turns", "trained", "empty", "cut"),
    [
        ([USER, EMPTY, USER, ANSWER], [False, True], 1, 0),
        ([USER, EMPTY, USER, EMPTY, USER, ANSWER], [False, False, True], 2, 0),
        # At the end there is nothing to learn, and nothing to ask for in the evaluation.
        ([USER, ANSWER, USER, EMPTY], [True], 0, 2),
        ([USER, ANSWER, EMPTY, USER, EMPTY], [True], 0, 3),
        # What is context only may say nothing, as before.
        ([USER, {**EMPTY, "weight": 0}, USER, ANSWER], [False, True], 0, 0),
        ([USER, ANSWER, USER, {**EMPTY, "weight": 0}], [True, False], 0, 0),
        ([USER, {**EMPTY, "tool_calls": [CALL]}, USER, {**EMPTY, "thinking": "hm"}], [True, True], 0, 0),
    ],
)
def test_a_turn_that_says_nothing_costs_itself_only(turns, trained, empty, cut):
    row, left = shape({"messages": turns})
    assert [turn.get("train", True) for turn in row["messages"] if turn["role"] == "assistant"] == trained
    assert (left.turns_empty, left.turns_cut) == (empty, cut)


def test_turns_that_say_nothing_are_counted_and_told(tmp_path, caplog):
    rows = [{"messages": [{**USER, "content": f"q {n}"}, EMPTY, USER, ANSWER]} for n in range(20)]
    with caplog.at_level(logging.INFO):
        result = run(tmp_path, source=write(tmp_path / "rows.jsonl", rows))
    assert (result.ledger["turns_empty"], result.ledger["turns_cut"], result.ledger["dropped"]) == (20, 0, {})
    assert "20 assistant turns say nothing and are not trained" in caplog.messages


def test_where_no_row_is_left_an_example_of_each_reason_is_shown(tmp_path):
    rows = [{"prompt": "q", "completion": ""}, {"prompt": " ", "completion": "a"}, {"prompt": "q"}]
    with pytest.raises(MoultError) as error:
        run(tmp_path, source=write(tmp_path / "rows.jsonl", rows), broken="drop")
    first, *shown = error.value.what.split("\n    ")
    assert first == "no training row is left of 3 (dropped: 2 empty, 1 missing_column)"
    assert [line.partition(",")[0] for line in shown] == [
        "rows.jsonl:1: an assistant turn is empty",
        "rows.jsonl:3: has the columns prompt",
    ]
