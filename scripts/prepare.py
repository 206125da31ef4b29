"""Make training and validation rows out of a dataset, and account for each row that was read.

    python scripts/prepare.py --settings '{"sources": [{"path": "data.jsonl", ...}], ...}' \\
        --train results/prepared/demo/train.jsonl --val results/prepared/demo/val.jsonl \\
        --metadata results/prepared/demo/metadata.json

First stage after fetch; needs no model. In this order: read -> normalise to one shape -> drop broken and empty rows ->
drop exact duplicates -> language filter -> sample -> split by group -> check that train and val share nothing -> repeat
by weight. Weights come last: a row repeated before the split would land on both sides. Same input and seed, same bytes.
"""

import itertools
import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from moult.data.conversation import content_of, find_format, normalise
from moult.data.fields import BadRow, LeftOut, value_of
from moult.data.language import UNKNOWN, detector, languages_of, spoken_texts
from moult.data.readers import expand, read_rows
from moult.errors import MoultError, some
from moult.files import canonical, read_json, sha256_file, sha256_text, write_json, write_jsonl
from moult.parallel import ordered_map
from moult.run.cli import stage_parser
from moult.run.console import progress
from moult.run.stage import stage


@dataclass
class Row:
    """One row on its way. `content` is its canonical JSON, `key` the hash of that."""

    place: str
    source: int
    content: str
    key: str
    group: str
    language: str = ""


@dataclass
class Ledger:
    """Where each row that was read has gone, and what of a row has gone nowhere.

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
        self.dropped[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < 5:
            examples.append(f"{place}: {printable(message)}" if message else place)

    def leave_out(self, left: LeftOut) -> None:
        """Count what of a row that is kept is not trained, or not used."""
        self.turns_cut += left.turns_cut
        self.turns_empty += left.turns_empty
        self.unused_columns.update(map(printable, left.columns))
        self.unused_keys.update(map(printable, left.keys))


def printable(text: str) -> str:
    """It may quote what is no text."""
    return text.encode(errors="backslashreplace").decode()


def main() -> None:
    parser = stage_parser(__doc__, "prepare", threads="processes for language detection")
    parser.add_argument("--train", required=True, help="training rows to write (.jsonl)")
    parser.add_argument("--val", required=True, help="validation rows to write (.jsonl)")
    parser.add_argument("--metadata", required=True, help="the ledger to write (.json)")
    args = parser.parse_args()

    with stage("prepare", args.log_file, args.settings) as log:
        prepare(args.settings, args, log)


def prepare(settings: dict, args, log) -> None:
    ledger = Ledger()
    rows, files = read(settings["sources"], settings, ledger)
    log.debug("read %s rows from %s", f"{ledger.read:,}", some([file["path"] for file in files], 3))
    stop_at_broken_rows(ledger, settings["broken"])
    check_columns(settings, ledger)
    tell_left_out(ledger, log)
    rows = without_duplicates(rows, ledger)
    val_rows, val_ledger, val_files = None, None, []
    if settings["val_sources"]:
        val_ledger = Ledger()
        val_rows, val_files = read(settings["val_sources"], settings, val_ledger)
        stop_at_broken_rows(val_ledger, settings["broken"])
        tell_left_out(val_ledger, log, "val_source: ")
        val_rows = without_duplicates(val_rows, val_ledger)
        val_rows = in_languages(val_rows, settings, args.threads, None, val_ledger)
    sample = None if settings["sample_size"] == "full" else settings["sample_size"]
    rows = in_languages(rows, settings, args.threads, sample, ledger)
    if val_rows is None:
        train_rows, val_rows = split(rows, settings["val_size"], settings["seed"])
    else:
        train_rows = without_val_rows(rows, val_rows, ledger)
    check_ledger(ledger, len(train_rows) + (0 if val_ledger else len(val_rows)))
    if val_ledger:
        check_ledger(val_ledger, len(val_rows))
    check_not_empty(train_rows, val_rows, ledger, val_ledger)
    overlap = check_overlap(train_rows, val_rows)
    weights = [source["weight"] for source in settings["sources"]]
    train_lines, weighting = weighted(train_rows, weights, settings["seed"])
    if not train_lines:
        raise MoultError(
            f"the weights leave none of {len(train_rows):,} training rows", "raise datasets.<name>.source weight"
        )

    write_jsonl(args.train, train_lines)
    write_jsonl(args.val, (line(row) for row in val_rows))
    write_json(
        args.metadata,
        {
            "schema_version": 1,
            "sources": files,
            "val_sources": val_files,
            "ledger": entry(ledger),
            "val_ledger": entry(val_ledger) if val_ledger else None,
            "train": summary(train_rows, written=len(train_lines), **weighting),
            "val": summary(val_rows, written=len(val_rows)),
            "overlap": overlap,
            "seed": settings["seed"],
        },
    )
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(ledger.dropped.items()))
    log.info(
        "%s train and %s val rows; dropped: %s",
        f"{len(train_lines):,}",
        f"{len(val_rows):,}",
        dropped or "none",
    )


# --- reading ----------------------------------------------------------------------------------------------------------


def read(sources: list[dict], settings: dict, ledger: Ledger) -> tuple[list[Row], list[dict]]:
    """All rows that can be training rows, and the files that they came from with their hashes."""
    files = []
    for index, source in enumerate(sources):
        hub = {}
        if "hub" in source:  # fetch_dataset writes beside the rows what they are
            hub = {"hub": source["hub"], "commit": read_json(Path(source["path"]).with_suffix(".json"))["commit"]}
        for path in expand(source["path"], settings["split"]):
            facts = {"path": str(path), "source": index, "sha256": sha256_file(path), **hub}
            files.append({**facts, "rows": 0, "format": None})
    names = Counter(Path(file["path"]).name for file in files)
    paths = Counter(file["path"] for file in files)
    rows: list[Row] = []
    for file in progress.over(files, "files"):
        name = Path(file["path"]).name
        # Ids must be distinct, so files of the same name go by their path; one file may be read twice, both ways.
        name = name if names[name] == 1 else file["path"]
        name = name if paths[file["path"]] == 1 else f"{name} (source {file['source']})"
        source = sources[file["source"]]
        for place, raw in itertools.islice(read_rows(Path(file["path"]), name), settings["max_rows"]):
            ledger.read += 1
            ledger.columns |= raw.keys()
            file["rows"] += 1
            row = to_row(place, raw, source, file, ledger)
            if row is not None:
                rows.append(row)
    if ledger.read == 0:
        raise MoultError(
            f"{some([file['path'] for file in files])}: no rows",
            "the files are empty; check datasets.<name>.source",
        )
    return rows, files


def to_row(place: str, raw: dict, source: dict, file: dict, ledger: Ledger) -> Row | None:
    """The row in the one shape, or None, counted in the ledger, if it cannot be a training row."""
    columns = source["columns"]
    try:
        format_name = find_format(raw, columns, source["format"])
        row, left = normalise(raw, columns, format_name)
        content = content_of(row)
    except BadRow as bad:
        ledger.drop(bad.reason, place, str(bad))
        return None
    file["format"] = format_name if file["format"] in (None, format_name) else "mixed"
    group_column = columns.get("group", "group")
    group = value_of(raw.get(group_column))
    left.columns.discard(group_column)
    ledger.leave_out(left)
    # pandas writes NaN for a missing number. A number and the same digits as text are one group.
    group = prompt_of(row) if group is None or group != group else ascii(str(group))
    return Row(place, file["source"], content, sha256_text(content), sha256_text(canonical(group)))


def prompt_of(row: dict):
    """What makes rows belong together where no group is given: everything before the first answer to the user."""
    if "text" in row:
        return row["text"]
    roles = [message["role"] for message in row["messages"]]
    first = roles.index("assistant", roles.index("user") if "user" in roles else 0)
    return [message["content"] for message in row["messages"][:first]]


def stop_at_broken_rows(ledger: Ledger, policy: str) -> None:
    broken = {reason: count for reason, count in ledger.dropped.items() if reason != "empty"}
    if broken and policy == "error":
        examples = "\n    ".join(text for reason in broken for text in ledger.examples[reason])
        raise MoultError(
            f"{sum(broken.values()):,} of {ledger.read:,} rows cannot be training rows:\n    {examples}",
            "fix them, map the columns (datasets.<name>.columns), or set datasets.<name>.broken: drop",
        )


def check_columns(settings: dict, ledger: Ledger) -> None:
    """A mapped column that no row has is a typo: a wrong `group` would let copies of a text into both parts."""
    mapped = {pair for source in settings["sources"] for pair in source["columns"].items() if pair[1] is not None}
    absent = sorted(f"{column}: {real}" for column, real in mapped if real not in ledger.columns)
    if absent and settings["max_rows"] is None:
        raise MoultError(
            f"no row has the mapped columns {{{some(absent)}}}; the columns are {some(sorted(ledger.columns), 12)}",
            "fix datasets.<name>.columns",
        )


def tell_left_out(ledger: Ledger, log, of: str = "") -> None:
    """What rows hold that training will not see: a column of another name may be the one that matters."""
    for kind, counts in (("columns", ledger.unused_columns), ("keys", ledger.unused_keys)):
        if counts:
            most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
            found = [f"{name} ({100 * count / ledger.read:.3g} % of the rows)" for name, count in most]
            log.info("%s%s that are not used: %s", of, kind, some(found, 8))
    if ledger.turns_empty:
        log.info("%s%s assistant turns say nothing and are not trained", of, f"{ledger.turns_empty:,}")


# --- choosing ---------------------------------------------------------------------------------------------------------


def without_duplicates(rows: list[Row], ledger: Ledger) -> list[Row]:
    """The first row of each content. A copy in another source counts as well."""
    seen: set[str] = set()
    kept = []
    for row in rows:
        if row.key in seen:
            ledger.drop("duplicate", row.place)
        else:
            seen.add(row.key)
            kept.append(row)
    return kept


def draw(seed: int, *what: str) -> float:
    """A number in [0, 1) that depends on nothing but the seed and the words: no order, no library, no version."""
    return int(sha256_text("\0".join([str(seed), *what]))[:16], 16) / 2**64


def in_languages(rows: list[Row], settings: dict, workers: int, sample: int | None, ledger: Ledger) -> list[Row]:
    """The rows in the wanted languages; at most `sample` of them, drawn by hash, in the order in which they were read.

    Rows are looked at in the drawn order until there are enough, so a small sample of a large dataset is cheap.
    """
    order = (
        list(rows)
        if sample is None
        else sorted(rows, key=lambda row: (draw(settings["seed"], "sample", row.key), row.place))
    )
    enough = len(order) if sample is None else sample
    kept: list[Row] = []
    start = 0
    while start < len(order) and len(kept) < enough:
        part = order[start : start + max(enough - len(kept), 512)]
        start += len(part)
        for row in with_language(part, settings, workers):
            if row.language and not wanted(row.language, settings):
                ledger.drop(f"language_{row.language}", row.place)
            elif len(kept) < enough:
                kept.append(row)
            else:
                ledger.drop("not_sampled", row.place)
    for row in order[start:]:
        ledger.drop("not_sampled", row.place)
    position = {row.place: index for index, row in enumerate(rows)}
    return sorted(kept, key=lambda row: position[row.place])


def with_language(rows: list[Row], settings: dict, workers: int) -> list[Row]:
    if settings["languages"]:
        contents = [row.content for row in rows]
        detector = settings["language_detector"]
        found = ordered_map(language_of, contents, workers, "rows: language", set_detector, (detector,))
        for row, language in zip(rows, found, strict=True):
            row.language = language
    return rows


def set_detector(name: str) -> None:
    global _detect

    _detect = detector(name)


def language_of(content: str) -> str:
    """The row's language, or languages: "en+zh"."""
    return "+".join(languages_of(spoken_texts(json.loads(content)), _detect))


def wanted(language: str, settings: dict) -> bool:
    """Whether all of a row's languages are wanted ones."""
    allowed = set(settings["languages"]) | ({UNKNOWN} if settings["unknown_language"] == "keep" else set())
    return set(language.split("+")) <= allowed


# --- splitting --------------------------------------------------------------------------------------------------------


def split(rows: list[Row], val_size: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(train, val): whole groups go to val in the order of their hashes until it has `val_size`, a share or a number.

    A group that would overshoot by more than val_size is left in train.
    """
    if not rows:
        return [], []
    target = max(1, round(val_size * len(rows))) if val_size < 1 else int(val_size)
    sizes = Counter(row.group for row in rows)
    chosen: set[str] = set()
    count = 0
    for group in sorted(sizes, key=lambda group: (draw(seed, "split", group), group)):
        if count >= target:
            break
        if count + sizes[group] <= max(target + target // 2, 1):
            chosen.add(group)
            count += sizes[group]
    train = [row for row in rows if row.group not in chosen]
    val = [row for row in rows if row.group in chosen]
    if not train or not val:
        raise MoultError(
            f"{len(rows):,} rows in {len(sizes):,} groups cannot be split into train and {target:,} val rows",
            "set datasets.<name>.val_size, val_source, or columns.group (rows with the same prompt are one group)",
        )
    return train, val


def without_val_rows(rows: list[Row], val_rows: list[Row], ledger: Ledger) -> list[Row]:
    """The training rows that share neither content nor group with a given validation set."""
    keys, groups = {row.key for row in val_rows}, {row.group for row in val_rows}
    kept = []
    for row in rows:
        if row.key in keys or row.group in groups:
            ledger.drop("in_val", row.place)
        else:
            kept.append(row)
    return kept


def check_ledger(ledger: Ledger, kept: int) -> None:
    dropped = sum(ledger.dropped.values())
    if ledger.read != kept + dropped:
        raise MoultError(
            f"the ledger does not add up: read {ledger.read:,}, kept {kept:,}, dropped {dropped:,}",
            "this is a bug in prepare",
        )


def check_not_empty(train: list[Row], val: list[Row], ledger: Ledger, val_ledger: Ledger | None) -> None:
    for name, rows, counts in (("training", train, ledger), ("validation", val, val_ledger or ledger)):
        if not rows:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.dropped.most_common())
            shown = [examples[0] for examples in counts.examples.values() if ": " in examples[0]]
            raise MoultError(
                "\n    ".join([f"no {name} row is left of {counts.read:,} (dropped: {reasons or 'none'})", *shown]),
                "loosen the filter that took them: datasets.<name>.languages, sample_size, val_size, broken",
            )


def check_overlap(train: list[Row], val: list[Row]) -> dict[str, int]:
    """How many rows and groups are on both sides: none, or the run stops."""
    rows = len({row.key for row in train} & {row.key for row in val})
    groups = len({row.group for row in train} & {row.group for row in val})
    if rows or groups:
        raise MoultError(f"train and val share {rows:,} rows and {groups:,} groups", "this is a bug in prepare")
    return {"rows": rows, "groups": groups}


# --- writing ----------------------------------------------------------------------------------------------------------


def weighted(rows: list[Row], weights: list[float], seed: int) -> tuple[list[dict], dict[str, int]]:
    """The training lines, each row as often as its source's weight says, and how many that added and left out."""
    lines: list[dict] = []
    repeated = left_out = 0
    for row in rows:
        weight = weights[row.source]
        times = math.floor(weight) + (draw(seed, "weight", row.key) < weight % 1)
        left_out += times == 0
        repeated += max(times - 1, 0)
        lines += [line(row, copy) for copy in range(times)]
    return lines, {"repeated": repeated, "left_out_by_weight": left_out}


def line(row: Row, copy: int = 0) -> dict:
    identity = {
        "id": f"{row.place}#{copy + 1}" if copy else row.place,
        "group": row.group[:16],
        "source": row.source,
    }
    language = {"language": row.language} if row.language else {}
    return {**identity, **language, **json.loads(row.content)}


def entry(ledger: Ledger) -> dict:
    return {
        "read": ledger.read,
        "dropped": dict(ledger.dropped),
        "kept": ledger.read - sum(ledger.dropped.values()),
        "turns_cut": ledger.turns_cut,
        "turns_empty": ledger.turns_empty,
        "unused_columns": shares(ledger.unused_columns, ledger.read),
        "unused_keys": shares(ledger.unused_keys, ledger.read),
        "examples": ledger.examples,
    }


def shares(counts: Counter, of: int) -> dict[str, dict]:
    return {name: {"rows": count, "share": round(count / of, 4)} for name, count in counts.items()}


def summary(rows: list[Row], written: int, **weighting: int) -> dict:
    return {
        "rows": len(rows),
        "groups": len({row.group for row in rows}),
        "written": written,
        "by_source": dict(Counter(str(row.source) for row in rows)),
        "by_language": dict(Counter(row.language for row in rows if row.language)),
        **weighting,
    }


if __name__ == "__main__":
    main()
