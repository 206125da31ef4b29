"""The settings of the trainer. plan checks them before a GPU is used, finetune trains with them."""

from pathlib import Path

from moult.errors import MoultError
from moult.training.batches import Batches

# Keys of the train section that are Moult's own, or that Moult passes on in another form.
NOT_THEIRS = (
    *("gpu", "nodes", "gpu_memory", "shard", "gradient_checkpointing"),
    *("early_stopping_patience", "early_stopping_threshold"),
)


def batch_sizes(train: dict, device: str | None, found: int | None = None) -> list[int]:
    """The sizes of a batch on each GPU that finetune may train with, the largest first.

    With `auto` a step has gradient_accumulation_steps sequences on each GPU, in the largest batches that fit. `found` is what
    an earlier attempt has found.
    """
    size, per_step = train["per_device_train_batch_size"], train["gradient_accumulation_steps"]
    if size != "auto":
        return [size]
    most = found or (per_step if device == "cuda" else 4)  # a CPU says nothing when its memory is full
    return [number for number in range(most, 0, -1) if per_step % number == 0]


def checkpointed_at_once(train: dict) -> bool:
    """Whether gradient checkpointing is on from the start. `auto` with a split base too: it is there to save memory, and a pass
    that has run out of it in the middle leaves the parts in a state from which nothing can be tried again."""
    return train["gradient_checkpointing"] is True or (train["gradient_checkpointing"] == "auto" and train["shard"])


def trainer_config(
    settings: dict,
    state: str | Path,
    device: str | None,
    max_length: int,
    batches: Batches | None = None,
    found: int | None = None,
):
    """trl.SFTConfig from the `train` section and the fields that finetune sets. Raises MoultError if TRL refuses it.

    device: `cuda`, `cpu`, or None to check the section for whichever it will be.
    batches: what the config leaves open about them.
    found: the batch size that an earlier attempt has found, for `auto`.
    """
    from trl import SFTConfig

    batches = batches or Batches()
    if device == "cpu":
        refuse_on_cpu(settings["train"])

    train = {name: value for name, value in settings["train"].items() if name not in NOT_THEIRS}
    train |= {"padding_free": batches.padding_free, "train_sampling_strategy": batches.order}
    train.setdefault("pad_to_multiple_of", batches.multiple)
    if train["per_device_train_batch_size"] == "auto":
        size = batch_sizes(train, device, found)[0]
        train["gradient_accumulation_steps"] //= size
        train["per_device_train_batch_size"] = size
    half = settings["dtype"] != "float32" if device == "cuda" else batches.bfloat16
    own = {
        "output_dir": str(state),
        "seed": settings["seed"],
        "data_seed": settings["seed"],
        "use_cpu": device != "cuda",
        "bf16": half and settings["dtype"] == "bfloat16",
        "fp16": half and settings["dtype"] == "float16",
        "gradient_checkpointing": checkpointed_at_once(settings["train"]),
        "max_length": max_length if train["packing"] else None,
        "eval_packing": False,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        # Finetuner keeps the checkpoints, and the best of them, itself.
        "load_best_model_at_end": False,
        "save_total_limit": None,
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
    }
    try:
        return SFTConfig(**(train | own))
    except (TypeError, ValueError) as error:
        raise MoultError(f"train: {str(error).splitlines()[0]}", "fix the train section of the config") from error


def refuse_on_cpu(train: dict) -> None:
    """Raises MoultError for what makes training slower on a CPU, or impossible."""
    if train.get("torch_compile"):
        raise MoultError(
            "train.torch_compile: on a CPU a step takes a hundred times as long with it", "leave it out, or use a GPU"
        )
    if train.get("use_liger_kernel"):
        raise MoultError("train.use_liger_kernel: its kernels run only on a GPU", "leave it out, or use a GPU")


def check_trainer(config, model) -> None:
    """Raises MoultError for errors that Trainer would raise later: a missing package, a schedule without a required argument.
    `model` may be without weights."""
    from torch import nn, optim
    from transformers import Trainer
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks
    from transformers.optimization import get_scheduler

    checks = {
        "use_liger_kernel": lambda: check_liger(config),
        "report_to": lambda: [callback() for callback in get_reporting_integration_callbacks(config.report_to)],
        "optim": lambda: Trainer.get_optimizer_cls_and_kwargs(config, model),
        "lr_scheduler_type": lambda: get_scheduler(
            config.lr_scheduler_type,
            optim.SGD([nn.Parameter()]),
            num_warmup_steps=1,
            num_training_steps=2,
            scheduler_specific_kwargs=config.lr_scheduler_kwargs,
        ),
    }
    problems = []
    for name, check in checks.items():
        try:
            check()
        except (ImportError, RuntimeError, ValueError, TypeError, KeyError) as error:
            problems.append(f"train.{name}: {str(error).strip().splitlines()[0]}")
    if problems:
        raise MoultError("\n    ".join(problems), "fix the train section of the config, or install the missing package")


def check_liger(config) -> None:
    from transformers.utils import is_liger_kernel_available

    if config.use_liger_kernel and not is_liger_kernel_available():
        raise ImportError("the package liger-kernel is not installed")


def show_backbone(model) -> None:
    """Lead `model.base_model` to the part below the head, in place. Of some models it leads to themselves (Llama4ForCausalLM,
    whose base_model_prefix names a part that it does not have), and TRL's fused loss asks it for hidden states (TRL 1.16)."""
    if model.base_model is model:
        parts = [name for name, part in model.named_children() if hasattr(part, "get_input_embeddings")]
        if len(parts) == 1:
            model.base_model_prefix = parts[0]
