"""scripts/tools/conversations_of_trees.py: both layouts of OpenAssistant become conversations that prepare takes."""

import json

import pytest
from preparing import run, write


def message(id: str, role: str, *replies: dict, **more) -> dict:
    return {"message_id": id, "role": role, "text": f"text {id}", "replies": list(replies), **more}


def tree(number: int) -> dict:
    """q - a - q2 - a2     (a is the best answer, b another, c a deleted one; nobody has answered q3)
    \\ b \\ q3
    \\ c - q4 - a4
    """
    n = str(number)
    second = message(n + "q2", "prompter", message(n + "a2", "assistant", rank=0))
    third = message(n + "q3", "prompter")
    deleted = message(
        n + "c", "assistant", message(n + "q4", "prompter", message(n + "a4", "assistant")), deleted=True, rank=2
    )
    answers = [message(n + "b", "assistant", rank=1), deleted, message(n + "a", "assistant", second, third, rank=0)]
    return {"message_tree_id": n, "tree_state": "ready", "prompt": message(n + "q", "prompter", *answers)}


def flat(item: dict, parent: str | None = None) -> list[dict]:
    replies = item["replies"]
    rest = {key: value for key, value in item.items() if key != "replies"}
    return [{**rest, "parent_id": parent}, *(row for reply in replies for row in flat(reply, item["message_id"]))]


TREES = [tree(n) for n in range(8)]
MESSAGES = [row for each in TREES for row in flat(each["prompt"])]
LAYOUTS = {"trees": TREES, "messages": MESSAGES, "messages, replies first": MESSAGES[::-1]}


def turns(row: dict) -> list[str]:
    return [
        turn["content"].removeprefix("text ") + ("" if turn.get("train", True) else "-") for turn in row["messages"]
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("options", "paths"), [((), [["q", "a", "q2", "a2"], ["q", "b"]]), (("--best",), [["q", "a", "q2", "a2"]])]
)
def test_each_answer_that_none_follows_ends_a_conversation(tmp_path, run_script, layout, options, paths):
    source = write(tmp_path / "oasst.jsonl", LAYOUTS[layout])
    result = run_script("tools/conversations_of_trees", source, "--out", "rows.jsonl", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    of_first = [turns(row) for row in rows if row["group"] == "0q"]
    assert of_first == [["0" + id for id in path] for path in paths]
    assert len(rows) == 8 * len(paths)
    assert f"{len(MESSAGES)} messages in 8 trees: {len(rows)} conversations" in result.stderr
    assert f"{len(MESSAGES) - 8 * (4 + len(paths[1:]))} messages are in none" in result.stderr
    prepared = run(tmp_path, source=str(tmp_path / "rows.jsonl"), val_size=2 * len(paths), test_size=None)
    assert prepared.ledger["unused_columns"] == prepared.ledger["dropped"] == {}
    for part in (prepared.train, prepared.val):
        assert {row["messages"][0]["role"] for row in part} == {"user"}
    assert prepared.val_summary["groups"] == 2


def test_an_answer_is_trained_once(tmp_path, run_script):
    second = message("q2", "prompter", message("a2", "assistant"), message("b2", "assistant"))
    root = message("q", "prompter", message("a", "assistant", second))
    source = write(tmp_path / "oasst.jsonl", [{"message_tree_id": "t", "prompt": root}])
    assert run_script("tools/conversations_of_trees", source, "--out", "rows.jsonl", cwd=tmp_path).returncode == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [turns(row) for row in rows] == [["q", "a", "q2", "a2"], ["q", "a-", "q2", "b2"]]


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([MESSAGES[0], {"text": "t"}], "oasst.jsonl:2: not a message of a tree: message_id, role and text are needed"),
        ([{"message_tree_id": "1", "prompt": message("q", "prompter", *["reply"])}], "oasst.jsonl:1: not a message"),
        ([message("q", "prompter")], "no answer in 1 messages"),
        # Two that answer each other hang from no root.
        (
            [
                {**MESSAGES[0], "parent_id": "b", "message_id": "a"},
                {**MESSAGES[1], "parent_id": "a", "message_id": "b"},
            ],
            "no answer",
        ),
    ],
)
def test_what_is_no_tree(tmp_path, run_script, rows, what):
    source = write(tmp_path / "oasst.jsonl", rows)
    result = run_script("tools/conversations_of_trees", source, "--out", "rows.jsonl", cwd=tmp_path)
    assert result.returncode == 1 and what in result.stderr and "what to do: " in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "rows.jsonl").exists()
