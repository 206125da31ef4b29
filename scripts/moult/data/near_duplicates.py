"""Rows that are almost the same: a question with one more word, a copy with other punctuation, a text that was edited.

Such a row in train tells the answer to its twin in val or test, so the two must be in one part. What counts is what user and
assistant say: words in lower case, five in a row at a time ("shingles"). Two rows are near copies if they share 70 % of their
shingles. That is one changed word in 28; shorter rows usually are near copies only if all their words are the same.

MinHash estimates the share (Broder, "On the resemblance and containment of documents", 1997): each row has a signature
of 64 numbers, and two rows have as many of them in common as shingles, give or take 6 points. Rows that agree in one of
16 bands of four numbers are compared (Leskovec et al., "Mining of Massive Datasets", chapter 3): two rows at 70 % are
missed once in a hundred times. Of each number 16 bits are kept (Li and König, "b-bit minwise hashing", 2010). No part
of the result depends on the order of the comparisons or the number of processes.
"""

import unicodedata
from functools import cache, lru_cache
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    import numpy as np

    from moult.data.records import Rows

SHINGLE = 5  # words
SIMILAR = 0.7
VALUES, BANDS = 64, 16
SIZE = 2 * VALUES  # bytes of a signature
SEED = 1

# Near copies that are more rows than this share of all are rows made from a template, and would fill a part. They stay apart.
MOST, ALWAYS = 0.05, 20  # share, rows

_PIECE = 2**17  # characters: so few that they stay in the processor's cache, which halves the time
_BLOCK = 2**16  # rows
_BASE, _MIX = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9  # odd
_SEPARATOR, _PART_OF_WORD, _WORD = 0, 1, 2


# --- signatures -------------------------------------------------------------------------------------------------------


class Signer:
    """Makes the signatures of rows as they come: of some at a time, so that few texts are in memory."""

    def __init__(self):
        self._made: list[bytes] = []
        self._texts: list[str] = []
        self._size = 0

    def add(self, text: str) -> None:
        """The next row. text: what is said in it."""
        self._texts.append(text)
        self._size += len(text)
        if self._size > _PIECE:
            self._sign()

    def end(self) -> bytes:
        """The signatures of all rows, SIZE bytes each."""
        if self._texts:
            self._sign()
        return b"".join(self._made)

    def _sign(self) -> None:
        self._made.append(_signatures_of(self._texts))
        self._texts, self._size = [], 0


def _signatures_of(texts: list[str]) -> bytes:
    import numpy as np
    from rensa import RMinHash

    words, offsets = _words(texts)
    counts: np.ndarray = np.diff(offsets)
    start: np.ndarray = np.repeat(offsets[:-1], counts)
    count: np.ndarray = np.repeat(counts, counts)
    place = np.arange(len(words)) - start
    # The words of a row form a ring. So each word is in as many shingles, wherever it stands.
    shingles = words.copy()
    for step in range(1, SHINGLE):
        after = place + step
        after = np.where(after < count, after, after % count)
        shingles = shingles * np.uint64(_BASE) + words[start + after]
    shingles ^= shingles >> np.uint64(31)
    shingles *= np.uint64(_MIX)
    found = RMinHash.digest_matrix_from_flat_token_hashes(shingles, offsets.tolist(), VALUES, SEED)
    return (np.array(found.to_rows(), np.uint32) & np.uint32(0xFFFF)).astype("<u2").tobytes()


def _words(texts: list[str]) -> tuple["np.ndarray", "np.ndarray"]:
    """(a hash of each word, where the words of each row begin and the last ones end). A row without a word is one word."""
    import numpy as np

    texts = [text.lower() for text in texts]
    codes = np.frombuffer("\n".join([*texts, ""]).encode("utf-32-le"), np.uint32)
    kinds = _kinds()[codes]
    part, whole = kinds == _PART_OF_WORD, kinds == _WORD
    beside = part[1:] & part[:-1]
    begins, ends = part | whole, part | whole
    begins[1:] &= ~beside
    ends[:-1] &= ~beside
    first: np.ndarray = np.flatnonzero(begins)
    last: np.ndarray = np.flatnonzero(np.append(False, ends))
    starts: np.ndarray = np.cumsum([0, *(len(text) + 1 for text in texts)])
    offsets: np.ndarray = np.asarray(np.searchsorted(first, starts))
    empty: np.ndarray = np.flatnonzero(offsets[1:] == offsets[:-1])
    if len(empty):
        first = np.insert(first, offsets[empty], starts[empty])
        last = np.insert(last, offsets[empty], starts[1:][empty])
        offsets = offsets + np.asarray(np.searchsorted(empty, np.arange(len(offsets))))
    # The hash of characters i to j is the sum of code * base^(k - i), modulo 2^64, where an odd base has an inverse.
    size = 1 << len(codes).bit_length()
    powers, inverse = _powers(_BASE, size), _powers(pow(_BASE, -1, 2**64), size)
    sums: np.ndarray = np.zeros(len(codes) + 1, np.uint64)
    np.cumsum((codes + np.uint64(1)) * powers[: len(codes)], out=sums[1:])
    hashes = (sums[last] - sums[first]) * inverse[first]
    return hashes ^ (hashes >> np.uint64(29)), offsets


@lru_cache(4)  # nearly all pieces are of one size
def _powers(base: int, count: int) -> "np.ndarray":
    import numpy as np

    powers: np.ndarray = np.full(count, base, np.uint64)
    powers[:1] = 1
    return np.cumprod(powers)


@cache
def _kinds() -> "np.ndarray":
    """Of each code point: whether it separates words, is a part of one, or is a word.

    Words are letters, digits and their marks; in scripts without spaces each character is a word, as are signs (+, %, an emoji).
    """
    import numpy as np

    kinds: np.ndarray = np.full(0x110000, _WORD, np.uint8)
    kinds[:0x2E80] = [_kind(chr(code)) for code in range(0x2E80)]
    kinds[0x3000:0x3040] = [_kind(chr(code)) for code in range(0x3000, 0x3040)]
    kinds[0xA000:0xD800] = [_kind(chr(code)) for code in range(0xA000, 0xD800)]  # with the Korean syllables
    kinds[0xFB00:0x10000] = [_kind(chr(code)) for code in range(0xFB00, 0x10000)]
    for first, end in ((0x0E00, 0x0F00), (0x1000, 0x10A0), (0x1780, 0x1800)):  # Thai, Lao; Burmese; Khmer
        kinds[first:end] = _WORD
    return kinds


def _kind(char: str) -> int:
    category = unicodedata.category(char)
    if category[0] in "LNM":
        return _PART_OF_WORD
    return _WORD if category[0] == "S" or char in "%&*-/@#\\" else _SEPARATOR


# --- what is alike ----------------------------------------------------------------------------------------------------


def first_alike(signatures: BinaryIO, numbers: "np.ndarray", same: "np.ndarray") -> "np.ndarray":
    """Of each row the index of the first row that it belongs together with, itself if there is none.

    Args:
        signatures: a file of them. numbers: which of them each row has.
        same: indices of the same meaning, of rows that belong together anyway.
    """
    import numpy as np

    signatures.flush()
    roots = same.copy()
    if not len(roots):
        return roots
    for band in range(BANDS):
        keys = _band(signatures, band)[numbers]
        order = np.argsort(keys, kind="stable")
        is_new: np.ndarray = np.append(True, keys[order[1:]] != keys[order[:-1]])
        first = order[is_new][np.cumsum(is_new) - 1]
        del keys
        open_ = roots[first] != roots[order]
        pairs = first[open_], order[open_]
        alike = _alike(signatures, *(numbers[side] for side in pairs))
        _join(roots, *(side[alike] for side in pairs))
    return roots


def _band(signatures: BinaryIO, band: int) -> "np.ndarray":
    """The numbers of a band as one of 64 bits, of all signatures. Read and not mapped: it would count as memory."""
    import numpy as np

    signatures.seek(0)
    parts: list[np.ndarray] = [np.empty(0, "<u8")]
    while block := signatures.read(SIZE * _BLOCK):
        parts.append(np.frombuffer(block, "<u8").reshape(-1, BANDS)[:, band].copy())
    return np.concatenate(parts)


def _alike(signatures: BinaryIO, one: "np.ndarray", other: "np.ndarray") -> "np.ndarray":
    """Mask of the pairs of signatures that are SIMILAR."""
    import numpy as np

    if not len(one):
        return np.zeros(0, bool)
    mapped: np.ndarray = np.memmap(signatures, "<u2", "r").reshape(-1, VALUES)
    starts = range(0, len(one), _BLOCK)
    masks = [(mapped[one[at : at + _BLOCK]] == mapped[other[at : at + _BLOCK]]).mean(axis=1) for at in starts]
    return np.concatenate(masks) >= SIMILAR


def _join(roots: "np.ndarray", one: "np.ndarray", other: "np.ndarray") -> None:
    """Give the rows of both sides of each pair, and all that belong to them, the smaller of their roots."""
    import numpy as np

    while True:
        low, high = np.minimum(roots[one], roots[other]), np.maximum(roots[one], roots[other])
        if (low == high).all():
            return
        np.minimum.at(roots, high, low)
        while not np.array_equal(roots, further := roots[roots]):
            roots[:] = further


# --- what becomes of them ---------------------------------------------------------------------------------------------


def join_groups(rows: "Rows", signatures: BinaryIO) -> dict[str, int]:
    """Give near copies, and the groups that they are in, the group of the first of these rows.

    Returns what metadata.json says: the `rows` that are in a group with others by this, the `groups` that they form, the rows of
    the `largest`, and the rows that were `left_apart`, because there are too many of them.
    """
    import numpy as np

    same = rows.first_of("group")
    roots = first_alike(signatures, rows.records["number"], same)
    sizes = np.bincount(roots, minlength=len(rows))
    joined: np.ndarray = np.zeros(len(rows), bool)
    joined[roots[roots != same]] = True  # by the root: groups that were joined
    too_large = joined & (sizes > max(ALWAYS, MOST * len(rows)))
    left, moved = too_large[roots], (roots != same) & ~too_large[roots]
    for name in ("group", "split"):
        rows.records[name][moved] = rows.records[name][roots[moved]]
    rows.records["moved"] |= moved
    groups = sizes[joined & ~too_large]
    return {
        "rows": int(groups.sum()),
        "groups": len(groups),
        "largest": int(groups.max(initial=0)),
        "left_apart": int(left.sum()),
    }


def is_near_copy(rows: "Rows", signatures: BinaryIO) -> "np.ndarray":
    """Mask of the rows that are near copies of an earlier one. Those of which there are too many are not."""
    import numpy as np

    roots = first_alike(signatures, rows.records["number"], np.arange(len(rows)))
    sizes = np.bincount(roots, minlength=len(rows))
    return (roots != np.arange(len(rows))) & (sizes[roots] <= max(ALWAYS, MOST * len(rows)))
