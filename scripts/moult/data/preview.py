"""What a person sees of sequences: the text of each token, and whether it is trained."""

from collections.abc import Iterable

from moult.data.sequence import IGNORE
from moult.model.chat import Chat


def examples(sequences: Iterable[dict], chat: Chat) -> list[dict]:
    """[{"id", "trained", "tokens": [[id, text, whether it is trained], ...]}] of these sequences."""
    return [
        {
            "id": sequence["id"],
            "trained": sum(label != IGNORE for label in sequence["labels"]),
            "tokens": [
                [token, text, label != IGNORE]
                for token, label, text in zip(
                    sequence["input_ids"], sequence["labels"], pieces(sequence["input_ids"], chat), strict=True
                )
            ],
        }
        for sequence in sequences
    ]


def pieces(ids: list[int], chat: Chat) -> list[str]:
    """The text that each token adds. (Decoded alone, a token may lose its space, or be only a part of a character.)

    A character of several tokens is assigned to the last one.
    """
    texts, shown, start = [], 0, 0  # ids[start:shown] is text that was given out, there for what follows to lean on
    for end in range(1, len(ids) + 1):
        before, text = chat.decode(ids[start:shown]), chat.decode(ids[start:end])
        whole = not text.endswith("\ufffd") or end == len(ids)
        texts.append(text[len(before) :] if whole else "")
        if whole:
            start, shown = shown, end
    return texts
