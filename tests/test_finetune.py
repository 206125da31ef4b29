"""finetune: the same result however often it is interrupted, the same loss however it is batched, and stops at what is wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_plan import make as make_plan
from tiny import change_tensors, make_model, make_tokens

import finetune
from moult.files import read_json, read_jsonl
from moult.training.checkpoints import checkpoint_folders, seal

SETTINGS = {
    "seed": 0,
    "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"},
    "train": {
        "gpu": 1,
        "learning_rate": 1e-2,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "max_grad_norm": 1.0,
        "packing": False,
        "packing_strategy": "bfd",
        "gradient_checkpointing": "auto",
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "save_strategy": "steps",
        "save_steps": 3,
        "save_total_limit": 2,
        "logging_steps": 2,
        "report_to": "none",
    },
    "dtype": "bfloat16",
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
        make_plan(base, folder, config["lora"], config["train"])

    def command(self, *more: str) -> list[str]:
        f = self.folder
        return [
            *(sys.executable, finetune.__file__, "--settings", json.dumps(self.config)),
            *("--model", str(self.base), "--tokens", str(self.tokens), "--plan", str(f / "plan.json")),
            *("--state", str(f / "state"), "--adapter", str(f / "adapter"), "--summary", str(f / "adapter.json")),
            *("--training-log", str(f / "training_log.jsonl"), "--log-file", str(f / "finetune.log"), *more),
        ]

    def go(self, *more: str, code: int = 0, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        command = self.command(*more)
        if launcher:
            command[:1] = launcher
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
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


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from moult.files import write_json

    folder = make_model(tmp_path_factory.mktemp("base") / "base", kind="qwen3", tie_word_embeddings=True)
    tokenizer(folder)
    write_json(folder / "generation_config.json", {"eos_token_id": 2})
    return folder


def tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models

    words = {"<pad>": 0, "<bos>": 1, "<end>": 2} | {f"w{index}": index for index in range(3, 128)}
    Tokenizer(models.WordLevel(words, unk_token="w3")).save(str(folder / "tokenizer.json"))
    specials = {"bos_token": "<bos>", "eos_token": "<end>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **specials})
    )


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return make_tokens(tmp_path_factory.mktemp("tokens"), rows=18)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, base, tokens):
    """15 steps over three epochs, with dropout, accumulation and the best of several validations."""
    run = Run(tmp_path_factory.mktemp("undisturbed"), settings(), base, tokens)
    run.go()
    return run


@pytest.fixture
def run(tmp_path, base, tokens):
    return lambda config=None, name="run": Run(tmp_path / name, config or settings(), base, tokens)


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_what_is_published(undisturbed):
    folder = undisturbed.folder
    summary = read_json(folder / "adapter.json")
    history = list(read_jsonl(folder / "training_log.jsonl"))
    validations = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    assert list(validations) == [5, 10, 15]
    assert summary["steps"] == 15 and summary["step"] == min(validations, key=validations.get)
    assert summary["validation_loss"] == {"published": min(validations.values()), "last": validations[15]}
    config = read_json(folder / "adapter" / "adapter_config.json")
    assert config["target_modules"] == sorted(config["target_modules"])
    assert str(folder.parent) not in json.dumps(config) and config["base_model_name_or_path"] == "base"
    names = {path.name for path in (folder / "adapter").iterdir()}
    assert names == {
        *("adapter_model.safetensors", "adapter_config.json", "chat_template.jinja", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in (folder / "adapter").iterdir())
    assert all({"loss", "grad_norm", "learning_rate", "tokens_per_second"} <= set(e) for e in history if "loss" in e)
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


def test_validation_loss_is_per_token_over_all_rows(undisturbed, base, tokens):
    """Computed again, a row at a time, from the published adapter."""
    import pyarrow.parquet
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), undisturbed.folder / "adapter").eval()
    nll = count = 0
    for row in pyarrow.parquet.read_table(tokens / "val.parquet").to_pylist():
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        nll += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += (labels != -100).sum().item()
    published = read_json(undisturbed.folder / "adapter.json")["validation_loss"]["published"]
    assert nll / count == pytest.approx(published, rel=1e-5)


def test_old_checkpoints_are_pruned_but_the_best_is_kept(undisturbed):
    best = read_json(undisturbed.folder / "adapter.json")["step"]
    left = {int(path.name.split("-")[1]) for path in (undisturbed.folder / "state").glob("checkpoint-*")}
    assert left == {12, 15} | {best} or left == {15, best} | {max(s for s in (10, 12, 13, 14) if s in left)}
    assert len(left) <= 3


def test_the_last_step_is_published_if_so_wished(run, undisturbed):
    last = run(settings(load_best_model_at_end=False))
    last.go()
    assert read_json(last.folder / "adapter.json")["step"] == 15


def test_a_finished_run_trains_no_step_more(undisturbed):
    before = undisturbed.adapter()
    done = undisturbed.go()
    assert "nothing to train" in done.stderr
    assert undisturbed.adapter() == before


# --- resume -----------------------------------------------------------------------------------------------------------


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


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 8])
def test_a_killed_run_ends_with_the_same_bytes(step, run, undisturbed):
    killed = run()
    assert kill_at(killed, step, signal.SIGKILL) == -signal.SIGKILL
    assert not (killed.folder / "adapter").exists()
    done = killed.go()
    assert ("going on from" in done.stderr) == (step > 3)
    assert killed.adapter() == undisturbed.adapter()
    assert killed.losses() == undisturbed.losses()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_next_attempt_goes_on(number, run, undisturbed):
    stopped = run()
    assert kill_at(stopped, 4, number) == 75
    log = (stopped.folder / "finetune.log").read_text()
    assert "checkpoint saved" in log and "run the same command again to go on" in log
    assert not (stopped.folder / "adapter").exists()
    assert "going on from" in stopped.go().stderr
    assert stopped.adapter() == undisturbed.adapter()
    assert stopped.losses() == undisturbed.losses()


@pytest.mark.slow
def test_a_signal_to_torchrun_saves_too(run):
    config = settings(gpu=2)
    whole, stopped = run(config, "whole"), run(config, "stopped")
    whole.go(launcher=TORCHRUN)
    assert kill_at(stopped, 4, signal.SIGTERM, TORCHRUN) == 1
    assert "checkpoint saved" in (stopped.folder / "finetune.log").read_text()
    assert "going on from" in stopped.go(launcher=TORCHRUN).stderr
    assert stopped.adapter() == whole.adapter()


@pytest.mark.slow
def test_packed_runs_resume_to_the_same_bytes_too(run):
    config = settings(packing=True)
    whole, killed = run(config, "whole"), run(config, "killed")
    whole.go()
    kill_at(killed, 4, signal.SIGKILL)
    killed.go()
    assert killed.adapter() == whole.adapter()


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(run, undisturbed):
    damaged = run()
    copy_state(undisturbed, damaged)
    newest = damaged.folder / "state" / "checkpoint-15"
    (newest / "optimizer.pt").write_bytes((newest / "optimizer.pt").read_bytes()[:-100])
    done = damaged.go()
    assert f"{newest} cannot be resumed from: optimizer.pt has" in done.stderr
    assert "going on from" in done.stderr
    assert damaged.adapter() == undisturbed.adapter()


class Evil:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_brings_code_runs_none(name, run, undisturbed):
    """Sealed as if it were ours, in a file that only holds numbers, and in the one that is never opened."""
    attacked = run()
    copy_state(undisturbed, attacked)
    state, mark = attacked.folder / "state", attacked.folder / "code has run"
    oldest, *others = checkpoint_folders(state)
    for folder in others:
        shutil.rmtree(folder)
    torch.save(Evil(mark), oldest / name)
    torch.save(Evil(mark), oldest / "training_args.bin")
    (oldest / "manifest.json").unlink()
    staged = state / "staging" / oldest.name
    staged.parent.mkdir()
    oldest.rename(staged)
    seal(staged, state, read_json(state / "fingerprint.json"))
    done = attacked.go(code=1)
    assert "going on from" in done.stderr and "Weights only load failed" in done.stderr
    assert not mark.exists()
    torch.load(state / oldest.name / name, weights_only=False)
    assert mark.exists(), "the code is real"


def test_another_learning_rate_never_resumes_the_old_weights(run, undisturbed):
    changed = run(settings(learning_rate=2e-3))
    copy_state(undisturbed, changed)
    done = changed.go()
    assert "settings.train.learning_rate" in done.stderr and "moved to old-1" in done.stderr
    fresh = run(settings(learning_rate=2e-3), "fresh")
    fresh.go()
    assert changed.adapter() == fresh.adapter() != undisturbed.adapter()


def copy_state(source: Run, target: Run) -> None:
    shutil.copytree(source.folder / "state", target.folder / "state")


def test_what_does_not_change_the_weights_does_not_start_anew(run, undisturbed):
    other = run(settings(logging_steps=5, save_total_limit=4))
    copy_state(undisturbed, other)
    assert "nothing to train" in other.go().stderr


def test_resume_from_a_checkpoint_of_another_run_says_what_differs(run, undisturbed):
    changed = run(settings(learning_rate=2e-3))
    checkpoint = next((undisturbed.folder / "state").glob("checkpoint-*"))
    done = changed.go("--resume-from", str(checkpoint), code=1)
    assert "it is of another run (differs in: settings.train.learning_rate)" in done.stderr
    assert "give a checkpoint of the same settings" in done.stderr


def test_resume_from_a_checkpoint_of_its_own_with_other_settings_moves_nothing(run, undisturbed):
    changed = run(settings(learning_rate=2e-3))
    copy_state(undisturbed, changed)
    checkpoint = next((changed.folder / "state").glob("checkpoint-*"))
    done = changed.go("--resume-from", str(checkpoint), code=1)
    assert "it is of another run (differs in: settings.train.learning_rate)" in done.stderr
    assert checkpoint.is_dir() and "moved" not in done.stderr


def test_resume_from_a_checkpoint_elsewhere(run, undisturbed):
    again = run()
    checkpoint = min((undisturbed.folder / "state").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    done = again.go("--resume-from", str(checkpoint))
    assert f"going on from {again.folder / 'state' / checkpoint.name}" in done.stderr
    assert again.adapter() == undisturbed.adapter()


def test_two_trainers_never_share_a_folder(run):
    from moult.training.checkpoints import locked

    taken = run()
    with locked(taken.folder / "state"):
        second = subprocess.Popen(taken.command(), stderr=subprocess.PIPE, text=True)
        waiting = second.stderr.readline()
        assert "waiting" in waiting and f"process {os.getpid()}" in waiting
        assert not (taken.folder / "state" / "fingerprint.json").exists()
    assert second.wait(timeout=120) == 0
    second.stderr.close()


# --- batching ---------------------------------------------------------------------------------------------------------


def first_steps(run: Run) -> list[tuple[float, float]]:
    return [
        (entry["loss"], entry["grad_norm"])
        for entry in read_jsonl(run.folder / "training_log.jsonl")
        if "loss" in entry
    ]


def test_accumulation_gives_the_loss_and_gradient_of_the_batch(run):
    """Batch 4 x 1 and batch 1 x 4: transformers has averaged them differently more than once (transformers#34191)."""
    plain = {"max_steps": 3, "logging_steps": 1, "eval_strategy": "no", "load_best_model_at_end": False}
    runs = []
    for batch, accumulation in ((4, 1), (1, 4)):
        config = settings(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, **plain)
        config["lora"] = {**config["lora"], "lora_dropout": 0.0}
        runs.append(run(config, f"{batch}x{accumulation}"))
        runs[-1].go()
    for one, other in zip(*map(first_steps, runs), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_packed_and_unpacked_rows_have_the_same_loss(run, base, tokens):
    """All rows in one step: packed into few sequences, and padded; rows in one sequence do not see each other."""
    plain = {
        "max_steps": 1,
        "warmup_steps": 0,
        "logging_steps": 1,
        "eval_strategy": "no",
        "load_best_model_at_end": False,
    }
    found = []
    for packing in (False, True):
        config = settings(packing=packing, per_device_train_batch_size=18, gradient_accumulation_steps=1, **plain)
        config["lora"] = {**config["lora"], "lora_dropout": 0.0}
        this = run(config, f"packing {packing}")
        long = json.loads((tokens / "report.json").read_text())
        if packing:
            copied = this.folder / "long"
            copied.mkdir()
            for path in tokens.iterdir():
                (copied / path.name).write_bytes(path.read_bytes())
            (copied / "report.json").write_text(json.dumps({**long, "max_length": 64}))
            this.tokens = copied
            (this.folder / "tokens").unlink()
            (this.folder / "tokens").symlink_to(copied)
            make_plan(base, this.folder, config["lora"], config["train"])
        this.go()
        found.append(first_steps(this)[0])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.slow
def test_two_processes_give_the_loss_of_one(run):
    """gloo on the CPU: 2 processes of batch 2 are one of batch 4."""
    plain = {"max_steps": 4, "logging_steps": 1, "gradient_accumulation_steps": 1, "eval_steps": 2}
    one = run(settings(per_device_train_batch_size=4, **plain), "one")
    two = run(settings(per_device_train_batch_size=2, gpu=2, **plain), "two")
    for each in (one, two):
        each.config["lora"] = {**each.config["lora"], "lora_dropout": 0.0}
    one.go()
    two.go(launcher=TORCHRUN)
    for a, b in zip(one.losses(), two.losses(), strict=True):
        assert [x is None for x in a] == [x is None for x in b]
        assert [x for x in a[:5] if x is not None] == pytest.approx([x for x in b[:5] if x is not None], rel=1e-4)
    whole = two.adapter()
    shutil.rmtree(two.folder / "state" / "checkpoint-4")
    assert "going on from" in two.go(launcher=TORCHRUN).stderr
    assert two.adapter() == whole


# --- what stops it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "message", "fix"),
    [
        ({"learning_rate": 1e30, "max_grad_norm": 0.0}, "is nan", "lower train.learning_rate"),
        ({"learning_rate": 1e-60, "max_steps": 2}, "training has not changed", "train.learning_rate"),
        ({"gpu": 2}, "train.gpu is 2, and 1 processes run", "torchrun --nproc-per-node 2"),
    ],
)
def test_what_cannot_be_right_stops_it(train, message, fix, run):
    stopped = run(settings(**train))
    done = stopped.go(code=1)
    assert message in done.stderr and fix in done.stderr
    assert "Traceback" not in done.stderr
    assert not any((stopped.folder / name).exists() for name in ("adapter", "adapter.json", "training_log.jsonl"))


def test_a_base_that_is_not_finite_is_found_before_the_first_step(run, tmp_path):
    broken = make_model(tmp_path / "broken", kind="qwen3", tie_word_embeddings=True)
    tokenizer(broken)
    change_tensors(broken, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")) is None)
    stopped = run()
    stopped.base = broken
    done = stopped.go(code=1)
    assert "is nan before the first step" in done.stderr
    assert not list((stopped.folder / "state").glob("checkpoint-*"))


def test_exactly_zero_is_no_loss():
    from moult.errors import MoultError
    from moult.training.trainer import check_finite

    check_finite({"loss": 1e-9, "grad_norm": 0.0}, 3)
    with pytest.raises(MoultError, match="step 3: the loss is exactly 0"):
        check_finite({"loss": 0.0}, 3)
    with pytest.raises(MoultError, match="grad_norm is inf"):
        check_finite({"loss": 1.0, "grad_norm": float("inf")}, 3)


def test_a_plan_of_other_steps_is_refused_before_the_training(run):
    stopped = run()
    stopped.config = settings(max_steps=7)
    done = stopped.go(code=1)
    assert "train.max_steps is 7, and" in done.stderr and "make the plan again" in done.stderr
    assert "training on" not in done.stderr


def test_weights_that_are_missing_are_named(run, tmp_path):
    lacking = make_model(tmp_path / "lacking", kind="qwen3", tie_word_embeddings=True)
    tokenizer(lacking)
    change_tensors(lacking, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight") is None)
    stopped = run()
    stopped.base = lacking
    assert "the weights lack model.layers.1.mlp.up_proj.weight" in stopped.go(code=1).stderr


class OutOfMemory:
    """Stands for a trainer whose longest batch fits only with gradient checkpointing, or never."""

    def __init__(self, fits_with: bool):
        self.fits_with = fits_with
        self.args = type("Args", (), {"per_device_train_batch_size": 2, "gradient_checkpointing": False})()
        self.train_dataset = [{"input_ids": list(range(length))} for length in (3, 9, 5)]
        self.batches = []
        self.model = self

    def data_collator(self, rows):
        return rows

    def gradient_checkpointing_enable(self, options):
        assert options == {"use_reentrant": False}

    def enable_input_require_grads(self):
        pass


def try_batch(trainer, batch):
    trainer.batches.append([len(row["input_ids"]) for row in batch])
    fits = trainer.args.gradient_checkpointing and trainer.fits_with
    return fits, 1.0 if fits else float("nan")


def test_checkpointing_is_switched_on_only_where_the_longest_batch_needs_it(monkeypatch):
    from moult.errors import MoultError
    from moult.training import trainer as module

    monkeypatch.setattr(module, "_try_batch", try_batch)
    fits = OutOfMemory(fits_with=True)
    module.try_longest_batch(fits, "auto")
    assert fits.args.gradient_checkpointing and fits.batches == [[9, 5], [9, 5]]
    with pytest.raises(MoultError, match="does not fit into the GPU's memory, even with gradient checkpointing"):
        module.try_longest_batch(OutOfMemory(fits_with=False), "auto")
    with pytest.raises(MoultError, match=r"does not fit into the GPU's memory\n"):
        module.try_longest_batch(OutOfMemory(fits_with=True), False)
