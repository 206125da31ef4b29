"""Write the page of a run: the verdict, the answers, the training, what became of each row, and what made it.

    python scripts/report.py --run demo --results results/demo --settings '{...}' --ledger results/prepared/demo/metadata.json \\
        --tokens results/demo/tokens --rows results/prepared/demo/test.jsonl \\
        --base-likelihood results/demo/base/likelihood.jsonl --tuned-likelihood results/demo/tuned/likelihood.jsonl \\
        --out results/demo/report.html

It reads the JSON files that the stages wrote, and nothing else. What does not fit on a page (samples beyond the first, the rest
of long texts) is counted, and the file that holds it is named.
"""

import difflib
import re
from collections import defaultdict
from pathlib import Path

from moult.files import read_json, read_jsonl
from moult.measuring.exported import COLUMNS, rows_of_exports
from moult.measuring.measured import measured
from moult.measuring.table import ROWS, between_seeds, rows_of
from moult.measuring.verdict import POINTS
from moult.pages.page import duration, shown, write_page
from moult.run.cli import stage_parser
from moult.run.stage import stage

# So many samples are on the page: those that became worse first.
SAMPLES = 300
# A text of a sample is cut there, so that the page stays below 3 MB.
SAMPLE_TEXT = 1_000
EXAMPLE_TEXT = 4_000

OUTCOMES = {
    "worse": "got worse",
    "better": "got better",
    "changed": "changed but pass or fail as before",
    "same": "are the same",
}


def main() -> None:
    parser = stage_parser(__doc__, "report")
    parser.add_argument("--run", required=True, help="name of the run")
    parser.add_argument("--results", required=True, help="folder of the run")
    parser.add_argument("--ledger", required=True, help="metadata.json of prepare")
    parser.add_argument("--tokens", required=True, help="folder with report.json and preview.json")
    parser.add_argument("--rows", required=True, help="test.jsonl: the languages of the measured rows")
    parser.add_argument("--base-likelihood", required=True, help="likelihood.jsonl of evaluate_base")
    parser.add_argument("--tuned-likelihood", required=True, help="likelihood.jsonl of evaluate_tuned")
    parser.add_argument("--exports", nargs="*", default=[], help="export.json of each format that the config lists")
    parser.add_argument("--out", required=True, help="the page to write")
    args = parser.parse_args()

    with stage("report", args.log_file, args.settings) as log:
        write_report(args, log)


def write_report(args, log) -> None:
    from moult.pages.run_charts import curves, flow, forests, lengths

    folder, tokens = Path(args.results), Path(args.tokens)
    metrics, plan = read_json(folder / "metrics.json"), read_json(folder / "plan.json")
    adapter, ledger = read_json(folder / "adapter.json"), read_json(args.ledger)
    token_report = read_json(tokens / "report.json")
    steps = list(read_jsonl(folder / "training_log.jsonl"))
    samples, counts = samples_of(folder / "samples.jsonl")
    measures = measures_of(metrics)
    fates = fates_of(ledger, token_report)
    confidence = f"{100 * metrics['data']['confidence']:g} %"
    write_page(
        args.out,
        "report.html",
        run=args.run,
        metrics=metrics,
        verdict=metrics["verdict"],
        rows=ROWS[metrics["data"]["measured_on"]],
        confidence=confidence,
        forests=forests(measures, confidence),
        comparison=rows_of(metrics),
        seeds=between_seeds(metrics["seeds"]).split("\n"),
        samples=samples,
        counts=counts,
        outcomes=OUTCOMES,
        checks=sorted({name for sample in samples for name in sample["failed"]}),
        kinds=sorted({sample["kind"] for sample in samples}),
        curves=curves(steps, adapter),
        training=training_of(steps, adapter, plan),
        hardware=", ".join(f"{name} {value}" for name, value in adapter["hardware"].items()),
        flow=flow(fates),
        fates=fates,
        lengths=lengths(token_report),
        tokens=token_report,
        examples=[example_of(example) for example in read_json(tokens / "preview.json")],
        sources=sources_of(metrics, ledger),
        languages=languages_of(ledger, args.rows, args.base_likelihood, args.tuned_likelihood),
        predicted=predicted(plan, adapter),
        exports=rows_of_exports([read_json(path) for path in args.exports]),
        export_columns=COLUMNS,
        config=config_of(args.run, args.settings),
        folder=folder,
        target=folder / "metrics.json",
        files={"base": metrics["provenance"]["base"]["files"], "merged": metrics["provenance"]["merged_files"]},
    )
    log.info("%s: %s", args.out, metrics["verdict"]["verdict"])


# --- the verdict ------------------------------------------------------------------------------------------------------


def measures_of(metrics: dict) -> list[dict]:
    """What the forest plots show. Each measure but the rates has a plot of its own: they differ in size."""
    from moult.pages.run_charts import line

    return [
        line(name, POINTS if one["unit"] == POINTS else f"{one['unit']}, {name}", one)
        for name, one in measured(metrics).items()
    ]


# --- the answers ------------------------------------------------------------------------------------------------------


def samples_of(path: Path) -> tuple[list[dict], dict]:
    """The samples for the page, those that got worse first, and how many there are of each outcome."""
    counts = dict.fromkeys(OUTCOMES, 0)
    kept: dict[str, list[dict]] = {name: [] for name in OUTCOMES}
    for sample in read_jsonl(path):
        outcome = outcome_of(sample)
        counts[outcome] += 1
        if len(kept[outcome]) < SAMPLES:
            kept[outcome].append(sample)
    chosen = [(outcome, sample) for outcome, samples in kept.items() for sample in samples][:SAMPLES]
    return [sample_view(outcome, sample) for outcome, sample in chosen], counts


def outcome_of(sample: dict) -> str:
    before, after = (passes(sample[which]) for which in ("base", "tuned"))
    if before != after:
        return "better" if after else "worse"
    return "same" if sample["base"]["answer"] == sample["tuned"]["answer"] else "changed"


def passes(answer: dict) -> bool:
    return all(answer["checks"].values())


def sample_view(outcome: str, sample: dict) -> dict:
    reference = sample["reference"]
    base, tuned = (shown(sample[which]["answer"], SAMPLE_TEXT) for which in ("base", "tuned"))
    before, after = marked(base, tuned)
    return {
        "id": sample["id"],
        "kind": sample["kind"],
        "outcome": outcome,
        "prompt": shown(sample["prompt"], SAMPLE_TEXT),
        "reference": None if reference is None else shown(reference, SAMPLE_TEXT),
        "failed": [name for name, passed in sample["tuned"]["checks"].items() if not passed],
        "answers": [("base", before, sample["base"]), ("tuned", after, sample["tuned"])],
    }


def marked(base: str, tuned: str) -> tuple[list[tuple[bool, str]], list[tuple[bool, str]]]:
    """Both texts in pieces, each with whether the other text does not have it. Words are compared, not letters."""
    words = [re.findall(r"\s+|\w+|[^\w\s]", text) for text in (base, tuned)]
    before: list[tuple[bool, str]] = []
    after: list[tuple[bool, str]] = []
    for kind, i, j, k, n in difflib.SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        for pieces, part in ((before, words[0][i:j]), (after, words[1][k:n])):
            if part:
                pieces.append((kind != "equal", "".join(part)))
    return before, after


# --- the training -----------------------------------------------------------------------------------------------------


def training_of(steps: list[dict], adapter: dict, plan: dict) -> list[tuple[str, str]]:
    lora, train = adapter["settings"]["lora"], adapter["settings"]["train"]
    epoch = max((entry["epoch"] for entry in steps), default=0)
    targets = lora["target_modules"]
    return [
        ("published", f"step {adapter['step']:,} of {adapter['steps']:,} ({adapter['chosen']})"),
        ("ended", f"step {adapter['ended']['step']:,}, epoch {epoch:.2f}: {adapter['ended']['because']}"),
        ("batch", f"{plan['steps']['sequences_per_step']:,} sequences a step"),
        ("learning rate", f"{train['learning_rate']:g}, {train['lr_scheduler_type']}"),
        (
            "LoRA",
            f"r {lora['r']}, alpha {lora['lora_alpha']}, {targets if isinstance(targets, str) else ', '.join(targets)}",
        ),
        ("trained", f"{plan['parameters']['trainable']:,} of {plan['parameters']['base']:,} parameters"),
    ]


# --- the rows ---------------------------------------------------------------------------------------------------------


def fates_of(ledger: dict, tokens: dict) -> list[dict]:
    """From the rows that were read to the sequences that are trained: [{"what", "count", "kind"}]. kind: have, used or lost."""
    first = ledger["ledger"]
    fates = [{"what": "rows read", "count": first["read"], "kind": "have"}]
    fates += [
        {"what": reason.replace("_", " "), "count": -count, "kind": "lost"}
        for reason, count in first["dropped"].items()
    ]
    own_parts = [part for part in ("val", "test") if not ledger[f"{part}_ledger"]]
    fates += [
        {"what": f"{ROWS[part]} rows", "count": -ledger[part]["rows"], "kind": "used"}
        for part in own_parts
        if ledger[part]["rows"]
    ]
    train = ledger["train"]
    weights = train["repeated"] - train["left_out_by_weight"]
    left = first["kept"] - sum(ledger[part]["rows"] for part in own_parts)
    if other := train["written"] - weights - left:
        fates.append({"what": "sampling", "count": other, "kind": "lost"})
    if weights:
        fates.append({"what": "weights of sources", "count": weights, "kind": "lost" if weights < 0 else "used"})
    length, found = tokens["train"]["length"], tokens["train"]
    losses = {
        "in a test question (contamination)": tokens["contaminated_rows"]["count"],
        "over max_length": length["dropped"],
        "template refuses": sum(found["unrenderable"].values()),
    }
    fates += [{"what": name, "count": -count, "kind": "lost"} for name, count in losses.items() if count]
    rest = train["written"] - sum(losses.values())
    if more := found["sequences"] - rest:
        what, kind = ("sequences of rows with several", "used") if more > 0 else ("no token to train", "lost")
        fates.append({"what": what, "count": more, "kind": kind})
    return [*fates, {"what": "sequences trained", "count": found["sequences"], "kind": "have"}]


def example_of(example: dict) -> dict:
    """A sequence of the preview, in runs of tokens that are trained or not, cut where it is too long for a page."""
    runs: list[list] = []
    size = 0
    for place, (_, text, trained) in enumerate(example["tokens"]):
        if size > EXAMPLE_TEXT:
            runs.append([False, f" … ({len(example['tokens']) - place:,} more tokens)"])
            break
        size += len(text)
        if runs and runs[-1][0] == trained:
            runs[-1][1] += text
        else:
            runs.append([trained, text])
    return {"id": example["id"], "trained": example["trained"], "count": len(example["tokens"]), "runs": runs}


def sources_of(metrics: dict, ledger: dict) -> list[dict]:
    """Per source: rows read and trained, and the loss of base and tuned on its measured rows."""
    by_number = {int(name.split(":")[0]): figures for name, figures in metrics["by_source"].items()}
    return [
        {
            "path": source["path"],
            "read": source["rows"],
            "trained": ledger["train"]["by_source"].get(str(source["source"]), 0),
            "measured": by_number.get(source["source"]),
        }
        for source in ledger["sources"]
    ]


def languages_of(ledger: dict, rows: str, base: str, tuned: str) -> list[dict]:
    """Per language: the rows of each part, and nats per token of base and tuned on its measured rows."""
    parts = {part: ledger[part]["by_language"] for part in ("train", "val", "test")}
    language = {row["id"]: row["language"] for row in read_jsonl(rows)}
    sums: dict = defaultdict(lambda: {"base": 0.0, "tuned": 0.0, "tokens": 0})
    for before, after in zip(read_jsonl(base), read_jsonl(tuned), strict=True):
        total = sums[language.get(before["id"])]
        total["base"] += before["nll"]
        total["tuned"] += after["nll"]
        total["tokens"] += before["tokens"]
    found = []
    for name in sorted({*parts["train"], *parts["val"], *parts["test"]}, key=lambda name: -parts["train"].get(name, 0)):
        total = sums.get(name)
        measured = {which: total[which] / total["tokens"] for which in ("base", "tuned")} if total else None
        found.append({"name": name, "measured": measured} | {part: parts[part].get(name, 0) for part in parts})
    return found


# --- the machine, and what made it ------------------------------------------------------------------------------------


def predicted(plan: dict, adapter: dict) -> list[tuple[str, str, str]]:
    """(what, plan's prediction, what was measured)."""
    throughput, on_cpu = adapter["throughput"], adapter["hardware"]["device"] == "cpu"
    peak = throughput["peak_memory_reserved"]
    steps = adapter["ended"]["step"]
    return [
        ("steps", f"{plan['steps']['total']:,}", f"{steps:,} ({adapter['ended']['because']})"),
        (
            "GPU memory",
            gigabytes(plan["memory"]["total"]),
            gigabytes(peak) if peak else "not measured: a CPU" if on_cpu else "not measured",
        ),
        ("time", f"at most {plan['job']['runtime']:,} minutes (asked of Slurm)", duration(throughput["seconds"])),
        ("speed", "", f"{throughput['tokens_per_second']:,.0f} tokens/s"),
        ("share of the card's peak (MFU)", "", percent(throughput["mfu"])),
        ("padding", "", percent(throughput["padding_share"])),
        ("waiting for data", "", percent(throughput["data_wait_share"])),
    ]


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


def percent(share: float | None) -> str:
    return "not known" if share is None else f"{100 * share:.3g} %"


def config_of(run: str, settings: dict) -> str:
    """The config that makes this run, in YAML."""
    import yaml

    model, dataset = settings["run"]["model"], settings["run"]["dataset"]
    config = {
        "seed": settings["seed"],  # of the split
        "model": model,
        "datasets": {dataset: settings["dataset"]},
        "runs": {run: {key: value for key, value in settings["run"].items() if key != "model"}},
    }
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=100)


if __name__ == "__main__":
    main()
