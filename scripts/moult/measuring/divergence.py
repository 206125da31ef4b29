"""How far two models are from each other: the divergence of what they find likely at the same places of the same rows."""

from collections.abc import Iterable

from moult.measuring.likelihood import scored_logits

# Most logits kept for the comparison with another model, in elements of float32: 512 MiB.
KEPT_LOGITS = 2**27


def one_logits(model, row: dict, pad_id: int, most: int):
    """Of the first trained positions, at most `most`: float32 (positions, vocabulary), on the CPU."""
    import torch

    parts: list = []
    with torch.inference_mode():
        for logits, _, _ in scored_logits(model, [row], pad_id):
            parts.append(logits[: most - sum(map(len, parts))].cpu())
            if sum(map(len, parts)) == most:
                break
    return torch.cat(parts)


def kept_logits(model, rows: list[dict], pad_id: int) -> tuple[list[dict], list]:
    """As many of the rows as KEPT_LOGITS has room for, and the logits of each, the last perhaps cut off."""
    room = max(1, KEPT_LOGITS // model.config.get_text_config().vocab_size)
    kept: list = []
    for row in rows:
        kept.append(one_logits(model, row, pad_id, room))
        room -= len(kept[-1])
        if room == 0:
            break
    return rows[: len(kept)], kept


def divergence(ours: Iterable, theirs: Iterable) -> dict[str, float]:
    """KL(ours || theirs) in nats per token, mean and largest, and how often the two have the same first choice.

    Args:
        ours, theirs: logits of each row, float32 (positions, vocabulary), the same shapes.
    """
    total, worst, agreed, positions = 0.0, 0.0, 0, 0
    for a, b in zip(ours, theirs, strict=True):
        p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
        each = (p.exp() * (p - q)).sum(-1)
        total += each.sum().item()
        worst = max(worst, each.max().item())
        agreed += (a.argmax(-1) == b.argmax(-1)).sum().item()
        positions += len(each)
    return {"mean_kl": max(0.0, total / positions), "max_kl": worst, "top1_agreement": agreed / positions}
