"""Which language a text is in: an ISO 639-1 code, or "unknown" where that cannot be told."""

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from typing import ClassVar

UNKNOWN = "unknown"

# More does not make the answer surer, only slower: langdetect does 480 texts/s of 300 characters and 68 of 20,000.
MAX_CHARS = 1000


@lru_cache
def detector(name: str) -> Callable[[str], str]:
    """The detector of that name (`langdetect` or `py3langid`): text -> code. Same text, same answer."""
    return {"langdetect": _langdetect, "py3langid": _py3langid}[name]()


def _langdetect() -> Callable[[str], str]:
    from langdetect import DetectorFactory, LangDetectException, detect_langs

    DetectorFactory.seed = 0  # it draws at random otherwise: "Hotel Roma" had four answers in twelve runs

    def detect(text: str) -> str:
        try:
            best = detect_langs(text[:MAX_CHARS])[0]
        except LangDetectException:  # no letters: digits, a link, emoji
            return UNKNOWN
        return best.lang if best.prob >= 0.5 else UNKNOWN

    return detect


def _py3langid() -> Callable[[str], str]:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    def detect(text: str) -> str:
        text = text[:MAX_CHARS]
        if not any(char.isalpha() for char in text):
            return UNKNOWN
        code, probability = identifier.classify(text)
        # It tells the two kinds of Norwegian apart; langdetect and most labels do not.
        code = {"nb": "no", "nn": "no"}.get(code, code)
        return code if probability >= 0.5 else UNKNOWN

    return detect


def languages_of(texts: list[str], detect: Callable[[str], str]) -> list[str]:
    """The languages of the turns of a conversation, sorted; [UNKNOWN] where there is nothing to tell one by.

    A detector sees one language in a mixed text, often the wrong one: a Chinese question about an English word passes
    for English. So turns are first sorted by the script that most of their words are in, code and links left out, and
    each script's words are judged by themselves.
    """
    by_script: dict[str, list[str]] = {}
    for text in texts:
        here = _words_by_script(text)
        if here:
            script = max(here, key=lambda name: len(here[name]))
            by_script.setdefault(script, []).extend(here[script])
    found = set()
    for script, words in by_script.items():
        # These scripts tell the language by themselves; langdetect takes every tenth Chinese text for Korean.
        if script == "HANGUL":
            found.add("ko")
        elif script == EAST_ASIAN:
            kana = sum(unicodedata.name(word[0]).startswith(("HIRAGANA", "KATAKANA")) for word in words)
            found.add("ja" if kana > len(words) / 10 else "zh")
        else:
            found.add(detect(" ".join(words)))
    return sorted(found) or [UNKNOWN]


def spoken_texts(row: dict) -> list[str]:
    """What user and assistant say in a prepared row: system prompts and tools are often in another language."""
    if "text" in row:
        return [row["text"]]
    return [message["content"] for message in row["messages"] if message["role"] in ("user", "assistant")]


_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+", re.DOTALL)
EAST_ASIAN = "EAST ASIAN"  # Chinese and Japanese: written without spaces


class _Scripts(dict):
    """{code point: that of a character which stands for its script}, for str.translate. A script is the first word of a
    character's Unicode name (LATIN, CYRILLIC, HANGUL); Chinese and Japanese are one. 0 is what is not a letter."""

    names: ClassVar = ["NOT A LETTER", EAST_ASIAN]

    def __missing__(self, code: int) -> int:
        char = chr(code)
        name = unicodedata.name(char, "").split(" ")[0].removesuffix("-COMPATIBILITY")
        if name in ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "BOPOMOFO"):
            name = EAST_ASIAN
        if not _WORD.match(char):
            name = "NOT A LETTER"
        elif name not in self.names:
            self.names.append(name)
        self[code] = self.names.index(name)
        return self[code]


_WORD = re.compile(r"[^\W\d_]+")
_SCRIPTS = _Scripts()
_RUNS = re.compile(r"\x01|([^\0\x01])\1*")


def _words_by_script(text: str) -> dict[str, list[str]]:
    """The words of each script; of Han and kana, which put no spaces between words, the characters."""
    text = _CODE.sub(" ", text)[:MAX_CHARS]
    scripts = text.translate(_SCRIPTS)
    there = set(scripts) - {"\0"}
    if len(there) == 1 and there != {"\x01"}:  # as nearly all texts, and then three times as fast
        return {_SCRIPTS.names[ord(there.pop())]: _WORD.findall(text)}
    words: dict[str, list[str]] = {}
    for run in _RUNS.finditer(scripts):
        script = _SCRIPTS.names[ord(scripts[run.start()])]
        words.setdefault(script, []).append(text[run.start() : run.end()])
    return words
