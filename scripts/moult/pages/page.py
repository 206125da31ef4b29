"""Write a page: one file that needs no network, with one look, in which every text of a model or a dataset is only text.

Jinja escapes all that a template shows. Beside that, a content security policy names the hashes of our own stylesheet and script:
nothing else can run or load, whatever a row contains. What a browser would obey or hide is made visible on every page; `shown`
cuts what is too long.
"""

import base64
import hashlib
import json
import re
from functools import cache
from pathlib import Path

from moult import __version__
from moult.files import write_text

LOOK = Path(__file__).parent / "look"

# A row can be of any length, a page cannot: longer texts are cut, and say so.
LONGEST_TEXT = 2_000

# What is not seen but has an effect: control characters, marks of direction, invisible separators and tags.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def write_page(path: str | Path, template: str, **values) -> None:
    """Render `template`, a file of look/ that extends layout.html, and write it whole or not at all."""
    write_text(path, render(template, **values))


def render(template: str, **values) -> str:
    style, script = _asset("style.css"), _asset("page.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src {_digest(style)}; script-src {_digest(script)}; base-uri 'none'"
    )
    page = _templates().get_template(template)
    return visible(page.render(style=style, script=script, policy=policy, version=__version__, **values))


def shown(text: object, limit: int = LONGEST_TEXT) -> str:
    """`text` as a person can see all of it: what is invisible as its code point, what is too long cut, with how much is left.
    A list or a mapping is shown as JSON."""
    text = json.dumps(text, ensure_ascii=False) if isinstance(text, list | dict) else str(text)
    left = len(text) - limit
    text = visible(text[:limit].replace("\r\n", "\n"))
    return f"{text} … ({left:,} more characters)" if left > 0 else text


def visible(text: str) -> str:
    """What is invisible as its code point. Whole pages go through this, so that no template can forget it."""
    text = _INVISIBLE.sub(lambda hit: f"⟨U+{ord(hit.group()):04X}⟩", text)
    return text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:,.1f} h"


@cache
def _asset(name: str) -> str:
    return (LOOK / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def _templates():
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(LOOK), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["shown"] = shown
    return environment
