"""What an answer is checked for: `expect` in the config. Used for base and tuned alike, and for the served model."""

import json
import re
from collections.abc import Callable
from typing import Any

from moult.measuring.forgetting import instructions

# The part of the answers that a kind of question is in.
PART = {"prompt": "prompts", "row": "rows", "instruction": "instructions"}


def check(answer: str, expect: dict, reference: str | None = None) -> dict[str, bool]:
    """{name of the check: whether it holds} for each that `expect` asks for.

    Args:
        answer: what the model said, without the stop token.
        expect: contains, regex, exact, match, json, language, max_chars, min_chars; see config/README.md.
        reference: the row's own answer, for `exact: true`, `contains: true` and `match`.
    """
    return {name: CHECKS[name](answer, value, reference) for name, value in sorted(expect.items())}


def expectations(settings: dict) -> Callable[[str, str], dict]:
    """What is expected of the answer to a question, by its kind and id. `settings`: the section eval."""
    expected = {("prompt", prompt["id"]): prompt.get("expect", {}) for prompt in settings["prompts"]}
    expected |= {("instruction", entry["id"]): entry["expect"] for entry in instructions()}
    row_expect = settings.get("row_expect", {})
    return lambda kind, id: row_expect if kind == "row" else expected[kind, id]


def _contains(answer: str, value, reference: str | None) -> bool:
    wanted = [reference] if value is True else [value] if isinstance(value, str) else value
    return all(text is not None and text in answer for text in wanted)


def _exact(answer: str, value, reference: str | None) -> bool:
    wanted = reference if value is True else value
    return wanted is not None and answer.strip() == wanted.strip()


def _match(answer: str, pattern: str, reference: str | None) -> bool:
    """The last match counts: a model that reasons names the result at the end."""
    found = [list(re.finditer(pattern, text or "")) for text in (answer, reference)]
    return all(found) and found[0][-1].group(1).strip() == found[1][-1].group(1).strip()


def _json(answer: str, wanted: bool, reference: str | None) -> bool:
    """An object or a list; a bare word or number is JSON by the letter only."""
    try:
        return isinstance(json.loads(answer), dict | list) is wanted
    except ValueError:
        return not wanted


def _language(answer: str, code: str, reference: str | None) -> bool:
    from moult.data.language import detector, languages_of

    return languages_of([answer], detector("langdetect")) == [code]


CHECKS: dict[str, Callable[[str, Any, str | None], bool]] = {
    "contains": _contains,
    "exact": _exact,
    "json": _json,
    "language": _language,
    "match": _match,
    "max_chars": lambda answer, limit, reference: len(answer) <= limit,
    "min_chars": lambda answer, limit, reference: len(answer) >= limit,
    "regex": lambda answer, pattern, reference: re.search(pattern, answer) is not None,
}
