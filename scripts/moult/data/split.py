"""Three parts of a dataset: train; val, on which the checkpoint is chosen; test, on which the result is measured.

Whole groups go to a part, by the draw of their hash, in [0, 1). test takes the lowest draws and val the highest ones, so a
changed size of one moves no row of the other, and train has what is between them.

A size that is a share is a threshold on the draw: a group is in test if its draw is below test_size, and in val if its
distance from 1 is below val_size. No other row takes part in that, so rows that are added move no old row. There is one
exception, for datasets so small that no draw is below the threshold: the group nearest to the end is taken then, and gives its
place to a new group that is nearer.

A size that is a number takes groups from its end until it has so many rows. Groups of more rows than that are passed over. New
rows take places, so old rows only move towards train.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moult.data.ledger import Ledger
from moult.errors import MoultError

if TYPE_CHECKING:  # it imports numpy
    import numpy as np

    from moult.data.records import Rows

# A test part of fewer groups is not split off. What so few show is chance: 20 groups do not even see that the pass rate rises
# by 30 points (moult.measuring.power).
FEWEST_GROUPS = 20

# What the two parts are called in messages.
LONG = {"train": "training", "val": "validation", "test": "test"}


@dataclass
class Parts:
    """Three parts that share no row and no group.

    test: None if val measures the result too; `reason` then says why.
    thresholds: {"val", "test": the share that gives the same part, or None}: of a part that was not split off, of one whose
        number of rows no share gives, and of a test part that is None.
    """

    train: "Rows"
    val: "Rows"
    test: "Rows | None"
    reason: str | None
    thresholds: dict[str, float | None]

    @property
    def measured_on(self) -> str:
        return "val" if self.test is None else "test"


def split(rows: "Rows", given: dict[str, "Rows"], sizes: dict[str, float | None]) -> Parts:
    """Split rows that share nothing with the given parts.

    Args:
        given: the parts "val" and "test" that have a source of their own.
        sizes: of "val" and "test": a share below 1, or a number of rows. None for test: there is none.

    Raises MoultError if there are too few groups.
    """
    import numpy as np

    thresholds: dict[str, float | None] = {"val": None, "test": None}
    test, reason = given.get("test"), None
    asked = [(part, sizes[part]) for part in ("test", "val") if part not in given]
    wanted = {part: size for part, size in asked if size is not None}
    if test is None and "test" not in wanted:
        reason = "datasets.<name>.test_size is null"
    if not rows or not wanted:
        return Parts(rows, given.get("val", rows), test, reason, thresholds)
    if sum(wanted.values()) >= 1 and max(wanted.values()) < 1:
        raise MoultError(
            f"val_size {sizes['val']:g} and test_size {sizes['test']:g} leave no training rows",
            "lower datasets.<name>.val_size or test_size",
        )
    group, counts, order = rows.groups()
    draws = rows.records["split"][np.unique(group, return_index=True)[1]]
    is_free: np.ndarray = np.ones(len(counts), bool)
    taken = {}
    for part, size in wanted.items():
        ends = (order, draws) if part == "test" else (order[::-1], 1 - draws)
        chosen, thresholds[part] = _from_an_end(*ends, counts, is_free, size)
        taken[part] = chosen
        is_free &= ~chosen
    if "test" in taken and taken["test"].sum() < FEWEST_GROUPS:
        few, thresholds["test"] = taken.pop("test"), None
        reason = (
            f"a test part would have {_groups(few.sum())} of rows, and fewer than {FEWEST_GROUPS} measure too little"
        )
        if "val" in taken:
            taken["val"] |= few  # and not train: when the dataset grows, no training row becomes a test row
            thresholds["val"] = None
        else:
            is_free |= few
    parts = {part: rows.take(chosen[group]) for part, chosen in taken.items()}
    train = rows.take(is_free[group])
    if not train or not all(len(part) for part in parts.values()):
        raise MoultError(
            f"{len(rows):,} rows in {_groups(len(counts))} cannot be split into {' and '.join(['train', *parts])}",
            "set datasets.<name>.val_size, test_size, val_source, test_source, or columns.group (rows with the same prompt "
            "are one group)",
        )
    val = given["val"] if "val" in given else parts["val"]
    return Parts(train, val, parts.get("test", test), reason, thresholds)


def _groups(count: int) -> str:
    return f"{count:,} group{'' if count == 1 else 's'}"


def _from_an_end(
    order: "np.ndarray", distance: "np.ndarray", counts: "np.ndarray", is_free: "np.ndarray", size: float
) -> tuple["np.ndarray", float | None]:
    """(mask of the groups of a part, the share that gives the same groups or None).

    Args:
        order: the groups from the part's end on. distance: of each group from that end.
        counts: rows of each group. is_free: whether another part has left it.
    """
    import numpy as np

    chosen: np.ndarray = np.zeros(len(counts), bool)
    free = order[is_free[order]]
    if size < 1:
        chosen[free[distance[free] < size]] = True
        chosen[free[:1]] = True  # the part is not empty,
        chosen[free[-1:]] = False  # and neither is train
        return chosen, size
    fits = counts[free] <= size
    before = np.cumsum(counts[free] * fits) - counts[free]
    chosen[free[fits & (before < size)]] = True
    last = int(np.flatnonzero(chosen[free]).max(initial=-1))
    if not fits[: last + 1].all() or not 0 <= last < len(free) - 1:
        return chosen, None
    return chosen, _between(distance[free[last]], distance[free[last + 1]])


def _between(low: float, high: float) -> float | None:
    """The shortest decimal x with low < x <= high, or None if there is none."""
    for digits in range(1, 18):
        number = float(f"{high:.{digits}f}")
        number = number if number <= high else round(number - 10**-digits, digits)
        if low < number <= high and number < 1:
            return number
    return None


def tell_parts(parts: Parts, sizes: dict[str, float | None], given: dict[str, "Rows"], log) -> None:
    """Warn where the parts are not what they were asked to be."""
    if parts.reason and sizes["test"] is not None:
        log.warning("no test part: val chooses the checkpoint and measures the result (%s)", parts.reason)
    made = {name: part for name, part in parts_of(parts).items() if name not in given}
    total = sum(map(len, made.values()))
    for name, part in made.items():
        size = sizes.get(name)
        if size is None or size >= 1:
            continue
        largest = int(part.groups()[1].max())
        if largest > 2 * max(size * total, 10):
            log.warning(
                "%s has %s of %s rows, and not a share of %g: one group has %s rows. Set another seed, or give the size as a "
                "number of rows: larger groups then stay in train",
                name,
                f"{len(part):,}",
                f"{total:,}",
                size,
                f"{largest:,}",
            )


def parts_of(parts: Parts) -> dict[str, "Rows"]:
    """The parts that there are, by name."""
    return {"train": parts.train, "val": parts.val} | ({"test": parts.test} if parts.test is not None else {})


def without(rows: "Rows", others: "Rows", reason: str, ledger: Ledger) -> "Rows":
    """The rows that share neither content nor group with others; the rest are counted as dropped."""
    shared = rows.is_in(others, "key") | rows.is_in(others, "group")
    ledger.drop_all(reason, rows.take(shared))
    return rows.take(~shared)


def check_overlap(parts: dict[str, "Rows"]) -> dict[str, int]:
    """How many rows and groups are in two parts: none, or the run stops."""
    names = list(parts)
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            one, two = parts[name], parts[other]
            rows, groups = (one.take(one.is_in(two, column)).count_of(column) for column in ("key", "group"))
            if rows or groups:
                raise MoultError(
                    f"{name} and {other} share {rows:,} rows and {groups:,} groups", "this is a bug in prepare"
                )
    return {"rows": 0, "groups": 0}
