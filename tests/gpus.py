"""GPUs that torch counts and that compute nothing: what a stage would do on a machine that has them. And their failures."""

import functools
import importlib
import json
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace


def pretend(monkeypatch, count: int = 1, capability: tuple[int, int] = (9, 0)) -> None:
    """Let torch see `count` GPUs."""
    import torch

    answers = {
        "is_available": lambda: count > 0,
        "device_count": lambda: count,
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: "Pretended GPU",
        "mem_get_info": lambda device=None: (10_000, 20_000),
        "is_bf16_supported": lambda *args, **kwargs: capability >= (8, 0),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)


def record_loading(monkeypatch) -> list[dict]:
    """Let no weights be read. Returns the list to which each call of from_pretrained adds its arguments."""
    from moult.model import device as module

    calls: list[dict] = []

    def from_pretrained(folder, **arguments):
        calls.append(arguments)
        return SimpleNamespace(), {"missing_keys": [], "mismatched_keys": []}

    monkeypatch.setattr(module, "auto_class", lambda config: SimpleNamespace(from_pretrained=from_pretrained))
    return calls


# --- for a fork or a process of torchrun: `before` of forked.run, or run as a script ---------------------------------------


def small_memory(tokens: int, rank: int | None = None) -> None:
    """Let training run out of memory with batches of more than `tokens` tokens, or four times as many with checkpointing."""
    import torch

    from moult.training.trainer import Finetuner

    whole = Finetuner.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        limit = tokens * (4 if self.args.gradient_checkpointing else 1)
        if inputs["input_ids"].numel() > limit and rank in (None, self.args.process_index):
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. Of the allocated memory 1.00 GiB"
            )
        return whole(self, model, inputs, *args, **kwargs)

    Finetuner.compute_loss = compute_loss


def without_trial() -> None:
    """Let training begin without the trial of the longest batch."""
    from moult.training.first_batch import FirstBatch

    FirstBatch.on_train_begin = lambda self, *args, **kwargs: None


def run_out(target: str, call: int = 1, rank: int | None = None) -> None:
    """Let the `call`-th call of `target`, `module:name`, run out of memory."""
    import torch

    def run_out_now():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. Of the allocated memory 1.00 GiB")

    _at(target, call, rank, run_out_now)


def die(target: str, mark: str, call: int = 1, rank: int | None = None) -> None:
    """Let the process be killed before the `call`-th call of `target`. The file `mark` says when."""

    def die_now():
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)

    _at(target, call, rank, die_now)


def stop_all(target: str, call: int = 1, rank: int | None = None) -> None:
    """Let torchrun get SIGTERM, as from Slurm, before the `call`-th call of `target`. It passes it on to all processes."""
    _at(target, call, rank, lambda: os.kill(os.getppid(), signal.SIGTERM))


def _at(target: str, call: int, rank: int | None, act: Callable[[], None]) -> None:
    module, _, name = target.partition(":")
    *path, last = name.split(".")
    holder = functools.reduce(getattr, path, importlib.import_module(module))
    original, calls = getattr(holder, last), 0

    def hooked(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call and rank in (None, int(os.environ.get("RANK", 0))):
            act()
        return original(*args, **kwargs)

    setattr(holder, last, hooked)


if __name__ == "__main__":  # python tests/gpus.py '["small_memory", {"tokens": 48}]' scripts/finetune.py <arguments>
    hook, arguments = json.loads(sys.argv[1])
    sys.argv = sys.argv[2:]
    sys.path.insert(0, str(Path(sys.argv[0]).absolute().parent))
    if hook:
        globals()[hook](**arguments)
    runpy.run_path(sys.argv[0], run_name="__main__")
