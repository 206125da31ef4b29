"""What of the data is measured, and what is kept of each row and text. The choice is the same for every model."""

from moult.data.sequence import IGNORE
from moult.files import sha256_text
from moult.measuring.forgetting import general_texts
from moult.measuring.likelihood import Likelihood
from moult.model.tokenizer import text_ids


def chosen(rows: list[dict], count: int | None) -> list[dict]:
    """`count` of the rows, in their order. The choice is always the same."""
    if count is None or count >= len(rows):
        return rows
    order = sorted(range(len(rows)), key=lambda index: sha256_text(f"{rows[index]['id']}:{index}"))
    return [rows[index] for index in sorted(order[:count])]


def measured_rows(rows: list[dict], results: list[Likelihood]) -> list[dict]:
    """The lines of likelihood.jsonl."""
    return [
        {
            "id": row["id"],
            "group": row["group"],
            "source": row["source"],
            "nll": result.nll,
            "tokens": result.tokens,
            "correct": result.correct,
            "bytes": row["trained_bytes"],
        }
        for row, result in zip(rows, results, strict=True)
    ]


def general_sequences(chat, window: int) -> list[dict]:
    """The general text as tokens: of each text the first `window`, of which all but the first are scored. Texts with characters
    that the tokenizer has no tokens for are left out."""
    sequences = []
    for id, text in general_texts().items():
        if not chat.lost_characters(text):
            ids = text_ids(chat.tokenizer, text)[:window]
            sequences.append({"id": id, "input_ids": ids, "labels": [IGNORE, *ids[1:]]})
    return sequences


def measured_texts(texts: list[dict], results: list[Likelihood]) -> list[dict]:
    """The lines of general.jsonl."""
    return [
        {"id": text["id"], "nll": result.nll, "tokens": result.tokens, "correct": result.correct}
        for text, result in zip(texts, results, strict=True)
    ]
