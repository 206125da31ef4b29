"""Trials with the real model on the real device, before the first step: the longest batch, and packing."""

import math

import torch
import torch.distributed

from moult.errors import MoultError, some
from moult.model.shrunken import generic
from moult.run.console import log
from moult.training.packing import NOISE, leak
from moult.training.trial import layers_without_gradient
from moult.training.watch import check_finite


def try_longest_batch(trainer, checkpointing: bool | str) -> None:
    """Run one forward and backward pass of the longest batch before the first step, to find out in the first minute whether it
    fits. With `auto`, turn gradient checkpointing on if it does not fit."""
    rows = trainer.train_dataset
    longest = sorted(range(len(rows)), key=lambda index: -len(rows[index]["input_ids"]))[
        : trainer.args.per_device_train_batch_size
    ]
    batch = trainer.data_collator([rows[index] for index in longest])
    shape = f"{len(longest)} sequences of up to {len(rows[longest[0]]['input_ids']):,} tokens"
    for attempt in ("plain", "checkpointed"):
        if attempt == "checkpointed":
            log.info("the longest batch does not fit into memory: turning gradient checkpointing on")
            trainer.args.gradient_checkpointing = True
            trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
            trainer.model.enable_input_require_grads()
        fits, loss, idle = _try_batch(trainer, batch)
        if fits:
            if not math.isfinite(loss):
                raise MoultError(
                    f"the loss of the longest batch ({shape}) is {loss} before the first step",
                    "the base's weights are damaged, or too large for float16: download them again, or set model.dtype: bfloat16",
                )
            check_finite({"loss": loss}, 0)
            if idle:
                names = sorted({generic(name) for name in idle})
                raise MoultError(
                    f"LoRA gets no gradient on {some(names)}: this model, as it runs here, reads their weights past it",
                    "name them in lora.exclude_modules (the last part of a name is enough)",
                )
            log.debug("the longest batch (%s) fits into memory; loss %.3f", shape, loss)
            return
        if checkpointing != "auto":
            break
    even = "" if checkpointing is False else ", even with gradient checkpointing"
    raise MoultError(
        f"the longest batch ({shape}) does not fit into the GPU's memory{even}",
        "lower train.per_device_train_batch_size (raise gradient_accumulation_steps by as much) or datasets.<name>.max_length",
    )


def try_packing(trainer) -> None:
    """Rows that are packed do not see each other, with this model's weights and attention on this device."""
    if not trainer.padding_free:
        return
    first = trainer.train_dataset[0]["input_ids"][:64]
    seen = leak(trainer.model, [first, trainer.train_dataset[-1]["input_ids"][:64]], trainer.args.device)
    if not seen < NOISE:
        raise MoultError(
            f"train.packing: rows that are packed into one sequence see each other (a row's logits change by {seen:.1%} with "
            "the row before it)",
            "set train.packing: false, or another model.attn_implementation",
        )


def _try_batch(trainer, batch: dict) -> tuple[bool, float, list[str]]:
    """Whether the batch fits, its loss, and the layers whose LoRA got no gradient. Restores the gradients,
    the random state, and TRL's averages."""
    device = trainer.args.device
    trainer.model.train()
    idle: list[str] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            inputs = trainer._prepare_inputs(dict(batch))
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(trainer.model, inputs)
            loss.backward()
            fits, value = True, loss.item()
            if trainer.args.world_size == 1:
                idle = layers_without_gradient(trainer.model)
        except torch.OutOfMemoryError:
            fits, value = False, math.nan
    trainer.model.zero_grad(set_to_none=True)
    trainer._metrics["train"].clear()
    trainer._total_train_tokens = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if trainer.args.world_size > 1:
        # Gradient checkpointing must be the same in all processes.
        flag = torch.tensor(float(fits), device=device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
        fits = flag.item() > 0
    return fits, value, idle
