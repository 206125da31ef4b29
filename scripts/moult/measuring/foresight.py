"""What the evaluation will be able to show: told before anything is spent (plan), and again when the base is measured."""

import math

from moult.measuring.power import rows_needed, shift_shown, smallest_effect
from moult.measuring.verdict import shares

# A change of a pass rate that people want to see.
WISHED_EFFECT = 0.1

# Before the base is measured: its pass rate, where a change is hardest to see; and by how many nats per token the change of one
# row differs from that of another, as standard deviation. Measured (the demo with a good and with a bad learning rate,
# TinyStories-656K on GSM8K): 1.1, 1.6 and 1.0, where the loss fell by 6.2, 5.0 and 3.6; it is less where less changes. The
# base's own losses, before tuning, differed as much: 1.1, 1.1 and 0.9.
RATE, SPREAD = 0.5, 1.0


def rows_apart(likelihoods: list[dict]) -> tuple[int, float]:
    """How many groups of rows were measured, and by how many nats per token they differ (standard deviation): what the
    bootstrap over groups would find for a model whose change is as large as the base's own loss differs."""
    groups: dict[str, list[float]] = {}
    for row in likelihoods:
        total = groups.setdefault(row["group"], [0.0, 0.0])
        total[0] += row["nll"]
        total[1] += row["tokens"]
    tokens = sum(total[1] for total in groups.values())
    if len(groups) < 2:
        return len(groups), SPREAD
    average = sum(total[0] for total in groups.values()) / tokens
    squares = sum((nll - average * size) ** 2 for nll, size in groups.values())
    return len(groups), math.sqrt(squares / (len(groups) - 1)) / (tokens / len(groups))


def tell_power(
    eval: dict, counts: dict[str, int], groups: int, log, rates: dict[str, float] | None = None, spread: float = SPREAD
) -> None:
    """Say how small a change of pass rates and loss will show, in 80 % of all cases at the configured confidence.

    Args:
        eval: the config's section.
        counts: how many questions with checks there are of prompts, rows and instructions; those without any left out.
        groups: of rows whose likelihood is measured; 0 if it is not.
        rates: of the base, by the same names, if they are known.
        spread: by how many nats per token rows differ (standard deviation).
    """
    weights = shares(counts, groups > 0)
    level = {part: 1 - (1 - eval["confidence"]) * weight for part, weight in weights.items()}
    told = []
    if groups > 1:
        told.append(
            f"{groups:,} groups of rows show {shift_shown(groups, spread, level['likelihood']):.2g} nats per token"
        )
    asked = {part: n for part, n in counts.items() if part != "instructions"}
    effects = {part: smallest_effect(n, (rates or {}).get(part, RATE), level[part]) for part, n in asked.items()}
    for part, effect in effects.items():
        none = "are too few to show any change" if rates else f"show no change of {100 * (1 - RATE):.0f} points or less"
        shows = f"show {100 * effect:.0f} points" if effect else none
        told.append(f"{asked[part]:,} {part} {shows}")
    if not told:
        return
    known = "by the base's own answers, " if rates is not None else ""
    text = f"the smallest change that will show: {known}{'; '.join(told)}"
    if effects and min(effect or 1.0 for effect in effects.values()) > WISHED_EFFECT:
        part = max(effects, key=lambda part: asked[part])
        needed = rows_needed(WISHED_EFFECT, (rates or {}).get(part, RATE), level[part])
        log.warning(
            "%s; to see %.0f points, ask %s questions (eval.answer_rows, datasets.<name>.test_size)",
            text,
            100 * WISHED_EFFECT,
            f"{needed:,}",
        )
    else:
        log.info(text)
