"""What prepare does with each row when it is read: make its line and its record, or say why it can be no training row.

Apart from the stage because many processes do it, each with a chunk of a file.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from moult.data.conversation import find_format, normalise
from moult.data.fields import BadRow, value_of
from moult.data.language import spoken_texts
from moult.data.ledger import Ledger
from moult.data.near_duplicates import Signer
from moult.data.readers import Chunk
from moult.files import canonical


@dataclass
class Part:
    """What has become of a chunk of a file.

    file: index of the file. end: how far into it, in bytes. ledger: of these rows. formats: those that were found.
    lines, records, signatures: of the rows that can be training rows.
    """

    file: int
    end: int
    ledger: Ledger = field(default_factory=Ledger)
    formats: set[str] = field(default_factory=set)
    lines: bytes = b""
    records: bytes = b""
    signatures: bytes = b""


_given: tuple[list[dict], list[dict], list[str], dict]


def set_first_pass(*given) -> None:
    """What each process must know: the sources, files, names of files and settings that prepare has."""
    global _given

    _given = given


def first_pass(item: tuple[int, Chunk]) -> Part:
    """What becomes of the rows of a chunk, given with the index of its file.

    In a thread of its own: how deeply nested JSON may be depends on the stack, and must not depend on the number of processes.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_first_pass, *item).result()


def _first_pass(index: int, chunk: Chunk) -> Part:
    from moult.data.records import record

    sources, files, names, settings = _given
    number_of_source, name, seed = files[index]["source"], names[index], settings["seed"]
    source = sources[number_of_source]
    is_sample, fraction = settings["sample_size"] != "full", source["weight"] % 1
    part = Part(index, chunk.content.end)
    lines, records = [], []
    signer = Signer() if settings["near_duplicates"] != "ignore" else None
    for number, raw in chunk.rows(name):
        part.ledger.read += 1
        part.ledger.columns |= raw.keys()
        place = f"{name}:{number}"
        row = to_row(place, raw, source, part.ledger)
        if row is None:
            continue
        part.formats.add(row.format)
        line = line_of(place, row.group, number_of_source, row.fields)
        key, group = row.key.hex(), row.group.hex()
        draws = draw(seed, "sample", key) if is_sample else 0.0, draw(seed, "split", group)
        again = fraction > 0 and draw(seed, "weight", key) < fraction
        lines.append(line)
        if signer:
            signer.add(row.said)
        records.append(record(row.key, row.group, *draws, again, number_of_source, len(line)))
    part.lines, part.records = b"".join(lines), b"".join(records)
    if signer:
        part.signatures = signer.end()
    return part


@dataclass
class Row:
    """A row in the one shape. fields: {field: canonical JSON}. key, group: SHA-256 of the content and of what its group is.
    said: the texts of user and assistant."""

    format: str
    fields: dict[str, bytes]
    key: bytes
    group: bytes
    said: str


def to_row(place: str, raw: dict, source: dict, ledger: Ledger) -> Row | None:
    """The row in the one shape, or None, counted in the ledger, if it cannot be a training row."""
    columns = source["columns"]
    try:
        format_name = find_format(raw, columns, source["format"])
        row, left = normalise(raw, columns, format_name)
        fields = json_of(row)
    except BadRow as bad:
        ledger.drop(bad.reason, place, str(bad))
        return None
    group_column = columns.get("group", "group")
    group = value_of(raw.get(group_column))
    left.columns.discard(group_column)
    ledger.leave_out(left)
    # pandas writes NaN for a missing number. A number and the same digits as text are one group.
    group = prompt_json(row) if group is None or group != group else canonical(ascii(str(group)))
    return Row(format_name, fields, digest(joined(fields)), digest(group.encode()), "\n".join(spoken_texts(row)))


def prompt_json(row: dict) -> str:
    """JSON of what makes rows belong together where no group is given: everything before the first answer to the user."""
    if "text" in row:
        return canonical(row["text"])
    roles = [message["role"] for message in row["messages"]]
    first = roles.index("assistant", roles.index("user") if "user" in roles else 0)
    return f"[{','.join([canonical(message['content']) for message in row['messages'][:first]])}]"


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def draw(seed: int, *what: str) -> float:
    """A number in [0, 1) that depends on nothing but the seed and the words: no order, no library, no version."""
    return int.from_bytes(digest("\0".join([str(seed), *what]).encode())[:8], "big") / 2**64


# --- JSON -------------------------------------------------------------------------------------------------------------


def json_of(row: dict) -> dict[str, bytes]:
    """{field: its canonical JSON} of a normalised row.

    Raises BadRow for what JSON cannot hold, deep inside tools and arguments.
    """
    try:
        return {
            name: (_messages_json(value) if name == "messages" else canonical(value)).encode()
            for name, value in row.items()
        }
    except UnicodeEncodeError:
        raise BadRow("not_unicode", "holds half of a surrogate pair, which is no character") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise BadRow("bad_json", f"tools or arguments hold what JSON cannot: {error}") from None


def _messages_json(messages: list[dict]) -> str:
    """`canonical`, but the usual turn, with its content and role, is put together here: that takes half of the time."""
    turns = [
        f'{{"content":{canonical(turn["content"])},"role":"{turn["role"]}"}}' if len(turn) == 2 else canonical(turn)
        for turn in messages
    ]
    return f"[{','.join(turns)}]"


def joined(fields: dict[str, bytes]) -> bytes:
    """Canonical JSON of an object whose values are JSON already."""
    return b"{%s}" % b",".join([b'"%s":%s' % (name.encode(), fields[name]) for name in sorted(fields)])


def line_of(place: str, group: bytes, source: int, fields: dict[str, bytes]) -> bytes:
    """The line of a row in canonical JSON. fields: its content, {field: JSON}."""
    identity = {"group": b'"%s"' % group[:8].hex().encode(), "id": canonical(place).encode(), "source": b"%d" % source}
    return joined(identity | fields) + b"\n"
