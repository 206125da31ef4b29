"""What a server is asked: what evaluate has asked the model, as conversations, with the measured answers."""

from moult.errors import MoultError
from moult.files import read_jsonl
from moult.model.chat import Chat, date_variable, messages_of, shows_date
from moult.serving.client import Question

# Test rows that are asked besides eval.prompts.
ROWS = 8

# What evaluate writes of an answer.
MEASURED = ("kind", "id", "prompt_ids", "prompt_nll", "answer", "token_ids", "margins", "stopped")


def read_questions(
    answers: str, rows: str, prompts: list[dict], has_template: bool, chat: Chat | None
) -> list[Question]:
    """All prompts and some rows that evaluate asked, with their messages and the measured answers.

    Rows with tools or reasoning are left out: an API has its own form of those, which a template may show otherwise.
    `chat` finds out where the date makes a difference; None if it makes none.
    """
    by_id = {row["id"]: row for row in read_jsonl(rows)}
    entries = {prompt["id"]: prompt for prompt in prompts}
    questions, from_rows = [], 0
    for answer in read_jsonl(answers):
        if answer["kind"] == "instruction":
            continue
        expect: dict = {}
        if answer["kind"] == "prompt":
            entry = entries[answer["id"]]
            messages = messages_of(entry)
            expect = entry.get("expect", {})
        else:
            row = by_id[answer["id"]]
            messages = [{key: part[key] for key in part if key != "train"} for part in row["messages"][:-1]]
            plain = not row.get("tools") and all(set(message) == {"role", "content"} for message in messages)
            if not plain or from_rows == ROWS:
                continue
            from_rows += 1
        dated = chat is not None and shows_date(chat, messages)
        questions.append(
            Question(
                **{key: answer[key] for key in MEASURED},
                messages=messages if has_template else None,
                expect=expect,
                prints_date=dated,
                variables=date_variable(chat, messages) if chat and dated else {},
            )
        )
    if not questions:
        raise MoultError("nothing to ask: evaluate has asked nothing", "set eval.prompts or eval.answer_rows")
    return questions
