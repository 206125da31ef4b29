"""finetune: what it publishes, the same loss however it is batched, and what stops it."""

import json
import shutil

import pytest
import torch
from finetuning import TORCHRUN, Run, settings, tokenizer
from planning import make as make_plan
from safetensors.torch import load_file
from tiny import change_tensors, make_model

from moult.files import read_json, read_jsonl

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
    assert "continuing from" in two.go(launcher=TORCHRUN).stderr
    assert two.adapter() == whole


# --- what stops it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "message", "fix"),
    [
        ({"learning_rate": 1e30, "max_grad_norm": 0.0}, "is nan", "lower train.learning_rate"),
        ({"learning_rate": 1e-60, "max_steps": 2}, "training has not changed", "train.learning_rate"),
        ({"gpu": 2}, "train.gpu is 2, but 1 processes are running", "torchrun --nproc-per-node 2"),
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
    from moult.training.watch import check_finite

    check_finite({"loss": 1e-9, "grad_norm": 0.0}, 3)
    with pytest.raises(MoultError, match="step 3: the loss is exactly 0"):
        check_finite({"loss": 0.0}, 3)
    with pytest.raises(MoultError, match="grad_norm is inf"):
        check_finite({"loss": 1.0, "grad_norm": float("inf")}, 3)


def test_a_plan_of_other_steps_is_refused_before_the_training(run):
    stopped = run()
    stopped.config = settings(max_steps=7)
    done = stopped.go(code=1)
    assert "train.max_steps is 7, but" in done.stderr and "run the stage plan again" in done.stderr
    assert "training on" not in done.stderr


def test_weights_that_are_missing_are_named(run, tmp_path):
    lacking = make_model(tmp_path / "lacking", kind="qwen3", tie_word_embeddings=True)
    tokenizer(lacking)
    change_tensors(lacking, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight") is None)
    stopped = run()
    stopped.base = lacking
    assert "the weights lack model.layers.1.mlp.up_proj.weight" in stopped.go(code=1).stderr
