"""Keeps secrets out of what is shown and written: tokens, passwords, logins in addresses."""

import json
import logging
import os
import re
import shlex
from functools import lru_cache
from urllib.parse import quote

MASK = "***"

# Environment variables and Python variables whose values are secret.
SECRET_NAME = re.compile(
    r"token$|secret|passw|passphrase|_pwd$|_pat$|api_?key|_key$|authorization|credential", re.IGNORECASE
)

# What looks like a token. The last: the login before the host in an address; a password may hold an @ itself.
_SECRET_TEXT = re.compile(r"\bhf_[A-Za-z0-9]{16,}|(?<=Bearer )[\w.~+/-]{8,}|(?<=://)[^/\s?#\"]+(?=@)")


def redact(text: str) -> str:
    """`text` without secrets: whatever looks like a token, and the values of environment variables with a secret's name."""
    for secret in _spellings(tuple(value for name, value in os.environ.items() if SECRET_NAME.search(name))):
        text = text.replace(secret, MASK)
    return _SECRET_TEXT.sub(MASK, text)


@lru_cache(maxsize=8)
def _spellings(values: tuple[str, ...]) -> list[str]:
    """How the values may be written: as they are, each line of them, in JSON, in Python, in an address. The longest first."""
    plain = {part.strip() for value in values for part in (value, *value.splitlines())}
    written = {
        spelling
        for secret in plain
        if len(secret) >= 8
        for spelling in (
            secret,
            json.dumps(secret)[1:-1],
            json.dumps(secret, ensure_ascii=False)[1:-1],
            repr(secret)[1:-1],
            ascii(secret)[1:-1],
            shlex.quote(secret).strip("'"),
            quote(secret, safe="", errors="surrogateescape"),
            quote(secret, errors="surrogateescape"),
        )
    }
    return sorted(written, key=lambda secret: (-len(secret), secret))


class RedactingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))
