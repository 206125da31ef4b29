"""Trials with the real model on the real device, before the first step: the longest batch, and packing.

They run inside train(), on the model as training has prepared it: with autocast, gradient checkpointing, DDP's buckets and the
room that the optimizer will take. What they leave behind is put back, so a run with them gives the same bytes as one without.
"""

import contextlib
import copy
import math
from collections.abc import Iterator

import torch
import torch.distributed
from pyarrow.compute import list_value_length
from transformers import TrainerCallback

from moult.data.sequence import IGNORE
from moult.errors import HOPELESS, MoultError, some
from moult.model.device import is_out_of_memory
from moult.model.shrunken import generic
from moult.run.console import log
from moult.training.packing import NOISE, leak
from moult.training.trial import layers_without_gradient
from moult.training.watch import check_finite


class OtherBatch(Exception):
    """The batch that fits is smaller than the one that train() was called with: call it again."""


class FirstBatch(TrainerCallback):
    """Tries the longest batch, and packing, once, when training begins.

    Args:
        checkpointing: train.gradient_checkpointing of the config: `auto`, true or false.
        sizes: batch sizes to try, the largest first; one, unless per_device_train_batch_size is `auto`.
    """

    def __init__(self, trainer, checkpointing: bool | str, sizes: list[int]):
        self.trainer, self.checkpointing, self.sizes = trainer, checkpointing, sizes
        self.tried = False

    def on_train_begin(self, args, state, control, **kwargs):
        if self.tried:
            return
        self.tried = True
        size = try_longest_batch(self.trainer, self.checkpointing, self.sizes)
        try_packing(self.trainer)
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if size != args.per_device_train_batch_size:
            use_batch(self.trainer, size)
            raise OtherBatch


def use_batch(trainer, size: int) -> None:
    """Train with batches of `size`, and as many more of them that a step has the same sequences."""
    args = trainer.args
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    args.per_device_train_batch_size, args.gradient_accumulation_steps = size, per_step // size
    trainer._train_batch_size = args.train_batch_size
    log.info("a batch of %d fits: %d of them make a step", size, args.gradient_accumulation_steps)


def try_longest_batch(trainer, checkpointing: bool | str, sizes: list[int]) -> int:
    """Run one forward and backward pass of the longest batch before the first step, to find out in the first minute whether it
    fits. With `auto`, turn gradient checkpointing on if no batch fits without it: it costs a third of the speed, and a small
    batch of long rows nearly nothing. Returns the size of the batch that fits."""
    said = ""
    for attempt in ("plain", "checkpointed"):
        if attempt == "checkpointed":
            log.info("the longest batch does not fit into memory: turning gradient checkpointing on")
            checkpoint(trainer)
        for size in sizes:
            batch, shape = longest_batch(trainer, size)
            fits, loss, idle, said = try_batch(trainer, batch)
            if fits:
                check_loss(loss, shape)
                check_layers(idle)
                log.debug("the longest batch (%s) fits into memory; loss %.3f", shape, loss)
                return size
        if checkpointing != "auto" or trainer.args.gradient_checkpointing:
            break
    even = "" if not trainer.args.gradient_checkpointing else ", even with gradient checkpointing"
    lower = "train.per_device_train_batch_size (raise gradient_accumulation_steps by as much) or "
    raise MoultError(
        f"the longest batch ({shape}) does not fit into the memory of {trainer.args.device}{even}: {said}",
        f"lower {lower if size > 1 else ''}datasets.<name>.max_length, or use a GPU with more memory",
        HOPELESS,
    )


def longest_batch(trainer, size: int) -> tuple[dict, str]:
    """The batch of the longest sequences, and its shape in words."""
    rows = trainer.train_dataset
    lengths = list_value_length(rows.data.column("input_ids")).to_numpy()
    longest = (-lengths).argsort(kind="stable")[:size].tolist()
    batch = trainer.data_collator([rows[index] for index in longest])
    many = "s" if len(longest) > 1 else ""
    return batch, f"{len(longest)} sequence{many} of up to {lengths[longest[0]]:,} tokens"


def checkpoint(trainer) -> None:
    """Turn gradient checkpointing on as TRL and transformers do it where the config asks for it."""
    trainer.args.gradient_checkpointing = trainer.args.activation_checkpointing = True
    trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer.model.enable_input_require_grads()


def check_loss(loss: float, shape: str) -> None:
    if not math.isfinite(loss):
        raise MoultError(
            f"the loss of the longest batch ({shape}) is {loss} before the first step",
            "the base's weights are damaged, or too large for float16: download them again, or set model.dtype: bfloat16",
        )
    check_finite({"loss": loss}, 0)


def check_layers(idle: list[str]) -> None:
    if idle:
        names = sorted({generic(name) for name in idle})
        raise MoultError(
            f"LoRA gets no gradient on {some(names)}: this model, as it runs here, reads their weights past it",
            "name them in lora.exclude_modules (the last part of a name is enough)",
        )


def try_packing(trainer) -> None:
    """Rows that are packed do not see each other, with this model's weights and attention on this device."""
    if not trainer.padding_free:
        return
    first = trainer.train_dataset[0]["input_ids"][:64]
    seen = leak(trainer.model, [first, trainer.train_dataset[-1]["input_ids"][:64]], trainer.args.device)
    if not seen < NOISE:
        key = "packing" if trainer.args.packing else "padding_free"
        raise MoultError(
            f"train.{key}: rows that are packed into one sequence see each other (a row's logits change by {seen:.1%} with "
            "the row before it)",
            f"set train.{key}: false, or another model.attn_implementation",
        )


def try_batch(trainer, batch: dict) -> tuple[bool, float, list[str], str]:
    """Whether the batch fits on all GPUs, its loss, the layers whose LoRA got no gradient, and what torch said of the memory."""
    idle: list[str] = []
    fits, value, said = True, math.nan, ""
    with without_trace(trainer):
        try:
            room = optimizer_room(trainer)
            inputs = trainer._prepare_inputs(dict(batch))
            trained = (inputs["labels"] != IGNORE).sum()
            # Trainer sets it in a step; TRL's loss of a model with experts divides by it.
            trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
            with trainer.maybe_activation_offload_context:
                loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=trained)
                trainer.accelerator.backward(loss)
            value = loss.item()
            idle = layers_without_gradient(trainer.model)
            del room, inputs, loss
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # Not the error itself: its frames hold the tensors of the pass.
            fits, said = False, str(error).splitlines()[0].split(" Of the allocated memory")[0]
    # A process that has no room for a split base has left the others in the middle of a layer. They end with it.
    stuck = trainer.is_distributed_loading_by_transformers and not fits
    if trainer.args.world_size > 1 and not stuck:
        # All processes must decide the same.
        flag = torch.tensor(float(fits), device=trainer.args.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
        fits, said = flag.item() > 0, said or "on another GPU"
    return fits, value, idle, said


def optimizer_room(trainer) -> list[torch.Tensor]:
    """Take the memory that gradients and the optimizer's two moments take in a later step. Returns what holds that of moments."""
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    if trainer.args.gradient_accumulation_steps > 1:
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
    # After a resume the moments are there.
    return [] if trainer.optimizer.state else [torch.empty_like(parameter) for parameter in trained for _ in range(2)]


@contextlib.contextmanager
def without_trace(trainer) -> Iterator[None]:
    """Put back what a forward and backward pass leaves behind: random state, gradients, TRL's averages, training mode.

    The pass goes through the model below DDP, and gathers nothing: a process that runs out of memory would leave the others in
    a collective operation.
    """
    device, mode = trainer.args.device, trainer.model.training
    metrics, tokens = copy.deepcopy(dict(trainer._metrics["train"])), trainer._total_train_tokens
    gradients = trainer.accelerator.gradient_state
    synced = gradients.sync_gradients
    gradients._set_sync_gradients(False)
    trainer.accelerator.gather_for_metrics = lambda values, *_, **__: values
    trainer.model.train()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        del trainer.accelerator.gather_for_metrics
        gradients._set_sync_gradients(synced)
        trainer.model.train(mode)
        trainer.model.zero_grad(set_to_none=True)
        trainer._metrics["train"].clear()
        trainer._metrics["train"].update(metrics)
        trainer._total_train_tokens = tokens
        if device.type == "cuda":
            torch.cuda.empty_cache()
