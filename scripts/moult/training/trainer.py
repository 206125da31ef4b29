"""The trainer of finetune: SFTTrainer with a validation loss per token, complete checkpoints, a stop at a signal, and speed.

Importing this imports trl, which takes seven seconds.
"""

import inspect
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

from moult.data.sequence import IGNORE
from moult.errors import MoultError
from moult.measuring.likelihood import likelihood
from moult.model.device import enough_memory
from moult.model.lora import lora_layers
from moult.model.shrunken import of_one_layer
from moult.training.batches import Collator
from moult.training.checkpoints import STAGING, TRAINING_LOG, prune, seal
from moult.training.early_stopping import EarlyStopping
from moult.training.first_batch import FirstBatch, OtherBatch
from moult.training.throughput import Work, cost_of, line
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
        unmasked: padded rows need no attention mask (packing.try_batches).
        early_stopping: when training ends before its last step.
        stop_after: the step at which it ends, though the schedule goes on. None: at the last step.
    """

    control: Any  # Trainer's own
    data_collator: Any

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
        unmasked: bool,
        early_stopping: EarlyStopping,
        stop_after: int | None,
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
        self.stop, self.resume, self.early_stopping, self.stop_after = stop, resume, early_stopping, stop_after
        self.staging = state / STAGING
        self.other_seconds = 0.0
        self.start_clock()
        base = self.model.get_base_model()
        self.cost = cost_of(base)
        # TRL's own loss for what is more than the likelihood.
        self.own_loss = self.args.loss_type == "nll" and self.label_smoother is None and not self.aux_loss_enabled
        # TRL's fused head is fast on a GPU. On a CPU it also scores what is not trained, and computes each logit twice.
        self.plain_head = self.args.use_cpu and "logits_to_keep" in inspect.signature(base.forward).parameters
        self.data_collator = Collator(self.data_collator, unmasked and self.own_loss)
        if self.args.bf16 or self.args.fp16:
            # peft casts what goes into an adapter to float32, and autocast casts it back.
            for module in self.model.modules():
                if hasattr(module, "cast_input_dtype_enabled"):
                    module.cast_input_dtype_enabled = False
        self._choose_ddp()
        # A checkpoint does not need the tokenizer, which can be ten times as large as the adapter.
        self.processing_class = None
        self.add_callback(FirstBatch(self, checkpointing, sizes))
        self.add_callback(Watch(self))

    def _choose_ddp(self) -> None:
        """What the config leaves to transformers (5.23), whose defaults for a model of peft's cost time in each pass: it looks
        for parameters that got no gradient, and sends the buffers of the first process to the others."""
        if self.args.ddp_find_unused_parameters is None:
            names = [name for name, _ in lora_layers(self.model)]
            # An expert that no token was sent to gets none.
            self.args.ddp_find_unused_parameters = any(of_one_layer(name) != name for name in names)
        if self.args.ddp_broadcast_buffers is None:
            self.args.ddp_broadcast_buffers = False

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        except OtherBatch:
            # Trainer can be called again: it keeps the prepared model, and makes the loader and the schedule anew.
            return super().train(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        def doing() -> str:
            rows, length = inputs["input_ids"].shape
            size = f"{length:,} tokens, without padding" if self.padding_free else f"{rows} x {length:,} tokens"
            return f"training step {self.state.global_step + 1:,} (a batch of {size})"

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

    # --- loss ---

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The negative log-likelihood of the trained tokens, divided as TRL (1.16) does. TRL's version waits five times for
        the GPU, and gathers four times from all processes, for figures that are needed once for each line of the log."""
        inputs.pop("counts", None)
        if not self.own_loss:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        scores = self._plain_scores if self.plain_head else self._fused_scores
        nll, correct, scored = scores(model, inputs)
        if self.model.training:
            self._metrics["train"]["mean_token_accuracy"].append(correct / scored.clamp(min=1))
        # Clamped so that a batch without trained tokens gives 0, not 0 / 0.
        loss = nll / torch.as_tensor(scored if num_items_in_batch is None else num_items_in_batch).clamp(min=1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.args.world_size  # DDP averages the gradients of the processes
        return loss

    def _fused_scores(self, model, inputs: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The summed negative log-likelihood, how many first choices were right, and of how many."""
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        return -outputs.log_probs.sum(), outputs.is_top1.sum(), outputs.label_mask.sum()

    def _plain_scores(self, model, inputs: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same, with the logits of the positions at which a token of some row is trained."""
        targets = inputs.pop("labels")[:, 1:]
        columns = (targets != IGNORE).any(dim=0).nonzero().squeeze(-1)
        logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits
        targets = targets[:, columns]
        scored = targets != IGNORE
        logits, targets = logits[scored].float(), targets[scored]
        nll = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        return nll, (logits.argmax(dim=-1) == targets).sum(), scored.sum()

    # --- throughput ---

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        started = time.monotonic()
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.work.add(waited=time.monotonic() - started)
        for batch in samples:
            tokens, squares, padded = batch.pop("counts")
            self.work.add(tokens=tokens, squares=squares, padded=padded)
            if self.own_loss:
                self._total_train_tokens += tokens  # of this process; TRL's own loss counts those of all
        return samples, items

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._speed()
        if self.own_loss:
            logs["num_tokens"] = int(self._over_processes([self._total_train_tokens])[0])
            own = self._metrics["train"]
            means = self._over_processes([sum(map(float, values)) / len(values) for values in own.values()])
            own.update({name: [mean / self.args.world_size] for name, mean in zip(own, means, strict=True)})
        super().log(logs, start_time)

    def start_clock(self) -> None:
        self.work, self.clock = Work(), time.monotonic() - self.other_seconds

    def _speed(self) -> dict[str, float]:
        """Of the steps since the last line of the log, or since the start."""
        seconds = time.monotonic() - self.other_seconds - self.clock
        work = Work(*self._over_processes(self.work.figures()))
        self.start_clock()
        return line(work, seconds, self.cost, self.args.gradient_checkpointing, self.args.world_size, self.args.device)

    def _over_processes(self, values: list[float]) -> list[float]:
        """The sums of the values of all processes."""
        if self.args.world_size == 1:
            return values
        sums = torch.tensor(values, dtype=torch.float64, device=self.args.device)
        torch.distributed.all_reduce(sums)
        return sums.tolist()

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
            "metrics": {name: [float(value) for value in values] for name, values in self._metrics["train"].items()},
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
        # A column of a datasets.Dataset reads the row for each of them.
        self.sampler.lengths = list(sampler.lengths)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self):
        epoch = int(self.trainer.state.epoch or 0)
        self.sampler.generator = torch.Generator().manual_seed(self.trainer.args.data_seed + epoch)
        return iter(self.sampler)
