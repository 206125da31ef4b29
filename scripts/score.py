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
from moult.files import read_json, read_jsonl, write_json, write_jsonl
from moult.measuring.checks import check
from moult.measuring.intervals import bootstrap, paired_difference, wilson
from moult.measuring.power import smallest_effect, smallest_shift
from moult.model.manifest import public_name
from moult.run.cli import stage_parser
from moult.run.stage import stage

SCHEMA = Path(__file__).parent / "moult" / "measuring" / "metrics.schema.json"


def main() -> None:
    parser = stage_parser(__doc__, "score")
    parser.add_argument("--run", required=True, help="name of the run")
    parser.add_argument("--base", required=True, help="folder with the base's likelihood.jsonl and answers.jsonl")
    parser.add_argument(
        "--tuned", required=True, help="folder with the same files of the tuned model, and merge_check.json"
    )
    parser.add_argument("--prepared", required=True, help="prepare's metadata.json")
    parser.add_argument("--tokens", required=True, help="folder with the tokens that encode wrote")
    parser.add_argument("--adapter", required=True, help="finetune's adapter.json")
    parser.add_argument("--merge", required=True, help="merge's merge.json")
    parser.add_argument("--metrics", required=True, help="output: metrics.json")
    parser.add_argument("--samples", required=True, help="output: samples.jsonl")
    args = parser.parse_args()

    with stage("score", args.log_file, args.settings) as log:
        score(args.settings, args, log)


def score(settings: dict, args, log) -> None:
    from jsonschema import Draft202012Validator

    sides = {}
    for side, folder in (("base", Path(args.base)), ("tuned", Path(args.tuned))):
        sides[side] = {name: list(read_jsonl(folder / f"{name}.jsonl")) for name in ("likelihood", "answers")}
    check_same_questions(sides["base"], sides["tuned"])
    merge_check = read_json(Path(args.tuned) / "merge_check.json")
    check_merge(merge_check, settings["eval"])
    prepared, report = read_json(args.prepared), read_json(Path(args.tokens) / "report.json")
    adapter, merge = read_json(args.adapter), read_json(args.merge)

    options = {name: settings["eval"][name] for name in ("confidence", "resamples")} | {"seed": settings["seed"]}
    likelihood = compare_likelihood(sides, **options) if settings["eval"]["perplexity"] else None
    answers, samples = compare_answers(sides, settings["eval"])
    rows = sides["base"]["likelihood"]
    same_rows = len(rows) == report["val"]["sequences"]
    cost = quantization_cost(merge_check.pop("quantization", None), adapter, likelihood, same_rows)
    tell_quantization(cost, settings["eval"]["quantization_kl_limit"], log)
    groups = len({row["group"] for row in rows})
    metrics = {
        "schema_version": 1,
        "run": args.run,
        "verdict": verdict(likelihood, answers, groups, settings["eval"]["confidence"]),
        "data": {
            "sequences": len(rows),
            "groups": groups,
            "trained_tokens": sum(row["tokens"] for row in rows),
            "trained_bytes": sum(row["bytes"] for row in rows),
            "rows_shared_with_train": prepared["overlap"]["rows"],
            "confidence": settings["eval"]["confidence"],
        },
        "likelihood": likelihood,
        "answers": answers,
        "checks": [
            {"id": s["id"], "base": s["base"]["checks"], "tuned": s["tuned"]["checks"]}
            for s in samples
            if s["kind"] == "prompt"
        ],
        "by_source": by_source(sides, prepared),
        "merged_vs_adapter": merge_check,
        "quantization": cost,
        "throughput": adapter["throughput"],
        "provenance": {
            "base": {name: merge["base"][name] for name in ("name", "commit", "files")},
            "data": [
                {"name": data_name(file), "commit": file.get("commit"), "sha256": file["sha256"]}
                for file in prepared["sources"] + prepared["val_sources"]
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

# The file of a measurement: what it has a row for.
QUESTIONS = {"likelihood": "sequences", "answers": "questions"}


def check_same_questions(base: dict, tuned: dict) -> None:
    """Base and tuned were measured on the same sequences and asked with the same token ids."""
    for name, fields in (("likelihood", ("id", "tokens")), ("answers", ("kind", "id", "prompt_ids"))):
        both = [[[row[field] for field in fields] for row in side[name]] for side in (base, tuned)]
        if both[0] != both[1]:
            differ = [a[1 if name == "answers" else 0] for a, b in zip(*both, strict=False) if a != b]
            raise MoultError(
                f"base and tuned model were measured on different {QUESTIONS[name]} ({some(differ) or 'their numbers differ'})",
                "delete results/<run>/base and run again",
            )


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
    """What evaluate_tuned has found of the quantized base, and the nats per token of the validation rows: of base plus
    adapter, as finetune has measured them in training, and of the merged model. None without model.quantization."""
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


# --- likelihood -------------------------------------------------------------------------------------------------------


def compare_likelihood(sides: dict, confidence: float, resamples: int, seed: int) -> dict:
    """Base, tuned and their paired difference, with intervals from a bootstrap over groups."""
    import numpy as np

    base, tuned = sides["base"]["likelihood"], sides["tuned"]["likelihood"]
    groups = {group: index for index, group in enumerate(dict.fromkeys(row["group"] for row in base))}

    def sums(rows: list[dict], field: str):
        total = np.zeros(len(groups))
        for row in rows:
            total[groups[row["group"]]] += row[field]
        return total

    tokens, size = sums(base, "tokens"), sums(base, "bytes")
    result: dict = {"base": {}, "tuned": {}, "difference": {}}
    for name, field in (("nll_per_token", "nll"), ("token_accuracy", "correct")):
        columns = np.stack([sums(base, field), sums(tuned, field)], axis=1)
        intervals = bootstrap(columns, tokens, confidence, resamples, seed)
        values = (columns.sum(axis=0) / tokens.sum()).tolist()
        for side, value, interval in zip(
            ("base", "tuned", "difference"), [*values, values[1] - values[0]], intervals, strict=True
        ):
            result[side][name] = {"value": value, "interval": interval}
    bits = np.stack([sums(base, "nll"), sums(tuned, "nll")], axis=1) / math.log(2)
    for side, value, interval in zip(
        ("base", "tuned"),
        bits.sum(axis=0) / max(size.sum(), 1),
        bootstrap(bits, np.maximum(size, 1e-9), confidence, resamples, seed),
        strict=False,
    ):
        result[side]["bits_per_byte"] = {"value": float(value), "interval": interval}
        nll = result[side]["nll_per_token"]
        result[side]["perplexity"] = {
            "value": math.exp(nll["value"]),
            "interval": [math.exp(limit) for limit in nll["interval"]],
        }
    result["rows_better"] = sum(t["nll"] < b["nll"] for b, t in zip(base, tuned, strict=True)) / len(base)
    return result


def by_source(sides: dict, prepared: dict) -> dict:
    """Nats per token for each source of validation rows."""
    files = defaultdict(list)
    for file in prepared["val_sources"] or prepared["sources"]:
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


# --- answers ----------------------------------------------------------------------------------------------------------


def compare_answers(sides: dict, settings: dict) -> tuple[dict, list[dict]]:
    """The pass rates of every check for prompts, rows and both together, and each question with both answers."""
    expected = {prompt["id"]: prompt.get("expect", {}) for prompt in settings["prompts"]}
    samples = []
    for base, tuned in zip(sides["base"]["answers"], sides["tuned"]["answers"], strict=True):
        expect = expected[base["id"]] if base["kind"] == "prompt" else settings.get("row_expect", {})
        sample = {name: base[name] for name in ("kind", "id", "prompt", "reference")}
        for side, row in (("base", base), ("tuned", tuned)):
            checks = check(row["answer"], expect, row["reference"])
            sample[side] = {"answer": row["answer"], "stopped": row["stopped"], "checks": checks}
        samples.append(sample)
    parts = {
        "prompts": [s for s in samples if s["kind"] == "prompt"],
        "rows": [s for s in samples if s["kind"] == "row"],
        "all": samples,
    }
    return {name: summarise(part, settings["confidence"]) for name, part in parts.items() if part}, samples


def summarise(samples: list[dict], confidence: float) -> dict:
    def rate(part: list[dict], holds) -> dict:
        return compare_rates([[holds(sample[side]) for sample in part] for side in ("base", "tuned")], confidence)

    checked = [sample for sample in samples if sample["base"]["checks"]]
    names = sorted({name for sample in checked for name in sample["base"]["checks"]})
    result = {"n": len(samples), "stopped": rate(samples, lambda side: side["stopped"])}
    if checked:
        result["passed"] = rate(checked, lambda side: all(side["checks"].values()))
        result["checks"] = {
            name: rate(
                [s for s in checked if name in s["base"]["checks"]],
                lambda side, name=name: side["checks"][name],
            )
            for name in names
        }
    for side in ("base", "tuned"):
        lengths = sorted(len(sample[side]["answer"]) for sample in samples)
        result.setdefault("characters", {})[side] = {
            "mean": sum(lengths) / len(lengths),
            "median": lengths[len(lengths) // 2],
            "max": lengths[-1],
        }
        result.setdefault("empty", {})[side] = sum(not sample[side]["answer"].strip() for sample in samples)
    return result


def compare_rates(passed: list[list[bool]], confidence: float) -> dict:
    n = len(passed[0])
    base, tuned = (sum(side) for side in passed)
    return {
        "n": n,
        "base": {"value": base / n, "interval": wilson(base, n, confidence)},
        "tuned": {"value": tuned / n, "interval": wilson(tuned, n, confidence)},
        "difference": {"value": (tuned - base) / n, "interval": paired_difference(*passed, confidence)},
    }


# --- verdict ----------------------------------------------------------------------------------------------------------


def verdict(likelihood: dict | None, answers: dict, groups: int, confidence: float) -> dict:
    """helped: something is better and nothing is worse; hurt: the reverse; otherwise inconclusive. A measurement is better or
    worse if the interval of its paired difference does not contain 0. How many answers stop is reported but does not count:
    a model with longer answers stops less often within max_new_tokens.

    A bootstrap of very few groups gives intervals that are too narrow. Therefore the likelihood counts only if there are so
    many groups that they would not all change in the same direction by chance (sign test; 6 groups at 95 %)."""
    evidence = {}  # what: (difference, whether more is better, unit, the smallest difference that would show)
    enough = math.ceil(1 - math.log2(1 - confidence))
    if likelihood:
        shift = likelihood["difference"]["nll_per_token"]
        evidence["validation loss"] = (shift, -1, "nats per token", smallest_shift(shift["interval"], confidence))
    for part, name in (("prompts", "prompts passed"), ("rows", "rows passed")):
        if rates := answers.get(part, {}).get("passed"):
            shows = smallest_effect(rates["n"], rates["base"]["value"], confidence)
            evidence[name] = (rates["difference"], 1, "of the questions", shows)
    if not evidence:
        raise MoultError(
            "nothing was measured",
            "set eval.perplexity: true, or add checks to eval.prompts (expect) or eval.row_expect",
        )
    found: dict[str, list[str]] = {"better": [], "worse": [], "unclear": []}
    reasons, smallest = [], {}
    for name, (difference, sign, unit, shows) in evidence.items():
        low, high = sorted(sign * limit for limit in difference["interval"])
        too_few = name == "validation loss" and groups < enough
        kind = "unclear" if too_few or low <= 0 <= high else "better" if low > 0 else "worse"
        found[kind].append(name)
        shown = [f"{limit:+.3g}" for limit in [difference["value"], *difference["interval"]]]
        reasons.append(f"{name} {kind}: {shown[0]} {unit} [{shown[1]}, {shown[2]}]")
        if too_few:
            reasons[-1] += f" (only {groups} groups of validation rows; {enough} are needed)"
        elif kind == "unclear":
            smallest[name] = shows
            reasons[-1] += (
                f" (the smallest difference that would show: {shows:.2g})" if shows else " (too few to show any)"
            )
    if "all" in answers:
        stopped = answers["all"]["stopped"]
        reasons.append(f"answers that stop: {stopped['base']['value']:.0%} -> {stopped['tuned']['value']:.0%}")
    word = "inconclusive"
    if found["better"] and not found["worse"]:
        word = "helped"
    elif found["worse"] and not found["better"]:
        word = "hurt"
    return {
        "verdict": word,
        **found,
        "smallest_effect": smallest,
        "reasons": reasons,
    }


if __name__ == "__main__":
    main()
