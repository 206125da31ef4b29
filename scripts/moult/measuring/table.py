"""metrics.json as a table for people: base against tuned, with intervals and the verdict."""

from pathlib import Path


def table(metrics: dict, folder: Path) -> str:
    percent = round(100 * metrics["data"]["confidence"])
    lines = [f"\n{metrics['run']}: {metrics['verdict']['verdict'].upper()}", ""]
    rows = [("", "base", "tuned", f"difference [{percent} %]")]
    if metrics["likelihood"]:
        base, tuned = metrics["likelihood"]["base"], metrics["likelihood"]["tuned"]
        difference = metrics["likelihood"]["difference"]
        rows += [
            ("perplexity", number(base["perplexity"]), number(tuned["perplexity"]), ""),
            (
                "nats per token",
                number(base["nll_per_token"]),
                number(tuned["nll_per_token"]),
                change(difference["nll_per_token"]),
            ),
            ("bits per byte", number(base["bits_per_byte"]), number(tuned["bits_per_byte"]), ""),
            (
                "token accuracy",
                share(base["token_accuracy"]),
                share(tuned["token_accuracy"]),
                change(difference["token_accuracy"], 100),
            ),
        ]
    for part, answers in metrics["answers"].items():
        if part == "all":
            continue
        rates = {"passed": answers.get("passed"), **answers.get("checks", {}), "stopped": answers["stopped"]}
        for name, rate in rates.items():
            if rate:
                label = f"{part} ({rate['n']}): {name}"
                rows.append((label, share(rate["base"]), share(rate["tuned"]), change(rate["difference"], 100)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        lines.append(
            "  "
            + row[0].ljust(widths[0])
            + "".join(f"   {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        )
    merged = metrics["merged_vs_adapter"]
    lines += [
        "",
        f"  measured on {metrics['data']['sequences']:,} sequences, {metrics['data']['trained_tokens']:,} trained tokens; "
        f"merged against adapter: mean KL {merged['mean_kl']:.1e}",
        f"  {folder}/merged/       the tuned model",
        f"  {folder}/adapter/      the LoRA adapter",
        f"  {folder}/samples.jsonl the answers side by side",
        "",
    ]
    return "\n".join(line.rstrip() for line in lines)


def number(figure: dict) -> str:
    return f"{figure['value']:.3g}" if figure["value"] < 1000 else f"{figure['value']:,.0f}"


def share(figure: dict) -> str:
    return f"{100 * figure['value']:.1f} %"


def change(figure: dict, scale: float = 1) -> str:
    low, high = (f"{scale * limit:+.3g}" for limit in figure["interval"])
    return f"{scale * figure['value']:+.3g} [{low}, {high}]"
