"""A run of finetune: its settings, its folders, its command."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import forked
from planning import make as make_plan
from workflow import hear_sigint

import finetune
from moult.files import read_jsonl

SETTINGS = {
    "seed": 0,
    "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"},
    "train": {
        "gpu": 1,
        "shard": False,
        "learning_rate": 1e-2,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "max_grad_norm": 1.0,
        "packing": False,
        "padding_free": "auto",
        "train_sampling_strategy": "auto",
        "packing_strategy": "bfd",
        "gradient_checkpointing": "auto",
        "load_best_model_at_end": True,
        "early_stopping_patience": None,
        "early_stopping_threshold": 0.0,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "save_strategy": "steps",
        "save_steps": 3,
        "save_total_limit": 2,
        "logging_steps": 2,
        "report_to": "none",
    },
    "dtype": "float32",
    "quantization": None,
    "attn_implementation": None,
    "trust_remote_code": False,
}


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def settings(**train) -> dict:
    return {**SETTINGS, "train": {**SETTINGS["train"], **train}}


class Run:
    """One run's folders, and the command of the stage in them."""

    def __init__(self, folder: Path, config: dict, base: Path, tokens: Path):
        self.folder, self.config, self.base, self.tokens = folder, config, base, tokens
        folder.mkdir(exist_ok=True)
        (folder / "tokens").unlink(missing_ok=True)
        (folder / "tokens").symlink_to(tokens)
        make_plan(base, folder, config["lora"], config["train"], quantization=config["quantization"])

    def command(self, *more: str) -> list[str]:
        f = self.folder
        return [
            *(sys.executable, finetune.__file__, "--settings", json.dumps(self.config)),
            *("--model", str(self.base), "--tokens", str(self.tokens), "--plan", str(f / "plan.json")),
            *("--state", str(f / "state"), "--adapter", str(f / "adapter"), "--summary", str(f / "adapter.json")),
            *("--training-log", str(f / "training_log.jsonl"), "--log-file", str(f / "finetune.log"), *more),
        ]

    def go(self, *more: str, code: int = 0, launcher: tuple[str, ...] = (), before=None) -> subprocess.CompletedProcess:
        """Run the stage in a fork (`before`: see `forked.run`), or with a launcher of its own."""
        python, *command = self.command(*more)
        if launcher:
            done = subprocess.run([*launcher, *command], capture_output=True, text=True, timeout=300)
        else:
            returncode, said = forked.run(command, before=before)
            done = subprocess.CompletedProcess([python, *command], returncode, stderr=said)
        assert done.returncode == code, done.stderr[-5000:]
        return done

    def adapter(self) -> bytes:
        return (self.folder / "adapter" / "adapter_model.safetensors").read_bytes()

    def losses(self) -> list[tuple]:
        keys = (
            "step",
            "loss",
            "grad_norm",
            "learning_rate",
            "eval_loss",
            "num_tokens",
            "entropy",
            "mean_token_accuracy",
        )
        return [tuple(entry.get(key) for key in keys) for entry in read_jsonl(self.folder / "training_log.jsonl")]


def tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models

    words = {"<pad>": 0, "<bos>": 1, "<end>": 2} | {f"w{index}": index for index in range(3, 128)}
    Tokenizer(models.WordLevel(words, unk_token="w3")).save(str(folder / "tokenizer.json"))
    specials = {"bos_token": "<bos>", "eos_token": "<end>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **specials})
    )


def copy_state(source: Run, target: Run) -> None:
    shutil.copytree(source.folder / "state", target.folder / "state")


def kill_at(run: Run, step: int, number: int, launcher: tuple[str, ...] = (sys.executable,)) -> int:
    """Start the stage, send `number` when the training log of the state has reached `step`, and return its exit code."""
    log = run.folder / "state" / "training_log.jsonl"
    # Steps of a tiny model pass in milliseconds: a slow one makes the instant sure.
    slow = "import time; from moult.training import trainer; f = trainer.Watch.on_step_end\n"
    slow += "def g(self, a, s, c, **k):\n    time.sleep(0.15); return f(self, a, s, c, **k)\ntrainer.Watch.on_step_end = g\n"
    slow += f"import sys, runpy; sys.argv = sys.argv[1:]; runpy.run_path({finetune.__file__!r}, run_name='__main__')"
    script = run.folder / "slow.py"
    script.write_text(slow)
    process = subprocess.Popen(
        [*launcher, script, *run.command()[1:]],
        env={**os.environ, "PYTHONPATH": str(Path(finetune.__file__).parent)},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_sigint,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and any(
            json.loads(line)["step"] >= step for line in log.read_text().splitlines() if line.endswith("}")
        ):
            process.send_signal(number)
            break
        time.sleep(0.01)
    process.communicate(timeout=60)
    return process.returncode
