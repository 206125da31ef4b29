"""The trainer of finetune: SFTTrainer with a validation loss per token, complete checkpoints, and a stop at a signal.

Importing this imports trl, which takes seven seconds.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from safetensors import SafetensorError
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import SaveStrategy
from trl import SFTTrainer

from moult.errors import MoultError
from moult.measuring.likelihood import likelihood
from moult.model.device import enough_memory
from moult.training.checkpoints import STAGING, TRAINING_LOG, prune, seal
from moult.training.first_batch import FirstBatch, OtherBatch
from moult.training.watch import Watch


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
        checkpointing: train.gradient_checkpointing of the config.
        sizes: batch sizes to try, the largest first (arguments.batch_sizes).
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
        checkpointing: bool | str,
        sizes: list[int],
        **kwargs,
    ):
        # transformers (5.23, trainer.py:632) refuses to save what it has loaded in parts, because the optimizer's state would be
        # in parts too. Here it is not: only the adapter is trained, and that is whole.
        strategy, kwargs["args"].save_strategy = kwargs["args"].save_strategy, SaveStrategy.NO
        super().__init__(*args, **kwargs)
        self.args.save_strategy = strategy
        if getattr(self.model.get_base_model(), "is_quantized", False):
            # TRL (1.16, sft_trainer.py:908) has cast the adapter to bfloat16, in which small updates are lost.
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        self.state_folder, self.fingerprint = state, fingerprint
        self.val_rows, self.pad_id = val_rows, pad_id
        self.keep_best, self.keep = keep_best, keep
        self.stop, self.resume = stop, resume
        self.staging = state / STAGING
        self.other_seconds = 0.0
        # A checkpoint does not need the tokenizer, which can be ten times as large as the adapter.
        self.processing_class = None
        self.add_callback(FirstBatch(self, checkpointing, sizes))
        self.add_callback(Watch(self))

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        except OtherBatch:
            # Trainer can be called again: it keeps the prepared model, and makes the loader and the schedule anew.
            return super().train(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        def doing() -> str:
            rows, length = inputs["input_ids"].shape
            return f"training step {self.state.global_step + 1:,} (a batch of {rows} x {length:,} tokens)"

        with enough_memory(
            doing,
            "lower train.per_device_train_batch_size (raise gradient_accumulation_steps by as much), or set "
            "train.gradient_checkpointing: true",
        ):
            return super().training_step(model, inputs, num_items_in_batch)

    # --- order of rows ---

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        return SeededByEpoch(sampler, self) if isinstance(sampler, LengthGroupedSampler) else sampler

    # --- validation ---

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """`eval_loss` in nats per trained token, over all validation rows. (Trainer computes a mean of batch means.)"""
        started = time.monotonic()
        self.model.eval()
        longest = max((len(row["input_ids"]) for row in self.val_rows), default=0)
        with (
            self.compute_loss_context_manager(),
            enough_memory(
                f"measuring the validation loss at step {self.state.global_step:,} (rows of up to {longest:,} tokens)",
                "lower datasets.<name>.max_length, or use a GPU with more memory",
            ),
        ):
            place = self.args.process_index, self.args.world_size
            results = likelihood(self.model, self.val_rows, self.pad_id, "validation", *place)
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

    def _save(self, output_dir=None, state_dict=None) -> None:
        if self.is_distributed_loading_by_transformers:
            # Otherwise every process would gather the whole base (peft 0.21, save_and_load.py:224), to save the adapter.
            state_dict = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        super()._save(output_dir, state_dict)

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
