"""The trainer of finetune: SFTTrainer with a validation loss per token, complete checkpoints, and a stop at a signal.

Importing this imports trl, which takes seven seconds.
"""

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from safetensors import SafetensorError
from torch.utils.data import Sampler
from transformers import TrainerCallback
from transformers.trainer_callback import DefaultFlowCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import SFTTrainer

from moult.errors import MoultError, some
from moult.measuring.likelihood import likelihood
from moult.model.shrunken import generic
from moult.run.console import log, progress
from moult.training.checkpoints import STAGING, TRAINING_LOG, prune, seal
from moult.training.packing import NOISE, leak
from moult.training.trial import layers_without_gradient


class Finetuner(SFTTrainer):
    """SFTTrainer with a few changes that Moult's promises need.

    Args (besides SFTTrainer's):
        state: the trainer_state folder of the run, locked by this process.
        fingerprint: what a checkpoint must match to be resumed (checkpoints.py).
        val_rows: dicts with input_ids and labels; may be empty if eval_strategy is "no".
        pad_id: padding token for validation batches.
        keep_best: also keep the checkpoint with the lowest validation loss.
        keep: number of newest checkpoints to keep.
        stop: finetune.StopSignal.
        resume: the checkpoint from which train() will continue, or None.
    """

    control: Any  # Trainer's own

    def __init__(
        self,
        *args,
        state: Path,
        fingerprint: dict,
        val_rows: list[dict],
        pad_id: int,
        keep_best: bool,
        keep: int,
        stop,
        resume: Path | None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.state_folder, self.fingerprint = state, fingerprint
        self.val_rows, self.pad_id = val_rows, pad_id
        self.keep_best, self.keep = keep_best, keep
        self.stop, self.resume = stop, resume
        self.staging = state / STAGING
        self.other_seconds = 0.0
        # A checkpoint does not need the tokenizer, which can be ten times as large as the adapter.
        self.processing_class = None
        self.add_callback(Watch(self))

    # --- order of rows ---

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        return SeededByEpoch(sampler, self) if isinstance(sampler, LengthGroupedSampler) else sampler

    # --- validation ---

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """`eval_loss` in nats per trained token, over all validation rows. (Trainer computes a mean of batch means.)"""
        started = time.monotonic()
        self.model.eval()
        rows = self.val_rows[self.args.process_index :: self.args.world_size]
        with self.compute_loss_context_manager():
            results = likelihood(self.model, rows, self.pad_id, "validation")
        sums = torch.tensor(
            [sum(result.nll for result in results), sum(result.tokens for result in results)],
            dtype=torch.float64,
            device=self.args.device,
        )
        if self.args.world_size > 1:
            torch.distributed.all_reduce(sums)
        self.model.train()
        metrics = {f"{metric_key_prefix}_loss": (sums[0] / sums[1]).item()}
        if self.keep_best and (self.state.best_metric is None or metrics["eval_loss"] < self.state.best_metric):
            self.control.should_save = True
        self.other_seconds += time.monotonic() - started
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # --- checkpoints ---

    def _get_output_dir(self, trial) -> str:
        # _save_checkpoint writes here. A complete checkpoint is then moved to its place.
        return str(self.staging)

    def _save_checkpoint(self, model, trial) -> None:
        started = time.monotonic()
        if self.is_world_process_zero():
            shutil.rmtree(self.staging, ignore_errors=True)
        self._wait_for_all()
        staged = self.staging / f"checkpoint-{self.state.global_step}"
        try:
            # Skips SFTTrainer's version, which writes a model card into every checkpoint.
            super(SFTTrainer, self)._save_checkpoint(model, trial)
            self._averages_file(staged).write_text(json.dumps(self._averages()))
            self._wait_for_all()
            if self.is_world_process_zero():
                shutil.copyfile(self.state_folder / TRAINING_LOG, staged / TRAINING_LOG)
                seal(staged, self.state_folder, self.fingerprint)
                prune(self.state_folder, self.keep, self.keep_best)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise self._cannot_save(error) from error
        finally:
            if self.is_world_process_zero():
                shutil.rmtree(self.staging, ignore_errors=True)
        self._wait_for_all()
        self.other_seconds += time.monotonic() - started

    def _cannot_save(self, error: Exception) -> MoultError:
        free = shutil.disk_usage(self.state_folder).free
        size = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad) * 12
        return MoultError(
            f"{self.state_folder}: the checkpoint of step {self.state.global_step} cannot be written: "
            f"{str(error).splitlines()[0]} (it needs about {size:,} bytes; {free:,} are free)",
            "free space or fix the permissions of the folder, and run the same command again: earlier checkpoints are kept",
        )

    def _wait_for_all(self) -> None:
        if self.args.world_size > 1:
            torch.distributed.barrier()

    # transformers and TRL keep the sums for the next log line only in memory. Without this, the first line after a resume would
    # be the average of fewer steps.

    def _averages_file(self, folder: Path) -> Path:
        return folder / f"averages_{self.args.process_index}.json"

    def _averages(self) -> dict:
        return {
            "loss": self._tr_loss.item(),
            "last_logged": self._globalstep_last_logged,
            "metrics": self._metrics["train"],
            "tokens": self._total_train_tokens,
        }

    def restore_averages(self, folder: Path) -> None:
        content = json.loads(self._averages_file(folder).read_text())
        self._tr_loss += content["loss"]
        self._globalstep_last_logged = content["last_logged"]
        self._metrics["train"].update(content["metrics"])
        self._total_train_tokens = content["tokens"]


class SeededByEpoch(Sampler):
    """group_by_length with an order that depends only on seed and epoch. transformers (5.23) uses the global random state, which
    differs when an epoch is resumed: some rows would be trained twice and others not at all."""

    def __init__(self, sampler: LengthGroupedSampler, trainer: Finetuner):
        self.sampler, self.trainer = sampler, trainer

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self):
        epoch = int(self.trainer.state.epoch or 0)
        self.sampler.generator = torch.Generator().manual_seed(self.trainer.args.data_seed + epoch)
        return iter(self.sampler)


class Watch(TrainerCallback):
    """Training log, progress bar, signals, and the checks that are possible only during training."""

    def __init__(self, trainer: Finetuner):
        self.trainer = trainer
        self.path = trainer.state_folder / TRAINING_LOG
        self.bar: progress | None = None
        self.note = self.validated = ""

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer.resume:
            self.trainer.restore_averages(self.trainer.resume)
        if state.is_world_process_zero:
            self.bar = progress(state.max_steps, "steps", initial=state.global_step)
        self._start_clock()

    def _start_clock(self) -> None:
        self.clock = time.monotonic() - self.trainer.other_seconds
        self.tokens = self.trainer._total_train_tokens

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar:
            self.bar.update(note=self.note)
        if state.epoch.is_integer():
            DefaultFlowCallback().on_epoch_end(args, state, control)
        last = state.global_step >= state.max_steps
        if last and args.eval_strategy != "no":
            control.should_evaluate = True
        if last or self._asked_to_stop():
            control.should_save = True
            control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        # on_step_end has done this work in the last step of the epoch. Otherwise the checkpoint of that step would miss the
        # validation. Also, transformers calls this in the middle of an epoch if training stops there.
        control.should_log = control.should_evaluate = control.should_save = False

    def _asked_to_stop(self) -> bool:
        received = self.trainer.stop.received is not None
        if self.trainer.args.world_size == 1:
            return received
        # All processes must stop at the same step, but not all of them get the signal.
        flag = torch.tensor(float(received), device=self.trainer.args.device)
        torch.distributed.all_reduce(flag)
        return flag.item() > 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        check_finite(logs, state.global_step)
        if not state.is_world_process_zero or "train_runtime" in logs:
            return
        entry = {"step": state.global_step, "epoch": state.epoch, **logs}
        if "loss" in logs:
            seconds = time.monotonic() - self.trainer.other_seconds - self.clock
            entry["tokens_per_second"] = (self.trainer._total_train_tokens - self.tokens) / seconds
            self.note = f"loss {logs['loss']:.3f}{self.validated}, {entry['tokens_per_second']:,.0f} tokens/s"
            self._start_clock()
        if "eval_loss" in logs:
            self.validated = f", val {logs['eval_loss']:.4f}"
            log.debug("step %s: validation loss %.4f", f"{state.global_step:,}", logs["eval_loss"])
        self._write(entry)

    def _write(self, entry: dict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(entry, sort_keys=True) + "\n")

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar:
            self.bar.close()
            if args.device.type == "cuda":
                self._write({"step": state.global_step, "peak_gpu_bytes": torch.cuda.max_memory_allocated()})


def check_finite(logs: dict, step: int) -> None:
    """Stop if a loss is not finite or exactly 0. transformers would continue (trl#6668, transformers#34494)."""
    for name in ("loss", "grad_norm", "eval_loss"):
        if name in logs and not math.isfinite(logs[name]):
            raise MoultError(
                f"step {step:,}: {name} is {logs[name]}",
                "lower train.learning_rate or train.max_grad_norm; with float16, set model.dtype: bfloat16",
            )
    if logs.get("loss") == 0.0:
        raise MoultError(
            f"step {step:,}: the loss is exactly 0: the model does not learn",
            "check in tokens/preview.html that tokens are marked",
        )


def try_longest_batch(trainer: Finetuner, checkpointing: bool | str) -> None:
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


def try_packing(trainer: Finetuner) -> None:
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


def _try_batch(trainer: Finetuner, batch: dict) -> tuple[bool, float, list[str]]:
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
