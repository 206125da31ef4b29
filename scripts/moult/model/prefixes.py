"""Tokens of texts that begin alike, as the prefixes of one conversation do: what was tokenized is not tokenized again."""

import re
from bisect import bisect_right
from functools import lru_cache

from moult.model.chat import Chat


class PrefixTokens:
    """The tokens of one text after another, each the same as `chat.ids(text)`. What a text shares with the one before is kept.

    A text may be cut in front of a token that the tokenizer looks for before it does anything else ("added" tokens, such as
    `<|im_start|>`): what stands before such a token and what follows are tokenized apart anyway.
    """

    def __init__(self, chat: Chat):
        self.chat = chat
        self._text = ""
        self._ids: list[int] = []
        self._cuts = [(0, 0)]  # places where the text may be cut: (character, token)
        self._new = False  # whether what stands behind the last of them was not looked through yet

    def ids(self, text: str) -> list[int]:
        if text == self._text:
            return self._ids
        # Behind the cut the texts agree for as long as the longest token, so both have the same token there.
        place = self._cut_before(common(self._text, text) - _cut_tokens(self.chat)[3])
        begin, count = self._cuts[place]
        self._cuts = self._cuts[: place + 1]
        self._ids = self._ids[:count] + self.chat.ids(text[begin:])
        self._text, self._new = text, True
        return self._ids

    def count_before(self, place: int) -> int:
        """At most as many tokens stand before character `place` of the last text; nearly always just so many."""
        return self._cuts[self._cut_before(place)][1]

    def _find_cuts(self) -> None:
        """Look through what is new in the text, once another one is to be compared with it."""
        seeker, cut_ids, known, _ = _cut_tokens(self.chat)
        begin, count = self._cuts[-1]
        written = [(match.start(), cut_ids.get(match.group())) for match in seeker.finditer(self._text, begin)]
        written = [(start, id) for start, id in written if id is not None]
        found = [index for index, id in enumerate(self._ids[count:], count) if id in known]
        if [self._ids[index] for index in found] == [id for _, id in written]:
            pairs = zip(written, found, strict=True)
            self._cuts += [(start, index) for (start, _), index in pairs if start > begin]
        self._new = False

    def _cut_before(self, place: int) -> int:
        if self._new:
            self._find_cuts()
        return max(bisect_right(self._cuts, place, key=lambda cut: cut[0]) - 1, 0)


@lru_cache(maxsize=16)  # the same for every row
def _cut_tokens(chat: Chat) -> tuple[re.Pattern, dict[str, int], set[int], int]:
    """(what finds added tokens in a text, {those in front of which it may be cut: id}, these ids, the length of the longest).

    Left out are tokens that take the whitespace before them (lstrip), that are none inside a word (single_word), or that are
    only looked for in what the normaliser has made (normalized).
    """
    added = {token.content: (id, token) for id, token in chat.tokenizer.added_tokens_decoder.items() if token.content}
    sought = sorted((text for text, (_, token) in added.items() if not token.normalized), key=len, reverse=True)
    seeker = re.compile("|".join(map(re.escape, sought)) or r"(?!)")
    ids = {
        text: id for text, (id, token) in added.items() if not (token.normalized or token.lstrip or token.single_word)
    }
    return seeker, ids, set(ids.values()), max(map(len, added), default=0)


def common(one: str | list, other: str | list) -> int:
    """The length of the beginning that two texts, or two lists, have in common."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
