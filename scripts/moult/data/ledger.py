"""Where each row that was read has gone, and what of a row has gone nowhere."""

from collections import Counter
from dataclasses import dataclass, field

from moult.data.fields import LeftOut

EXAMPLES = 5  # places that are told of each reason


@dataclass
class Ledger:
    """Counts of all rows, or of those of a chunk, which are added up in the order in which they were read.

    read: rows read. dropped: rows, by reason. examples: up to five places of each reason.
    turns_cut: turns behind a row's last answer. turns_empty: assistant turns that say nothing and are not trained.
    unused_columns, unused_keys: of how many rows a column, or a key of their messages, holds something and is not read.
    columns: all columns of all rows.
    """

    read: int = 0
    dropped: Counter = field(default_factory=Counter)
    turns_cut: int = 0
    turns_empty: int = 0
    unused_columns: Counter = field(default_factory=Counter)
    unused_keys: Counter = field(default_factory=Counter)
    columns: set[str] = field(default_factory=set)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, reason: str, place: str, message: str = "") -> None:
        self._add_dropped(reason, 1, [f"{place}: {printable(message)}" if message else place])

    def drop_all(self, reason: str, rows) -> None:
        """Count `rows` (moult.data.records.Rows) as dropped; the places of the first ones are looked up."""
        if len(rows):
            wanted = EXAMPLES - len(self.examples.get(reason, ()))
            self._add_dropped(reason, len(rows), [rows.place(index) for index in range(min(wanted, len(rows)))])

    def leave_out(self, left: LeftOut) -> None:
        """Count what of a row that is kept is not trained, or not used."""
        self.turns_cut += left.turns_cut
        self.turns_empty += left.turns_empty
        for name in left.columns:
            self.unused_columns[printable(name)] += 1
        for name in left.keys:
            self.unused_keys[printable(name)] += 1

    def add(self, other: "Ledger") -> None:
        self.read += other.read
        self.turns_cut += other.turns_cut
        self.turns_empty += other.turns_empty
        self.unused_columns += other.unused_columns
        self.unused_keys += other.unused_keys
        self.columns |= other.columns
        for reason, count in other.dropped.items():
            self._add_dropped(reason, count, other.examples[reason])

    def _add_dropped(self, reason: str, count: int, places: list[str]) -> None:
        self.dropped[reason] += count
        examples = self.examples.setdefault(reason, [])
        examples += places[: EXAMPLES - len(examples)]

    def entry(self) -> dict:
        """What metadata.json says of it."""
        return {
            "read": self.read,
            "dropped": dict(self.dropped),
            "kept": self.read - sum(self.dropped.values()),
            "turns_cut": self.turns_cut,
            "turns_empty": self.turns_empty,
            "unused_columns": self._shares(self.unused_columns),
            "unused_keys": self._shares(self.unused_keys),
            "examples": self.examples,
        }

    def _shares(self, counts: Counter) -> dict[str, dict]:
        return {name: {"rows": count, "share": round(count / self.read, 4)} for name, count in counts.items()}


def printable(text: str) -> str:
    """It may quote what is no text."""
    return text.encode(errors="backslashreplace").decode()
