"""Look for the questions of the evaluation in the training rows of a dataset.

    python scripts/contamination.py --settings '{"prompts": ["What is ...?"], "benchmarks": {"gsm8k": 200}}' \\
        --train results/prepared/demo/train.jsonl --questions results/benchmarks/gsm8k.jsonl \\
        --report results/prepared/demo/contamination.json --rows results/prepared/demo/contaminated_rows.json

After prepare and fetch_benchmark. The questions are those of all runs of the dataset, so all of them share the result; each run
decides what becomes of what is found (eval.contamination). moult/data/contamination.py says what counts as found. --report lists
each question that was found, with its rows; --rows has the ids of all these rows, which encode leaves out with `drop`.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from moult.data.contamination import COVERAGE, GRAM, Questions, rows_told
from moult.data.portions import portion_count, portions
from moult.errors import some
from moult.files import read_jsonl, write_json
from moult.parallel import ordered_stream
from moult.run.cli import stage_parser
from moult.run.console import progress
from moult.run.stage import stage

SHOWN = 20  # rows that the report names for each question


def main() -> None:
    parser = stage_parser(__doc__, "contamination", threads="processes")
    parser.add_argument("--train", required=True, help="prepared training rows (.jsonl)")
    parser.add_argument("--questions", nargs="*", default=[], help="questions of benchmarks, by slug (<slug>.jsonl)")
    parser.add_argument("--report", required=True, help="output: what was found (.json)")
    parser.add_argument("--rows", required=True, help="output: the ids of the rows with a question (.json)")
    args = parser.parse_args()

    with stage("contamination", args.log_file, args.settings) as log:
        search(args.settings, args, log)


def search(settings: dict, args, log) -> None:
    items = [{"kind": "prompt", "question": prompt} for prompt in settings["prompts"]]
    for path in map(Path, args.questions):
        items += questions_in(path, settings["benchmarks"][path.stem])
    found: dict[int, dict] = {}
    rows: dict[str, None] = {}  # a row that a weight repeats is there several times
    searched = 0
    for id, shares in hits(Path(args.train), [item["question"] for item in items], args.threads):
        searched += 1
        if not shares or id in rows:
            continue
        rows[id] = None
        for number, share in shares.items():
            entry = found.setdefault(number, {**items[number], "coverage": 0.0, "row_count": 0, "rows": []})
            entry["coverage"] = max(entry["coverage"], round(share, 4))
            entry["row_count"] += 1
            entry["rows"] += [id] * (len(entry["rows"]) < SHOWN)
    looked_for: dict[str, int] = {}
    for item in items:
        name = item.get("benchmark", "prompts")
        looked_for[name] = looked_for.get(name, 0) + 1
    report = {
        "schema_version": 1,
        "words": GRAM,
        "coverage": COVERAGE,
        "looked_for": looked_for,
        "training_rows": searched,
        "contaminated_rows": rows_told(rows),
        "found": [found[number] for number in sorted(found)],
    }
    write_json(args.report, report)
    write_json(args.rows, sorted(rows))
    tell(report, list(rows), args.report, log)


def questions_in(path: Path, limit: int | None) -> Iterator[dict]:
    """Those that a run asks: the first `limit` of each task."""
    for item in read_jsonl(path):
        if limit is None or item["doc_id"] < limit:
            yield {"kind": "benchmark", "benchmark": path.stem, **item}


def hits(train: Path, questions: list[str], workers: int) -> Iterator[tuple[str, dict[int, float]]]:
    """(id, {question: share}) of each training row, in their order."""
    size = train.stat().st_size
    workers = min(workers, portion_count(train))
    with progress(max(1, size >> 10), "KB searched") as bar:
        for part, read in ordered_stream(
            search_lines, portions(train), workers, "training rows", set_questions, (questions,)
        ):
            yield from part
            bar.update(read >> 10)


def set_questions(questions: list[str]) -> None:
    global _questions

    _questions = Questions(questions)


def search_lines(lines: list[bytes]) -> tuple[list[tuple[str, dict[int, float]]], int]:
    """(what the rows have, how many bytes they are)."""
    rows = map(json.loads, lines)
    return [(row["id"], _questions.found_in(row)) for row in rows], sum(map(len, lines))


def tell(report: dict, rows: list[str], path: str, log) -> None:
    counts: dict[str, int] = {}
    for entry in report["found"]:
        name = entry.get("benchmark", "prompts")
        counts[name] = counts.get(name, 0) + 1
    said = ", ".join(f"{count:,} of {report['looked_for'][name]:,} {name}" for name, count in counts.items())
    if counts:
        log.warning(
            "%s: questions of the evaluation are in %s of %s training rows (%s): %s",
            said,
            f"{len(rows):,}",
            f"{report['training_rows']:,}",
            some(rows, 3),
            path,
        )
    else:
        total = sum(report["looked_for"].values())
        log.info("none of %s questions is in the %s training rows", f"{total:,}", f"{report['training_rows']:,}")


if __name__ == "__main__":
    main()
