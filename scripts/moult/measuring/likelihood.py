"""How likely a model finds the trained tokens of sequences: the one measure of validation and evaluation.

Summed per sequence, so that any average can be made of it. The mean of batch means, which Trainer calls eval_loss, is
another number that depends on the batch size (huggingface/transformers#34191).
"""

import inspect
from dataclasses import dataclass

from moult.data.sequence import IGNORE
from moult.run.console import progress

# Most logits that are in memory at once, in elements of float32: 1 GiB.
MAX_LOGITS = 2**28
MAX_TOKENS = {"cpu": 4096, "cuda": 32768}


@dataclass
class Likelihood:
    """Of one sequence: nll, summed, in nats; trained tokens; and how many of those were the model's first choice."""

    nll: float
    tokens: int
    correct: int


def batches(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Indices of sequences, the longest first, in batches of at most `max_tokens` tokens, padding included."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    result: list[list[int]] = []
    for index in order:
        if result and (len(result[-1]) + 1) * lengths[result[-1][0]] <= max_tokens:
            result[-1].append(index)
        else:
            result.append([index])
    return result


def token_budget(device: str, vocabulary: int) -> int:
    return max(1, min(MAX_TOKENS[device], MAX_LOGITS // vocabulary))


def padded(sequences: list[dict], pad_id: int, device):
    """input_ids, attention_mask and labels of a batch, padded on the right: int64 tensors of shape (rows, longest)."""
    import torch

    longest = max(len(sequence["input_ids"]) for sequence in sequences)
    ids = torch.full((len(sequences), longest), pad_id)
    labels = torch.full((len(sequences), longest), IGNORE)
    mask = torch.zeros((len(sequences), longest), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        length = len(sequence["input_ids"])
        ids[row, :length] = torch.tensor(sequence["input_ids"])
        labels[row, :length] = torch.tensor(sequence["labels"])
        mask[row, :length] = 1
    return ids.to(device), mask.to(device), labels.to(device)


def scored_logits(model, sequences: list[dict], pad_id: int):
    """Logits at the positions whose next token is trained, and what that token is.

    Returns (logits, targets, rows): float32 (n, vocabulary), int64 (n,), and int64 (n,), the sequence each is from.
    """
    import torch

    ids, mask, labels = padded(sequences, pad_id, model.device)
    targets = labels[:, 1:]
    wanted = (targets != IGNORE).any(dim=0).nonzero().squeeze(-1)
    arguments = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if "logits_to_keep" in inspect.signature(_unwrapped(model).forward).parameters:
        # Only what is scored goes through the head: with a large vocabulary that is most of the memory.
        logits = model(**arguments, logits_to_keep=wanted).logits
    else:
        logits = model(**arguments).logits[:, wanted]
    targets = targets[:, wanted]
    scored = targets != IGNORE
    rows = torch.arange(len(sequences), device=targets.device).unsqueeze(1).expand_as(targets)
    return logits[scored].float(), targets[scored], rows[scored]


def _unwrapped(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def likelihood(
    model, sequences: list[dict], pad_id: int, what: str = "sequences", rank: int = 0, processes: int = 1
) -> list[Likelihood]:
    """The likelihood of each sequence (dicts with input_ids and labels), in their order. The model must be in eval mode.

    Of several processes, each takes every so many of the batches and returns only theirs. All make the same number of passes: a
    model that is split over them computes together. Where a process has no batch left, it repeats one, for nothing.
    """
    import torch

    results: dict[int, Likelihood] = {}
    vocabulary = model.config.get_text_config().vocab_size
    plan = batches([len(sequence["input_ids"]) for sequence in sequences], token_budget(model.device.type, vocabulary))
    turns = [plan[turn + rank] if turn + rank < len(plan) else None for turn in range(0, len(plan), processes)]
    # Not inference_mode: a split model changes its parameters in place.
    with progress(len(sequences), what) as bar, torch.no_grad():
        for indices in turns:
            if indices is None:
                scored_logits(model, [sequences[index] for index in plan[-1]], pad_id)
                continue
            logits, targets, rows = scored_logits(model, [sequences[index] for index in indices], pad_id)
            nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none").double()
            correct = logits.argmax(dim=-1) == targets
            for position, index in enumerate(indices):
                mine = rows == position
                results[index] = Likelihood(nll[mine].sum().item(), int(mine.sum()), int(correct[mine].sum()))
            bar.update(len(indices))
    return [results[index] for index in sorted(results)]
