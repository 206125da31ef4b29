"""What the values of a row are read with: an object's fields, text, JSON; and what is told of them that nobody has read."""

import json
import re
from dataclasses import dataclass, field

from moult.data.tables import JsonText


class BadRow(Exception):
    """A row that cannot be a training row. `reason` names the ledger's entry, the message says what is wrong."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass
class LeftOut:
    """What of a row is not trained, or not in its normalised form at all.

    turns_cut: turns behind the last answer; no label can come from them.
    turns_empty: assistant turns that say nothing; they stay as context and are not trained.
    columns: columns that hold something and that nobody has read.
    keys: the same of messages and what is in them: "messages[].cache_control".
    """

    turns_cut: int = 0
    turns_empty: int = 0
    columns: set[str] = field(default_factory=set)
    keys: set[str] = field(default_factory=set)


class Fields:
    """An object of a row that knows which of its fields were read."""

    def __init__(self, values: dict):
        self.values = values
        self.read: set[str] = set()

    def first(self, *names: str | None):
        """The first of these fields that is there, or None; null is not there."""
        for name in names:
            if name is not None and self.values.get(name) is not None:
                self.read.add(name)
                return self.values[name]
        return None

    def unread(self, where: str = "") -> set[str]:
        """The fields that hold something and that nobody has read, as they are named in the ledger.

        `where` is the place of this object in its row, "messages[3]"; its numbers are left out.
        """
        unread = {key for key, value in self.values.items() if key not in self.read and not is_nothing(value)}
        if not unread or not where:
            return unread
        prefix = re.sub(r"\[\d+\]", "[]", where)
        return {f"{prefix}.{key}" for key in unread}


def is_nothing(value) -> bool:
    value = value_of(value)
    return value is None or (isinstance(value, str | list | dict) and not value)


def text(value, where: str) -> str:
    if not isinstance(value, str):
        raise BadRow("wrong_type", f"{where} is {kind(value)}, and must be text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow("not_unicode", f"{where} holds half of a surrogate pair, which is no character") from None
    return str(value)


def kind(value) -> str:
    return "missing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def parsed(value, where: str):
    """What JSON text stands for; anything but text is taken as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise BadRow("bad_json", f"{where} is not JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise BadRow("bad_json", f"{where} is not JSON: {error}") from None


def value_of(value):
    """The value that `datasets` holds as JSON text; any other is taken as it is."""
    return json.loads(value) if isinstance(value, JsonText) else value


def plain(value, where: str):
    """Like `parsed`, and all that is held as JSON text below as well."""
    try:
        return parsed(value, where) if isinstance(value, str) else _without_json_text(value)
    except RecursionError as error:
        raise BadRow("bad_json", f"{where} is not JSON: {error}") from None


def _without_json_text(value):
    if isinstance(value, dict):
        return {key: _without_json_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_json_text(item) for item in value]
    return value_of(value)


def objects(value):
    """A list of objects. `datasets` makes an object of lists of it where the type is `Sequence` of a dict."""
    columns = list(value.values()) if isinstance(value, dict) else []
    if columns and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return [dict(zip(value, items, strict=True)) for items in zip(*columns, strict=True)]
    return value
