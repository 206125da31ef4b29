"""What is done during training, besides training: log, progress bar, signals, checks."""

import json
import math

import torch
import torch.distributed
from transformers import TrainerCallback
from transformers.trainer_callback import DefaultFlowCallback

from moult.errors import MoultError
from moult.run.console import log, progress
from moult.training.checkpoints import TRAINING_LOG


class Watch(TrainerCallback):
    """Training log, progress bar, signals, and the checks that are possible only during training."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.path = trainer.state_folder / TRAINING_LOG
        self.bar: progress | None = None
        self.note = self.validated = ""
        self.resumed_from: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer.resume:
            self.trainer.restore_averages(self.trainer.resume)
            self.resumed_from = state.global_step
        if state.is_world_process_zero:
            self.bar = progress(self._last(state), "steps", initial=state.global_step)
        self.trainer.start_clock()

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar:
            self.bar.update(note=self.note)
        if state.epoch.is_integer():
            DefaultFlowCallback().on_epoch_end(args, state, control)
        last = state.global_step >= self._last(state)
        if last and args.eval_strategy != "no":
            control.should_evaluate = True
        if last or self._asked_to_stop():
            control.should_save = True
            control.should_training_stop = True

    def _last(self, state) -> int:
        return min(state.max_steps, self.trainer.stop_after or state.max_steps)

    def on_epoch_end(self, args, state, control, **kwargs):
        # on_step_end has done this work in the last step of the epoch. Otherwise the checkpoint of that step would miss the
        # validation. Also, transformers calls this in the middle of an epoch if training stops there.
        control.should_log = control.should_evaluate = control.should_save = False

    def on_evaluate(self, args, state, control, **kwargs):
        # The loss is a sum over all processes, so all of them decide the same.
        if state.global_step < state.max_steps and self.trainer.early_stopping.ends(state.log_history):
            control.should_save = True
            control.should_training_stop = True
            if state.is_world_process_zero:
                self._write({"step": state.global_step, "epoch": state.epoch, "stopped_early": True})

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
            if self.resumed_from is not None:
                entry["resumed_from"], self.resumed_from = self.resumed_from, None
            self.note = f"loss {logs['loss']:.3f}{self.validated}, {entry['tokens_per_second']:,.0f} tokens/s"
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
