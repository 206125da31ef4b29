"""Questions of the evaluation that stand in the training rows.

A question counts as found in a row if the row has at least half of its 13-grams (runs of 13 words), whatever stands around them;
GPT-3 looked for 13-grams too (arXiv:2005.14165, appendix C). On GSM8K, training against test questions, single 13-grams hit
0.05 % of the rows, 8-grams 1.3 %, and 13-grams find 294 of 300 questions of which one word was changed. A question of fewer words
counts if it is the whole of a turn that is not the assistant's: parts of it say nothing.

The memory is that of the questions. A row costs a look into a set for every seventh word: any 13 words in a row hold the seven
that begin at a multiple of seven.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator

from moult.files import canonical, sha256_text

GRAM, PROBE = 13, 7  # words
COVERAGE = 0.5

# A word, or a character of the languages that write no spaces between words.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")


def words_of(text: str) -> list[str]:
    """Without case, punctuation and ways to write the same character."""
    return _WORD.findall(text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold())


class Questions:
    """What is looked for. Numbers stand for questions: their places in the list that is given."""

    def __init__(self, questions: list[str]):
        self.whole: dict[str, list[int]] = defaultdict(list)  # of short ones
        # By hash: 8 bytes instead of some hundred. Hashes differ between processes, what is found with them does not.
        self.grams: dict[int, list[int]] = defaultdict(list)
        self.probes: set[int] = set()
        self.sizes: list[int] = []
        for number, question in enumerate(questions):
            words = words_of(question)
            grams = {_hash(words, start, GRAM) for start in range(len(words) - GRAM + 1)}
            self.sizes.append(len(grams))
            for gram in grams:
                self.grams[gram].append(number)
            if grams:
                self.probes.update(_hash(words, start, PROBE) for start in range(len(words) - PROBE + 1))
            elif words:
                self.whole[" ".join(words)].append(number)

    def found_in(self, row: dict) -> dict[int, float]:
        """{question: the share of it that a row has}, of those that count as found."""
        seen: dict[int, set[int]] = defaultdict(set)
        found: dict[int, float] = {}
        for text, may_ask in texts_of(row):
            words = words_of(text)
            if may_ask and len(words) < GRAM:
                found |= dict.fromkeys(self.whole.get(" ".join(words), ()), 1.0)
            for gram in self._grams_in(words):
                for number in self.grams.get(gram, ()):
                    seen[number].add(gram)
        shares = {number: len(grams) / self.sizes[number] for number, grams in seen.items()}
        return found | {number: share for number, share in shares.items() if share >= COVERAGE}

    def _grams_in(self, words: list[str]) -> Iterator[int]:
        last = len(words) - GRAM
        for probe in range(0, len(words) - PROBE + 1 if last >= 0 else 0, PROBE):
            if _hash(words, probe, PROBE) in self.probes:
                for start in range(max(0, probe - PROBE + 1), min(probe, last) + 1):
                    yield _hash(words, start, GRAM)


def _hash(words: list[str], start: int, count: int) -> int:
    return hash(" ".join(words[start : start + count]))


def texts_of(row: dict) -> Iterator[tuple[str, bool]]:
    """(a text of a row, whether it may be a question) for each of its turns."""
    if "text" in row:
        yield row["text"], True
    for message in row.get("messages", ()):
        yield message["content"], message["role"] != "assistant"


def question_of(prompt: dict) -> str:
    """What an entry of eval.prompts asks: its last turn."""
    return prompt["prompt"] if "prompt" in prompt else str(prompt["messages"][-1].get("content", ""))


def rows_told(ids: Iterable[str]) -> dict:
    """What tells whether two stages have the same rows in mind: {count, sha256}."""
    ordered = sorted(ids)
    return {"count": len(ordered), "sha256": sha256_text(canonical(ordered))}
