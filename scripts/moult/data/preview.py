"""A page that shows sequences to a person: which tokens are trained, and which are context."""

import html
from collections.abc import Iterable

from moult.data.sequence import IGNORE
from moult.model.chat import Chat


def page(sequences: Iterable[dict], chat: Chat, origin: str) -> str:
    """A page with these sequences, with the trained tokens marked, and with the id of each token on hover."""
    articles = []
    for sequence in sequences:
        tokens = []
        ids = sequence["input_ids"]
        for token, label, text in zip(ids, sequence["labels"], pieces(ids, chat), strict=True):
            text = html.escape(text).replace("\n", "↵\n")
            kind = "trained" if label != IGNORE else "context"
            tokens.append(f'<span class="{kind}" title="{token}">{text}</span>')
        trained = sum(label != IGNORE for label in sequence["labels"])
        title = f"{html.escape(sequence['id'])}: {trained} of {len(sequence['labels'])} tokens trained"
        articles.append(f"<h2>{title}</h2>\n<pre>{''.join(tokens)}</pre>")
    return PAGE.format(origin=html.escape(origin), articles="\n".join(articles))


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


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Trained tokens</title><style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
h2 {{ font-size: 1rem; margin: 2rem 0 .5rem; }}
pre {{ white-space: pre-wrap; padding: 1rem; border: 1px solid #8884; border-radius: 6px; }}
.context {{ opacity: .65; }}
.trained {{ background: #2a93; border-bottom: 2px solid #2a9; }}
span:empty {{ padding-left: .2em; }}
span:hover {{ outline: 1px solid currentColor; }}
</style></head><body>
<h1>Trained tokens</h1>
<p>The model learns to produce the marked tokens. All others are context. Point at a token to see its id.</p>
<p>Chat template: {origin}.</p>
{articles}
</body></html>
"""
