"""Compare base and tuned: metrics.json with intervals and a verdict, samples.jsonl with the answers side by side.

    python scripts/score.py --settings '{"eval": {...}, "seed": 0}' --run demo --base results/demo/base \\
        --tuned results/demo/tuned --prepared results/prepared/demo/metadata.json --tokens results/demo/tokens \\
        --adapter results/demo/adapter.json --merge results/demo/merge.json --metrics results/demo/metrics.json \\
        --samples results/demo/samples.jsonl

Last stage. It needs no GPU and no model. First it checks that both models were measured on the same token ids.
scripts/moult/measuring/README.md explains every key of metrics.json.
"""

import math
from collections import defaultdict
from pathlib import Path

from moult.errors import MoultError, some
from moult.files import read_json, write_json, write_jsonl
from moult.measuring.benchmarks import compare_benchmark, read_answers
from moult.measuring.comparison import (
    check_same_questions,
    compare_answers,
    compare_general,
    compare_likelihood,
    read_side,
)
from moult.measuring.contamination import Contamination
from moult.measuring.intervals import wilson
from moult.measuring.seeds import spread, with_seeds
from moult.measuring.verdict import Measure, measures_of, verdict
from moult.model.manifest import public_name
from moult.run.cli import stage_parser
from moult.run.stage import stage

SCHEMA = Path(__file__).parent / "moult" / "measuring" / "metrics.schema.json"


def main() -> None:
    parser = stage_parser(__doc__, "score")
    parser.add_argument("--run", required=True, help="name of the run")
    parser.add_argument(
        "--base", required=True, help="folder with the base's likelihood.jsonl, answers.jsonl, general.jsonl"
    )
    parser.add_argument(
        "--tuned", required=True, help="folder with the same files of the tuned model, and merge_check.json"
    )
    parser.add_argument("--prepared", required=True, help="prepare's metadata.json")
    parser.add_argument("--tokens", required=True, help="folder with the tokens that encode wrote")
    parser.add_argument("--adapter", required=True, help="finetune's adapter.json")
    parser.add_argument("--merge", required=True, help="merge's merge.json")
    parser.add_argument(
        "--benchmarks",
        nargs="*",
        default=[],
        help="samples of each benchmark: first the base's of all, then the tuned model's",
    )
    parser.add_argument(
        "--contamination", nargs="*", default=[], help="what contamination has found, if the run asks anything"
    )
    parser.add_argument("--seed-tuned", nargs="*", default=[], help="--tuned of the runs with the further seeds")
    parser.add_argument("--seed-adapters", nargs="*", default=[], help="--adapter of the same runs")
    parser.add_argument("--seed-benchmarks", nargs="*", default=[], help="the same runs' samples of each benchmark")
    parser.add_argument("--metrics", required=True, help="output: metrics.json")
    parser.add_argument("--samples", required=True, help="output: samples.jsonl")
    args = parser.parse_args()

    with stage("score", args.log_file, args.settings) as log:
        score(args.settings, args, log)


def score(settings: dict, args, log) -> None:
    from jsonschema import Draft202012Validator

    sides = {side: read_side(folder) for side, folder in (("base", args.base), ("tuned", args.tuned))}
    check_same_questions(sides["base"], sides["tuned"], *BOTH)
    merge_check = read_json(Path(args.tuned) / "merge_check.json")
    check_merge(merge_check, settings["eval"])
    prepared, report = read_json(args.prepared), read_json(Path(args.tokens) / "report.json")
    adapter, merge = read_json(args.adapter), read_json(args.merge)

    options = {name: settings["eval"][name] for name in ("confidence", "resamples")} | {"seed": settings["seed"]}
    likelihood = compare_likelihood(sides, **options) if settings["eval"]["perplexity"] else None
    guess = math.log(report["vocabulary"]) if report["vocabulary"] else None
    general = compare_general(sides, guess, **options) if settings["eval"]["forgetting"] else None
    contamination = contaminated(args.contamination, settings["eval"], report)
    left_out = contamination.prompts_left_out() if contamination else ()
    answers, samples = compare_answers(sides, settings["eval"], left_out)
    benchmarks = compare_benchmarks(args.benchmarks, settings["eval"]["benchmarks"], contamination, options)
    rows = sides["base"]["likelihood"]
    # finetune measures on all rows of val.
    same_rows = prepared["measured_on"] == "val" and len(rows) == report["val"]["sequences"]
    cost = quantization_cost(merge_check.pop("quantization", None), adapter, likelihood, same_rows)
    tell_quantization(cost, settings["eval"]["quantization_kl_limit"], log)
    groups = len({row["group"] for row in rows})
    measures = measures_of(likelihood, answers, benchmarks, groups, settings["eval"]["confidence"])
    seeds = compare_seeds(settings, sides["base"], measures, groups, contamination, args)
    told = contamination.reason() if contamination else None
    cautions = [reason for reason in (told, chosen_on(prepared, adapter)) if reason]
    found = verdict(measures, answers, general, settings["eval"], cautions)
    metrics = {
        "schema_version": 1,
        "run": args.run,
        "verdict": with_seeds(found, seeds["measurements"]) if seeds else found,
        "data": {
            "measured_on": prepared["measured_on"],
            "no_test_part_because": prepared["no_test_part_because"],
            "sequences": len(rows),
            "groups": groups,
            "trained_tokens": sum(row["tokens"] for row in rows),
            "trained_bytes": sum(row["bytes"] for row in rows),
            "rows_shared_with_train": prepared["overlap"]["rows"],
            "confidence": settings["eval"]["confidence"],
        },
        "likelihood": likelihood,
        "answers": answers,
        "general_text": general,
        "checks": [
            {"id": s["id"], "base": s["base"]["checks"], "tuned": s["tuned"]["checks"]}
            for s in samples
            if s["kind"] == "prompt"
        ],
        "benchmarks": benchmarks,
        "contamination": contamination.told() if contamination else None,
        "by_source": by_source(sides, prepared),
        "seeds": seeds,
        "merged_vs_adapter": merge_check,
        "quantization": cost,
        "throughput": adapter["throughput"],
        "provenance": {
            "base": {name: merge["base"][name] for name in ("name", "commit", "files")},
            "data": [
                {"name": data_name(file), "commit": file.get("commit"), "sha256": file["sha256"]}
                for file in prepared["sources"] + prepared["val_sources"] + prepared["test_sources"]
            ],
            "template_sha256": report["template"]["sha256"],
            "training": {name: adapter["settings"][name] for name in ("lora", "train", "dtype", "quantization")},
            "adapter_sha256": adapter["adapter_sha256"],
            "merged_files": merge["files"],
            "versions": adapter["versions"],
            "hardware": adapter["hardware"],
            "seed": settings["seed"],
            "step": adapter["step"],
            "steps": adapter["steps"],
            "ended": adapter["ended"],
        },
    }
    schema = read_json(SCHEMA)
    Draft202012Validator(schema).validate(metrics)
    write_jsonl(args.samples, samples)
    write_json(args.metrics, metrics)
    log.info("%s. %s", metrics["verdict"]["verdict"], "; ".join(metrics["verdict"]["reasons"]))


# --- gates ------------------------------------------------------------------------------------------------------------

# Of check_same_questions: who they are, and what to do.
BOTH = ("base and tuned model", "delete results/<run>/base and run again")


def check_merge(check: dict, settings: dict) -> None:
    """The merged model is base plus adapter, but for rounding: mean KL, and how often the two have the same first choice.

    The first choice tells more where all words are about equally likely, because there KL is small whatever happens (a
    random model, merged into weights of half the size: KL 0.017, same first choice 67 %). The share stops the run only if it
    is under the limit by more than chance: one of 7 positions may differ.

    What rounding to bfloat16 alone does, over 1,152 to 3,840 positions (TinyStories-656K, the demo's base, random Llamas of
    6 and 12 layers with 2,048 and 32,000 words; adapters trained, or random with 0.02): computed in float32, KL 1e-6 to 2e-5
    and 98.4 to 99.8 %; computed in bfloat16, KL 7e-6 to 5e-4 and 96.4 to 98.7 %. The lowest are the random models'.
    """
    kl, kl_limit, top1_limit = check["mean_kl"], settings["merge_kl_limit"], settings["merge_top1_limit"]
    agreed, positions = check["top1_agreement"], check["positions"]
    reason = ""
    if kl > kl_limit:
        reason = f"mean KL {kl:.3g} nats per token, above eval.merge_kl_limit {kl_limit:g}"
    elif wilson(round(agreed * positions), positions, settings["confidence"])[1] < top1_limit:
        reason = f"the same first choice at {agreed:.2%} of {positions:,} positions, below eval.merge_top1_limit {top1_limit:g}"
    if reason:
        raise MoultError(
            f"the merged model differs from base plus adapter: {reason}",
            "delete merged/ and run again; if its dtype has few bits (float16, fp8), check samples.jsonl and relax the limit",
        )


def quantization_cost(found: dict | None, adapter: dict, likelihood: dict | None, same_rows: bool) -> dict | None:
    """What evaluate_tuned has found of the quantized base, and the nats per token: of base plus adapter, as finetune has measured
    them on the validation rows, and of the merged model, if it was measured on the same rows. None without model.quantization."""
    if found is None:
        return None
    trained, nll = adapter["validation_loss"]["published"], None
    if likelihood is not None and trained is not None and same_rows:
        nll = {"trained": trained, "merged": likelihood["tuned"]["nll_per_token"]["value"]}
    return {**found, "nll_per_token": nll}


def tell_quantization(cost: dict | None, limit: float, log) -> None:
    """Warn if the merged model, which is measured and served, is not the one that was trained. That is not to say that it is
    worse: its base is the better one.

    Two models (the demo's base on its data, 60 and 200 steps; TinyStories-656K on GSM8K, 60 steps), quantized by bitsandbytes
    and, for what is worse, to 8, 6 and 4 even levels. KL(quantized base + adapter || merged), the same first choice, and what
    merging changes in nats per token:

        int8          1e-5 to 6e-4    98 to 100 %    -0.0005 to +0.0001
        nf4           5e-4 to 4e-2    81 to 100 %    -0.004 to +0.006
        8 levels      5e-3 to 0.22    60 to 99.8 %   -0.05 to +0.002
        6, 4 levels   0.06 to 0.77    34 to 98 %     -0.35 to +0.01

    So nf4 passes where it works as it should, also on a model too small for it. Above that, it is another model that answers.
    """
    if cost and cost["trained_vs_merged"]["mean_kl"] > limit:
        log.warning(
            "the merged model is another one than was trained, on the quantized base: mean KL %.3g nats per token, above "
            "eval.quantization_kl_limit %g (between the two bases: %.3g); model.quantization: int8 or null is closer",
            cost["trained_vs_merged"]["mean_kl"],
            limit,
            cost["base_vs_quantized"]["mean_kl"],
        )


def contaminated(files: list[str], settings: dict, report: dict) -> Contamination | None:
    """What of this run's questions is in the training rows. With `drop`, encode must have left out just these rows."""
    if not files:
        return None
    found = read_json(files[0])
    if settings["contamination"] == "drop" and found["contaminated_rows"] != report["contaminated_rows"]:
        raise MoultError(
            f"eval.contamination is drop, and encode has left out other rows than those of {files[0]} "
            f"({report['contaminated_rows']['count']:,}, not {found['contaminated_rows']['count']:,})",
            "encode the rows again: snakemake --forcerun encode",
        )
    return Contamination.of(found, settings)


# --- parts ------------------------------------------------------------------------------------------------------------


def by_source(sides: dict, prepared: dict) -> dict:
    """Nats per token for each source of the measured rows."""
    files = defaultdict(list)
    for file in prepared[f"{prepared['measured_on']}_sources"] or prepared["sources"]:
        files[file["source"]].append(data_name(file))
    names = {source: some(paths, 1) for source, paths in files.items()}
    totals: dict = defaultdict(lambda: {"base": 0.0, "tuned": 0.0, "tokens": 0})
    for base, tuned in zip(sides["base"]["likelihood"], sides["tuned"]["likelihood"], strict=True):
        total = totals[f"{base['source']}: {names[base['source']]}"]
        total["base"] += base["nll"]
        total["tuned"] += tuned["nll"]
        total["tokens"] += base["tokens"]
    return {
        name: {"base": t["base"] / t["tokens"], "tuned": t["tuned"] / t["tokens"], "tokens": t["tokens"]}
        for name, t in totals.items()
    }


def data_name(file: dict) -> str:
    """The hub id, or the part of a path that may be published."""
    return file.get("hub") or public_name(file["path"])


def compare_benchmarks(samples: list[str], asked: dict, contamination: Contamination | None, options: dict) -> dict:
    """{name: the comparison} of each benchmark. `asked`: {name: its metric and slug}; the slug names its file on both sides."""
    base, tuned = ({Path(file).stem: file for file in part} for part in (samples[: len(asked)], samples[len(asked) :]))
    return {
        name: compare_benchmark(
            name,
            read_answers(base[one["slug"]]),
            read_answers(tuned[one["slug"]]),
            one["metric"],
            options,
            contamination.questions_left_out(one["slug"]) if contamination else (),
        )
        for name, one in asked.items()
    }


# --- seeds ------------------------------------------------------------------------------------------------------------


def compare_seeds(
    settings: dict, base: dict, own: list[Measure], groups: int, contamination: Contamination | None, args
) -> dict | None:
    """What the verdict looks at (`own`), beside the same of the runs with other seeds. None if the run has only one seed."""
    if not args.seed_tuned:
        return None
    # One resample: the intervals over rows are those of the run itself.
    options = {"confidence": settings["eval"]["confidence"], "resamples": 1, "seed": 0}
    asked = settings["eval"]["benchmarks"]
    values = {measure.name: [measure.difference["value"]] for measure in own}
    for number, folder in enumerate(args.seed_tuned):
        sides = {"base": base, "tuned": read_side(folder)}
        check_same_questions(base, sides["tuned"], *BOTH)
        check_merge(read_json(Path(folder) / "merge_check.json"), settings["eval"])
        samples = args.benchmarks[: len(asked)] + args.seed_benchmarks[number * len(asked) : (number + 1) * len(asked)]
        likelihood = compare_likelihood(sides, **options) if settings["eval"]["perplexity"] else None
        left_out = contamination.prompts_left_out() if contamination else ()
        answers = compare_answers(sides, settings["eval"], left_out)[0]
        benchmarks = compare_benchmarks(samples, asked, contamination, options)
        for measure in measures_of(likelihood, answers, benchmarks, groups, options["confidence"]):
            values[measure.name].append(measure.difference["value"])
    adapters = [read_json(path) for path in (args.adapter, *args.seed_adapters)]
    return {
        "trained": [
            {"seed": seed, "step": adapter["step"], "adapter_sha256": adapter["adapter_sha256"]}
            for seed, adapter in zip(settings["seeds"], adapters, strict=True)
        ],
        "measurements": {
            measure.name: spread(
                values[measure.name], measure.difference["interval"], options["confidence"], measure.unit
            )
            for measure in own
        },
    }


def chosen_on(prepared: dict, adapter: dict) -> str | None:
    """A reason to read the verdict with care: the measured rows have chosen the checkpoint. None if they have not."""
    if prepared["measured_on"] == "test" or adapter["chosen"] == "last step":
        return None
    return f"the measured rows have also chosen the checkpoint: slightly too good ({prepared['no_test_part_because']})"


if __name__ == "__main__":
    main()
