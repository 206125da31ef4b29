"""The verdict again, for an export: against the base, as score gives it, and against the merged model that it was made of.

    python scripts/score_export.py --settings '{"eval": {...}, "seed": 0}' --run demo --format gguf-q8_0 \\
        --base results/demo/base --tuned results/demo/tuned --export results/demo/exports/gguf-q8_0 \\
        --made results/demo/exports/gguf-q8_0/made.json --check results/demo/exports/gguf-q8_0/check.json \\
        --merge results/demo/merge.json --merged results/demo/merged --metrics results/demo/metrics.json \\
        --out results/demo/exports/gguf-q8_0/export.json

After evaluate_export and score. It needs no GPU, no model, and nothing of the environment of the exports. An export is held
against the merged model by what was measured of both: not by benchmarks, which an export is not asked, nor by other seeds.
config/README.md, Exports, explains the sentence; scripts/moult/measuring/export.schema.json every key.
"""

from pathlib import Path

from moult.errors import MoultError
from moult.files import read_json, write_json
from moult.measuring.comparison import (
    check_same_questions,
    compare_answers,
    compare_general,
    compare_likelihood,
    read_side,
)
from moult.measuring.exported import against, sentence_of, worse_verdict
from moult.measuring.paired import left_out
from moult.measuring.verdict import PARTS, measures_of, verdict
from moult.run.cli import stage_parser
from moult.run.stage import stage
from moult.workflow.exports import FORMATS

MEASURING = Path(__file__).parent / "moult" / "measuring"


def main() -> None:
    parser = stage_parser(__doc__, "score_export")
    parser.add_argument("--run", required=True, help="name of the run")
    parser.add_argument("--format", required=True, choices=FORMATS, help="format of the export")
    parser.add_argument("--base", required=True, help="folder with the base's measurement")
    parser.add_argument("--tuned", required=True, help="folder with the merged model's measurement")
    parser.add_argument("--export", required=True, help="folder with the export's measurement")
    parser.add_argument("--made", required=True, help="made.json of the export")
    parser.add_argument("--check", required=True, help="evaluate_export's check.json")
    parser.add_argument("--merge", required=True, help="merge's merge.json")
    parser.add_argument("--merged", required=True, help="merged model's folder: its size")
    parser.add_argument("--metrics", required=True, help="the run's metrics.json")
    parser.add_argument("--out", required=True, help="output: export.json")
    args = parser.parse_args()

    with stage("score_export", args.log_file, args.settings) as log:
        score_export(args.settings, args, log)


def score_export(settings: dict, args, log) -> None:
    from jsonschema import Draft202012Validator

    made, checked, metrics = read_json(args.made), read_json(args.check), read_json(args.metrics)
    merge = read_json(args.merge)
    base, merged, export = (read_side(folder) for folder in (args.base, args.tuned, args.export))
    measured = measured_of(export, checked, settings["eval"])
    fix = f"delete {args.export} and run again"
    check_same_questions(base, merged, "base and merged model", fix, measured)
    check_same_questions(merged, export, "merged model and export", fix, measured)
    shown = FORMATS[args.format].shown
    notes = notes_of(checked, measured, metrics, settings["eval"])
    verdicts, samples = {}, {}
    for name, side in (("merged", merged), ("export", export)):
        sides = {"base": base, "tuned": side}
        verdicts[name], samples[name] = judged(sides, measured, metrics, settings, notes, args.format)
    likelihood = (merged["likelihood"], export["likelihood"]) if "likelihood" in measured else None
    options = {name: settings["eval"][name] for name in ("confidence", "resamples")} | {"seed": settings["seed"]}
    found = against(likelihood, samples["merged"], samples["export"], metrics, **options)
    words = {name: one["verdict"] for name, one in verdicts.items()}
    result = {
        "schema_version": 1,
        "run": args.run,
        "format": args.format,
        "shown": shown,
        "bytes": made["bytes"],
        "merged_bytes": sum(Path(args.merged, name).stat().st_size for name in merge["files"]),
        "merged_files": merge["files"],
        "files": made["files"],
        "kl": checked["kl"],
        "kl_limit": checked["kl_limit"],
        "why_no_kl": checked["why_no_kl"],
        "verdict": verdicts["export"],
        "merged_verdict": words["merged"],
        "against_merged": found,
        "sentence": sentence_of(shown, words["export"], words["merged"], found["sentence"]),
        "checks": {name: check["passed"] for name, check in checked["checks"].items()},
        "speed": checked["speed"],
        "engine": checked["engine"],
        "device": checked["device"],
        "tensors": made["tensors"],
        "fallback": made["fallback"],
        "calibration": made["calibration"],
        "ollama": made["ollama"],
        "versions": made["versions"],
        "checked_with": checked["versions"],
    }
    schema = read_json(MEASURING / "export.schema.json")
    schema["$defs"]["verdict"] = read_json(MEASURING / "metrics.schema.json")["properties"]["verdict"]
    Draft202012Validator(schema).validate(result)
    write_json(args.out, result)
    log.info("%s: %s", args.run, result["sentence"])
    if worse_verdict(words["export"], words["merged"]):
        log.warning(
            "%s is %s, and the merged model %s: a format with more bits keeps more of what the tuning has brought",
            shown,
            words["export"],
            words["merged"],
        )


def measured_of(export: dict, checked: dict, settings: dict) -> list[str]:
    """The files of a measurement that the export has. Where its engine tells no likelihoods, these are empty, and check.json
    says why; anything else that is missing is an error (check_same_questions)."""
    asked = {"likelihood": settings["perplexity"], "answers": True, "general": settings["forgetting"]}
    return [name for name, wanted in asked.items() if wanted and (export[name] or not checked["why_no_kl"])]


def notes_of(checked: dict, measured: list[str], metrics: dict, settings: dict) -> list[str]:
    """What to know of the verdict of an export: those of the run's own that still hold, and what it leaves out."""
    notes = list(metrics["verdict"]["cautions"])
    if settings["perplexity"] and "likelihood" not in measured:
        notes.append(f"the likelihood of the rows does not count: {checked['why_no_kl']}")
    if metrics["benchmarks"]:
        notes.append("benchmarks do not count: an export is not asked them")
    if metrics["seeds"]:
        notes.append("the difference between seeds does not count: the export is that of the first seed")
    return notes


def judged(
    sides: dict, measured: list[str], metrics: dict, settings: dict, notes: list[str], format: str
) -> tuple[dict, list[dict]]:
    """The verdict as score gives it, by what was measured of the export; and each question with both answers."""
    own = settings["eval"]
    options = {name: own[name] for name in ("confidence", "resamples")} | {"seed": settings["seed"]}
    likelihood = compare_likelihood(sides, **options) if "likelihood" in measured else None
    guess = metrics["general_text"]["guess"] if metrics["general_text"] else None
    general = compare_general(sides, guess, **options) if "general" in measured else None
    answers, samples = compare_answers(sides, own, left_out(metrics))
    groups = len({row["group"] for row in sides["base"]["likelihood"]})
    measures = measures_of(likelihood, answers, {}, groups, own["confidence"])
    if not any(measure.name != PARTS["instructions"] for measure in measures):
        raise MoultError(
            f"{format}: nothing was measured that both models have",
            "add checks to eval.prompts (expect) or eval.row_expect; or leave the format out of exports",
        )
    return verdict(measures, answers, general, own, notes), samples


if __name__ == "__main__":
    main()
