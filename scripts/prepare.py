"""Make rows for training, validation and test out of a dataset, and account for each row that was read.

    python scripts/prepare.py --settings '{"sources": [{"path": "data.jsonl", ...}], ...}' \\
        --train results/prepared/demo/train.jsonl --val results/prepared/demo/val.jsonl \\
        --test results/prepared/demo/test.jsonl --metadata results/prepared/demo/metadata.json

First stage after fetch; needs no model. In this order: read -> normalise to one shape -> drop broken and empty rows ->
drop exact duplicates -> language filter -> sample -> find near copies -> split by group -> check that the parts share nothing ->
repeat by weight. Weights come last: a row repeated before the split would land in several parts. Same input and seed, same bytes.

A checkpoint is chosen on val, and the result is measured on test. Without a test part (moult/data/split.py), test.jsonl holds the
rows of val.

Rows are not held in memory. The first pass over the sources, in all processes, normalises each row, writes its finished line
to a temporary file (about as large as the output), and keeps a small record of it. What follows is decided on the records.
The second pass copies the lines of the rows that stay. So a row is parsed once, and a source that changes meanwhile does no harm.
"""

import itertools
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from moult.data.first_pass import first_pass, set_first_pass
from moult.data.language import UNKNOWN, detector, languages_of, spoken_texts
from moult.data.ledger import Ledger
from moult.data.near_duplicates import is_near_copy, join_groups
from moult.data.readers import chunks_in, expand, read_chunks
from moult.data.split import LONG, check_overlap, parts_of, split, tell_parts, without
from moult.errors import MoultError, some
from moult.files import atomic_file, read_json, sha256_file, temporary_file, write_json
from moult.parallel import ordered_stream
from moult.run.cli import stage_parser
from moult.run.console import progress
from moult.run.stage import stage

if TYPE_CHECKING:  # it imports numpy
    from moult.data.records import Rows

# From this number of rows on, the exact language detector takes more than a minute or two (3 ms a row).
MANY_ROWS = 50_000

# The parts besides train, which can have sources of their own.
PARTS = ("test", "val")


def main() -> None:
    parser = stage_parser(__doc__, "prepare", threads="processes")
    parser.add_argument("--train", required=True, help="training rows to write (.jsonl)")
    parser.add_argument("--val", required=True, help="validation rows to write (.jsonl)")
    parser.add_argument("--test", required=True, help="test rows to write (.jsonl)")
    parser.add_argument("--metadata", required=True, help="the ledger to write (.json)")
    args = parser.parse_args()

    with stage("prepare", args.log_file, args.settings) as log:
        prepare(args.settings, args, log)


def prepare(settings: dict, args, log) -> None:
    with temporary_file(args.train) as lines, temporary_file(args.train) as signatures:
        _prepare(settings, args, log, Spool(lines, signatures))


@dataclass
class Spool:
    """What the first pass leaves of all rows: their lines, their signatures, and how many they are."""

    lines: BinaryIO
    signatures: BinaryIO
    rows: int = 0


def _prepare(settings: dict, args, log, spool: Spool) -> None:
    ledger = Ledger()
    rows, files = read(settings["sources"], settings, spool, args.threads, ledger)
    log.debug("read %s rows from %s", f"{ledger.read:,}", some([file["path"] for file in files], 3))
    stop_at_broken_rows(ledger, settings["broken"])
    check_columns(settings, ledger)
    tell_left_out(ledger, log)
    rows = without_duplicates(rows, ledger)
    sample = None if settings["sample_size"] == "full" else settings["sample_size"]
    settings = {**settings, "language_detector": choose_detector(settings, len(rows) if sample is None else sample)}
    given, ledgers, given_files = {}, {}, {}
    for part in PARTS:
        if settings[f"{part}_sources"]:
            ledgers[part] = Ledger()
            given[part], given_files[part] = read_given(part, settings, args, log, spool, ledgers[part])
    rows = in_languages(rows, settings, args.threads, sample, ledger)
    alike = None
    if settings["near_duplicates"] != "ignore":
        rows, given, alike = without_near_copies(rows, given, settings["near_duplicates"], spool, ledger, ledgers)
        tell_alike(alike, len(rows), log)
    if len(given) == 2:
        given["val"] = without(given["val"], given["test"], "in_test", ledgers["val"])
    for part in given:
        rows = without(rows, given[part], f"in_{part}", ledger)
    sizes = {part: settings[f"{part}_size"] for part in PARTS}
    parts = split(rows, given, sizes)
    apart = parts_of(parts)
    check_ledger(ledger, sum(len(rows) for part, rows in apart.items() if part not in given))
    for part in given:
        check_ledger(ledgers[part], len(apart[part]))
    check_not_empty(apart, {part: ledgers.get(part, ledger) for part in apart})
    overlap = check_overlap(apart)
    tell_parts(parts, sizes, given, log)
    train_rows = parts.train
    times = train_rows.times([source["weight"] for source in settings["sources"]])
    if not times.any():
        raise MoultError(
            f"the weights leave none of {len(train_rows):,} training rows", "raise datasets.<name>.source weight"
        )

    weighting = {"repeated": int((times - 1).clip(0).sum()), "left_out_by_weight": int((times == 0).sum())}
    written = {part: summary(rows, rows.once()) for part, rows in apart.items()}
    written["train"] = summary(train_rows, times) | weighting
    write_lines(args.train, train_rows, times)
    for part in PARTS:
        rows = apart.get(part, parts.val)
        write_lines(getattr(args, part), rows, rows.once())
    write_json(
        args.metadata,
        {
            "schema_version": 1,
            "sources": files,
            "ledger": ledger.entry(),
            **{f"{part}_sources": given_files.get(part, []) for part in PARTS},
            **{f"{part}_ledger": ledgers[part].entry() if part in ledgers else None for part in PARTS},
            **{part: written.get(part) for part in ("train", *PARTS)},
            "measured_on": parts.measured_on,
            "no_test_part_because": parts.reason,
            "thresholds": parts.thresholds,
            "language_detector": settings["language_detector"] if settings["languages"] else None,
            "near_duplicates": alike,
            "overlap": overlap,
            "seed": settings["seed"],
        },
    )
    counted = some([f"{summary['written']:,} {part}" for part, summary in written.items()])
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(ledger.dropped.items()))
    log.info("%s rows; dropped: %s", counted, dropped or "none")


# --- reading ----------------------------------------------------------------------------------------------------------


def read(sources: list[dict], settings: dict, spool: Spool, workers: int, ledger: Ledger) -> tuple["Rows", list]:
    """All rows that can be training rows, and the files that they came from with their hashes.

    Their finished lines and their signatures are added to the spool.
    """
    from moult.data.records import Rows

    files = files_of(sources, settings["split"])
    sizes = [Path(file["path"]).stat().st_size for file in files]
    before = list(itertools.accumulate(sizes, initial=0))
    workers = min(workers, chunks_in(before[-1]))
    names = names_of(files)
    start = spool.lines.seek(0, os.SEEK_END)
    records = []
    chunks = (
        (index, chunk)
        for index, file in enumerate(files)
        for chunk in read_chunks(Path(file["path"]), names[index], settings["max_rows"])
    )
    setup = (sources, files, names, settings)
    with progress(max(1, before[-1] >> 20), "MB read") as bar:
        for part in ordered_stream(first_pass, chunks, workers, "rows", set_first_pass, setup):
            file = files[part.file]
            file["rows"] += part.ledger.read
            for name in part.formats:
                file["format"] = name if file["format"] in (None, name) else "mixed"
            ledger.add(part.ledger)
            spool.lines.write(part.lines)
            spool.signatures.write(part.signatures)
            records.append(part.records)
            bar.update(((before[part.file] + part.end) >> 20) - bar.done, f"{ledger.read:,} rows")
    if ledger.read == 0:
        raise MoultError(
            f"{some([file['path'] for file in files])}: no rows",
            "the files are empty; check datasets.<name>.source, val_source or test_source",
        )
    rows = Rows.of(records, spool.lines, start, spool.rows)
    spool.rows += len(rows)
    return rows, files


def read_given(part: str, settings: dict, args, log, spool: Spool, ledger: Ledger) -> tuple["Rows", list]:
    """The rows of a part that has a source of its own, and their files."""
    rows, files = read(settings[f"{part}_sources"], settings, spool, args.threads, ledger)
    stop_at_broken_rows(ledger, settings["broken"])
    tell_left_out(ledger, log, f"{part}_source: ")
    return in_languages(without_duplicates(rows, ledger), settings, args.threads, None, ledger), files


def files_of(sources: list[dict], split: str) -> list[dict]:
    """What metadata.json says of each file, its rows not counted yet."""
    files = []
    for index, source in enumerate(sources):
        hub = {}
        if "hub" in source:  # fetch_dataset writes beside the rows what they are
            hub = {"hub": source["hub"], "commit": read_json(Path(source["path"]).with_suffix(".json"))["commit"]}
        for path in expand(source["path"], split):
            files.append({"path": str(path), "source": index, **hub, "rows": 0, "format": None})
    for file in progress.over(files, "files: hash"):
        file["sha256"] = sha256_file(file["path"])
    return files


def names_of(files: list[dict]) -> list[str]:
    """What each file is called in places. Ids must be distinct, so files of the same name go by their path."""
    names = Counter(Path(file["path"]).name for file in files)
    paths = Counter(file["path"] for file in files)
    found = []
    for file in files:
        name = Path(file["path"]).name
        name = name if names[name] == 1 else file["path"]
        # One file may be read twice, both ways.
        found.append(name if paths[file["path"]] == 1 else f"{name} (source {file['source']})")
    return found


def stop_at_broken_rows(ledger: Ledger, policy: str) -> None:
    broken = {reason: count for reason, count in ledger.dropped.items() if reason != "empty"}
    if broken and policy == "error":
        examples = "\n    ".join(text for reason in broken for text in ledger.examples[reason])
        raise MoultError(
            f"{sum(broken.values()):,} of {ledger.read:,} rows cannot be training rows:\n    {examples}",
            "fix them, map the columns (datasets.<name>.columns), or set datasets.<name>.broken: drop",
        )


def check_columns(settings: dict, ledger: Ledger) -> None:
    """A mapped column that no row has is a typo: a wrong `group` would let copies of a text into several parts."""
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


def without_duplicates(rows: "Rows", ledger: Ledger) -> "Rows":
    """The first row of each content. A copy in another source counts as well."""
    is_first = rows.is_first("key")
    ledger.drop_all("duplicate", rows.take(~is_first))
    return rows.take(is_first)


def without_near_copies(
    rows: "Rows", given: dict, policy: str, spool: Spool, ledger: Ledger, ledgers: dict
) -> tuple["Rows", dict, dict]:
    """(rows and the given parts, in which near copies have one group; what metadata.json says of them).

    With the policy `drop`, of near copies in one part only the first is left.
    """
    import numpy as np

    parts, counts = {"train": rows, **given}, {"train": ledger, **ledgers}
    if policy == "drop":
        for part, of_part in parts.items():
            is_copy = is_near_copy(of_part, spool.signatures)
            counts[part].drop_all("near_duplicate", of_part.take(is_copy))
            parts[part] = of_part.take(~is_copy)
    together = replace(rows, records=np.concatenate([part.records for part in parts.values()]))
    alike = join_groups(together, spool.signatures)
    at = 0
    for of_part in parts.values():
        of_part.records = together.records[at : at + len(of_part)]
        at += len(of_part)
    return parts.pop("train"), parts, {"policy": policy, **alike}


def tell_alike(alike: dict, rows: int, log) -> None:
    if alike["rows"]:
        log.info(
            "near copies: %s rows form %s groups, the largest of %s rows",
            *(f"{alike[name]:,}" for name in ("rows", "groups", "largest")),
        )
    if alike["left_apart"]:
        log.warning(
            "%s of %s rows are near copies of each other, as are rows made from a template. They are too many, so they are "
            "neither kept in one part nor dropped: give them a group (datasets.<name>.columns.group), or set near_duplicates: "
            "ignore",
            f"{alike['left_apart']:,}",
            f"{rows:,}",
        )


def choose_detector(settings: dict, wanted: int) -> str:
    """The language detector of the config; of `auto` the more exact one, or the fast one where many rows are wanted."""
    if settings["language_detector"] != "auto":
        return settings["language_detector"]
    return "langdetect" if wanted < MANY_ROWS else "py3langid"


def in_languages(rows: "Rows", settings: dict, workers: int, sample: int | None, ledger: Ledger) -> "Rows":
    """The rows in the wanted languages; at most `sample` of them, drawn by hash, in the order in which they were read.

    Rows are looked at in the drawn order until there are enough, so a small sample of a large dataset is cheap.
    """
    import numpy as np

    if sample is None and not settings["languages"]:
        return rows
    order = np.arange(len(rows)) if sample is None else rows.drawn()
    enough = len(rows) if sample is None else sample
    if not settings["languages"]:
        ledger.drop_all("not_sampled", rows.take(order[enough:]))
        return rows.take(np.sort(order[:enough]))
    kept, codes = array("q"), array("q")
    names = {"": 0}
    start = 0
    while start < len(order) and len(kept) < enough:
        part = order[start : start + max(enough - len(kept), 512)]
        start += len(part)
        for index, language in zip(part, languages_in(rows, part, settings, workers), strict=True):
            if not wanted(language, settings):
                ledger.drop_all(f"language_{language}", rows.take([index]))
            elif len(kept) < enough:
                kept.append(index)
                codes.append(names.setdefault(language, len(names)))
            else:
                ledger.drop_all("not_sampled", rows.take([index]))
    ledger.drop_all("not_sampled", rows.take(order[start:]))
    in_order = np.argsort(kept)
    found = rows.take(np.array(kept)[in_order])
    found.records["language"] = np.array(codes)[in_order]
    found.languages = list(names)
    return found


def languages_in(rows: "Rows", which, settings: dict, workers: int) -> Iterator[str]:
    """The language of each of the rows at the indices `which`, or languages: "en+zh"."""
    batches = [which[start : start + BATCH] for start in range(0, len(which), BATCH)]
    lines = ([rows.line(index) for index in batch] for batch in batches)
    what = "rows: language"
    setup = (settings["language_detector"],)
    with progress(len(which), what) as bar:
        for found in ordered_stream(languages_of_lines, lines, min(workers, len(batches)), what, set_detector, setup):
            yield from found
            bar.update(len(found))


BATCH = 256  # rows


def set_detector(name: str) -> None:
    global _detect

    _detect = detector(name)


def languages_of_lines(lines: list[bytes]) -> list[str]:
    return ["+".join(languages_of(spoken_texts(json.loads(line)), _detect)) for line in lines]


def wanted(language: str, settings: dict) -> bool:
    """Whether all of a row's languages are wanted ones."""
    allowed = set(settings["languages"]) | ({UNKNOWN} if settings["unknown_language"] == "keep" else set())
    return set(language.split("+")) <= allowed


# --- checks -----------------------------------------------------------------------------------------------------------


def check_ledger(ledger: Ledger, kept: int) -> None:
    dropped = sum(ledger.dropped.values())
    if ledger.read != kept + dropped:
        raise MoultError(
            f"the ledger does not add up: read {ledger.read:,}, kept {kept:,}, dropped {dropped:,}",
            "this is a bug in prepare",
        )


def check_not_empty(parts: dict[str, "Rows"], ledgers: dict[str, Ledger]) -> None:
    """`ledgers`: of each part, that of the rows which it comes from."""
    for name, rows in parts.items():
        if not rows:
            counts = ledgers[name]
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.dropped.most_common())
            shown = [examples[0] for examples in counts.examples.values() if ": " in examples[0]]
            hint = (
                "loosen the filter that took them: datasets.<name>.languages, sample_size, val_size, test_size, broken"
            )
            if given := [part for part in PARTS if counts.dropped[f"in_{part}"]]:
                hint = (
                    f"give datasets.<name>.{' and '.join(f'{part}_source' for part in given)} other rows than the rest"
                )
            raise MoultError(
                "\n    ".join(
                    [f"no {LONG[name]} row is left of {counts.read:,} (dropped: {reasons or 'none'})", *shown]
                ),
                hint,
            )


# --- writing ----------------------------------------------------------------------------------------------------------


def summary(rows: "Rows", times) -> dict:
    """What metadata.json says of a part whose rows are written so many `times` each."""
    languages = rows.counts("language")
    return {
        "rows": len(rows),
        "groups": rows.count_of("group"),
        "written": int(times.sum()),
        "by_source": {str(source): count for source, count in rows.counts("source").items()},
        "by_language": {rows.languages[code]: count for code, count in languages.items() if code},
    }


def write_lines(path: str, rows: "Rows", times) -> None:
    with (
        atomic_file(path) as partial,
        partial.open("wb") as file,
        progress(len(rows), f"{Path(path).stem} rows written") as bar,
    ):
        for count, lines in rows.finished(times):
            file.write(lines)
            bar.update(count)


if __name__ == "__main__":
    main()
