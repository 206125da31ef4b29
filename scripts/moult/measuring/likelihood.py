"""How likely a model finds the trained tokens of sequences: the one measure of validation and evaluation.

Summed per sequence, so that any average can be made of it. The mean of batch means, which Trainer calls eval_loss, is
another number that depends on the batch size (huggingface/transformers#34191).
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from moult.data.sequence import IGNORE
from moult.run.console import progress

# Most logits that are in memory at once, in elements: of each some 12 bytes (as the model gives them, the scored ones, float32,
# their logarithms), 1.6 GB.
MAX_LOGITS = 2**27
# A GPU is busy with 8,192 tokens. With four times as many, the validation of an 8 B model needed 8.7 GB besides the weights, more
# than a training step with gradient checkpointing (plan simulates both), and would have ended the run on a card of 24 GB.
MAX_TOKENS = {"cpu": 4096, "cuda": 8192}


@dataclass
class Likelihood:
    """Of one sequence: nll, summed, in nats; trained tokens; and how many of those were the model's first choice."""

    nll: float
    tokens: int
    correct: int


def batches(lengths: list[int], limit: float, cost: Callable[[int], float] = float) -> list[list[int]]:
    """Indices of sequences, the longest first, in batches that cost at most `limit`. A batch costs as often as it has
    sequences what its longest does, by `cost` of its length; without `cost` that is tokens, padding included."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    result: list[list[int]] = []
    for index in order:
        if result and (len(result[-1]) + 1) * cost(lengths[result[-1][0]]) <= limit:
            result[-1].append(index)
        else:
            result.append([index])
    return result


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


def scored_logits(model, sequences: list[dict], pad_id: int) -> Iterator[tuple]:
    """Logits at the positions whose next token is trained, and what that token is, in parts of at most MAX_LOGITS.

    Yields (logits, targets, rows): float32 (n, vocabulary), int64 (n,), and int64 (n,), the sequence each is from.
    """
    import torch

    ids, mask, labels = padded(sequences, pad_id, model.device)
    targets = labels[:, 1:]
    # On the CPU, because the head of a model that is spread over several GPUs is on another one than the ids.
    wanted = (targets != IGNORE).any(dim=0).nonzero().squeeze(-1).cpu()
    rows = torch.arange(len(sequences), device=targets.device).unsqueeze(1)
    at_once = max(1, MAX_LOGITS // (len(sequences) * model.config.get_text_config().vocab_size))
    done = 0
    for logits in _logits(model, {"input_ids": ids, "attention_mask": mask, "use_cache": False}, wanted, at_once):
        part = targets[:, wanted[done : done + logits.shape[1]]]
        done += logits.shape[1]
        scored = part != IGNORE
        yield logits[scored].float(), part[scored], rows.expand_as(part)[scored]


def _logits(model, arguments: dict, wanted, at_once: int) -> Iterator:
    """The logits of the columns `wanted`, (rows, columns, vocabulary), in parts of at most `at_once` columns."""
    whole = _unwrapped(model)
    backbone = whole.base_model
    if "logits_to_keep" not in inspect.signature(whole.forward).parameters:
        yield model(**arguments).logits[:, wanted]
        return
    # Only what is scored goes through the head: with a large vocabulary that is most of the memory.
    # Not with a split model, whose processes must all gather the same layers in the same order.
    if len(wanted) <= at_once or backbone is whole or _is_split(whole):
        yield model(**arguments, logits_to_keep=wanted).logits
        return
    # One long row of a model with a large vocabulary has more logits than there is memory. Its layers run once; the head runs
    # on parts, through the model's own forward, which may also scale or cap the logits.
    kept: list = []
    hook = backbone.register_forward_hook(lambda _module, _inputs, outputs: kept.append(outputs))
    try:
        logits = model(**arguments, logits_to_keep=wanted[:at_once]).logits
    finally:
        hook.remove()
    yield logits
    with answering(backbone, kept[0]):
        for part in wanted[at_once:].split(at_once):
            yield model(**arguments, logits_to_keep=part).logits


@contextmanager
def answering(module, outputs) -> Iterator[None]:
    """Let the module give these outputs, whatever it is called with."""
    own = vars(module).get("forward")
    module.forward = lambda *_, **__: outputs
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _is_split(whole) -> bool:
    """Whether it is split over processes (moult/model/sharding.py)."""
    return getattr(whole, "is_distributed_loading_by_transformers", False)


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
    whole = _unwrapped(model)
    lengths = [len(sequence["input_ids"]) for sequence in sequences]
    # The logits of a split model are not taken in parts (`_logits`): fewer sequences at once.
    most = (
        MAX_LOGITS // whole.config.get_text_config().vocab_size if _is_split(whole) else MAX_TOKENS[model.device.type]
    )
    plan = batches(lengths, min(most, MAX_TOKENS[model.device.type]))
    turns = [plan[turn + rank] if turn + rank < len(plan) else None for turn in range(0, len(plan), processes)]
    # Not inference_mode: a split model changes its parameters in place.
    with progress(len(sequences), what) as bar, torch.no_grad():
        for indices in turns:
            if indices is None:
                for _ in scored_logits(model, [sequences[index] for index in plan[-1]], pad_id):
                    pass
                continue
            results |= {index: Likelihood(0.0, 0, 0) for index in indices}
            for logits, targets, rows in scored_logits(model, [sequences[index] for index in indices], pad_id):
                nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none").double()
                correct = logits.argmax(dim=-1) == targets
                for position, index in enumerate(indices):
                    mine, found = rows == position, results[index]
                    found.nll += nll[mine].sum().item()
                    found.tokens += int(mine.sum())
                    found.correct += int(correct[mine].sum())
            bar.update(len(indices))
    return [results[index] for index in sorted(results)]
