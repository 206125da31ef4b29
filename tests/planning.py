"""Plans of small models, made in this process."""

import contextlib
from argparse import Namespace
from unittest.mock import patch

from tiny import make_tokens

import plan
from moult.files import read_json
from moult.training import memory

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
TRAIN = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "gpu": 1,
    "nodes": 1,
    "shard": False,
    "gpu_memory": None,
    "packing": False,
    "padding_free": "auto",
    "train_sampling_strategy": "auto",
    "packing_strategy": "bfd",
    "save_total_limit": 2,
    "warmup_steps": 0,
    "gradient_checkpointing": "auto",
    "early_stopping_patience": None,
    "lr_scheduler_type": "cosine",
}


class Log:
    def __init__(self):
        self.lines = []

    def info(self, message, *values):
        self.lines.append(message % values)

    debug = warning = info


# Nothing is asked, so nothing is told of it.
EVAL = {
    "prompts": [],
    "answer_rows": 0,
    "row_expect": {},
    "max_rows": None,
    "perplexity": False,
    "forgetting": False,
    "confidence": 0.95,
}


def make(
    base,
    tmp_path,
    lora=None,
    train=None,
    dtype="bfloat16",
    attention=None,
    prompts=(),
    quantization=None,
    questions=None,
    simulated=False,
):
    """What plan writes, and its log. Its memory is by the formula, which takes no time, unless `simulated`."""
    settings = {
        "lora": {**LORA, **(lora or {})},
        "train": {**TRAIN, **(train or {})},
        "dtype": dtype,
        "quantization": quantization,
        "attn_implementation": attention,
        "chat_template_kwargs": {},
        "trust_remote_code": False,
    }
    tokens = tmp_path / "tokens"
    if not tokens.exists():
        make_tokens(tokens)
    log = Log()
    arguments = Namespace(
        model=str(base),
        tokens=str(tokens),
        eval={**EVAL, "prompts": prompts, **(questions or {})},
        out=str(tmp_path / "plan.json"),
    )
    with contextlib.nullcontext() if simulated else patch.object(memory, "simulate", side_effect=RuntimeError):
        plan.plan(settings, arguments, log)
    return read_json(tmp_path / "plan.json"), log
