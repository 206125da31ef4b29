"""plan: everything that can be known of a run before a GPU is spent on it."""

import json
import re
from argparse import Namespace

import pytest
import torch
from planning import EVAL, LORA, Log, make
from tiny import make_model, make_tokens

import plan
from moult.errors import MoultError
from moult.files import read_json
from moult.model.estimates import estimate_job
from plans import GB, room, row


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_counts_are_those_of_the_real_model(kind, tmp_path):
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import AutoModelForCausalLM

    from moult.model.lora import lora_config

    base = make_model(tmp_path / "base", kind=kind)
    result, _ = make(base, tmp_path)
    real = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora_config(LORA))
    trainable, everything = real.get_nb_trainable_parameters()
    assert result["parameters"]["trainable"] == trainable
    assert result["parameters"]["base"] == everything - trainable
    layers = {name for name, module in real.base_model.model.named_modules() if isinstance(module, BaseTunerLayer)}
    assert set(result["targets"]) == layers
    assert all(target["tensor"] for target in result["targets"].values())


def test_no_weight_is_read(tmp_path):
    base = make_model(tmp_path / "base")
    file = base / "model.safetensors"
    data = bytearray(file.read_bytes())
    header = int.from_bytes(data[:8], "little") + 8
    file.write_bytes(bytes(data[:header]) + b"\xff" * (len(data) - header))  # NaN wherever it is looked at
    result, _ = make(base, tmp_path)
    assert result["parameters"]["base"] > 0


def test_scaling_and_rank_of_each_layer(tmp_path):
    base = make_model(tmp_path / "base")
    lora = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}, "use_rslora": True}
    targets = make(base, tmp_path, lora)[0]["targets"]
    layer = "model.layers.0.self_attn"
    assert (targets[f"{layer}.q_proj"]["r"], targets[f"{layer}.q_proj"]["scaling"]) == (2, 8 / 2**0.5)
    assert targets[f"{layer}.v_proj"]["scaling"] == 32 / 2
    assert targets[f"{layer}.k_proj"]["scaling"] == 8 / 2


@pytest.mark.parametrize(
    ("lora", "model", "message", "fix"),
    [
        ({"target_modules": ["nope"]}, {}, "nope", "q_proj"),
        ({"target_modules": ["q_proj", "gate"]}, {}, "nothing is named gate", "gate_proj"),
        ({"target_modules": "no_such.*"}, {}, "no_such", "q_proj"),
        ({"target_modules": "q_proj"}, {}, "q_proj not found", "make it a list, [q_proj]"),
        (
            {"target_modules": ["q_proj", "embed_tokens"]},
            {"tie_word_embeddings": True},
            "share one weight",
            "leave them out",
        ),
        (
            {"target_modules": ["q_proj", "lm_head"]},
            {"tie_word_embeddings": True},
            "share one weight",
            "leave them out",
        ),
        ({"target_modules": ["q_proj", "lm_head"]}, {}, "lm_head cannot be tuned", "leave lm_head out"),
        ({"modules_to_save": ["embed_tokens"]}, {"tie_word_embeddings": True}, "is tied", "ensure_weight_tying"),
        ({"r": 0}, {}, "r", ""),
        ({"init_lora_weights": "eva"}, {}, "cannot start from eva", "pissa"),
        ({"init_lora_weights": "nonsense"}, {}, "cannot start from nonsense", "pissa"),
        ({"lora_bias": True}, {}, "of the base have no bias", "leave it out"),
        (
            {"trainable_token_indices": [5]},
            {"tie_word_embeddings": True},
            "lm_head has the embedding's weight",
            "modules_to_save: [embed_tokens]",
        ),
    ],
)
def test_targets_that_cannot_come_out_right_are_refused(lora, model, message, fix, tmp_path):
    base = make_model(tmp_path / "base", **model)
    with pytest.raises(MoultError) as error:
        make(base, tmp_path, lora)
    assert message in error.value.what
    assert fix in error.value.fix
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(
    ("train", "steps"),
    [
        ({}, 8),  # 16 rows in batches of 2
        ({"gradient_accumulation_steps": 3}, 3),
        ({"per_device_train_batch_size": 5}, 4),
        ({"per_device_train_batch_size": 5, "dataloader_drop_last": True}, 3),
        ({"num_train_epochs": 2.5}, 20),
        ({"gpu": 4}, 2),
        ({"max_steps": 7}, 7),
        ({"packing": True}, 8),  # 16 rows of 20 to 24 tokens in sequences of 24: none fit together
    ],
)
def test_steps(train, steps, tmp_path):
    base = make_model(tmp_path / "base")
    assert make(base, tmp_path, train=train)[0]["steps"]["total"] == steps


def test_early_stopping_makes_the_steps_an_upper_bound_and_is_biased_with_most_schedules(tmp_path):
    base = make_model(tmp_path / "base")
    plain, log = make(base, tmp_path)
    assert plain["steps"]["early_stopping"] is False and not any("at most" in line for line in log.lines)
    early, log = make(base, tmp_path, train={"early_stopping_patience": 3})
    assert early["steps"]["early_stopping"] is True and early["steps"]["total"] == plain["steps"]["total"]
    assert any(line.startswith("at most 8 steps of 2 sequences") for line in log.lines)
    assert row("r", early)[1] == "at most 8" and row("r", plain)[1] == "8"
    [warning] = [line for line in log.lines if "early_stopping" in line]
    assert (
        "with lr_scheduler_type cosine: a run that stops early ends with a learning rate that has not fallen" in warning
    )
    _, log = make(base, tmp_path, train={"early_stopping_patience": 3, "lr_scheduler_type": "constant_with_warmup"})
    assert not any("early_stopping" in line for line in log.lines)


def test_packing_needs_fewer_steps(tmp_path):
    base = make_model(tmp_path / "base")
    make_tokens(tmp_path / "tokens", rows=40, length=12)  # 400 tokens, in sequences of 48
    report = tmp_path / "tokens" / "report.json"
    report.write_text(report.read_text().replace('"max_length": 12', '"max_length": 48'))
    packed = make(base, tmp_path, train={"packing": True})[0]["steps"]
    assert packed["sequences"] == 9 and packed["total"] == 5


@pytest.mark.parametrize(
    ("lora", "merge", "refused"),
    [
        ({}, "streamed", []),
        ({"use_rslora": True}, "streamed", []),
        ({"use_dora": True}, "peft", ["use_dora"]),
        ({"modules_to_save": ["lm_head"]}, "peft", ["modules_to_save"]),
        ({"init_lora_weights": "pissa"}, "peft", ["init_lora_weights"]),
        ({"rank_pattern": {"q_proj": 2}}, "streamed", ["rank_pattern"]),
        ({"r": 600}, "streamed", ["rank over 512"]),
        ({"velora_config": {}}, "peft", ["velora_config"]),
        ({"trainable_token_indices": [5]}, "peft", ["trainable_token_indices"]),
    ],
)
def test_how_it_is_merged_and_whether_vllm_serves_the_adapter(lora, merge, refused, tmp_path):
    base = make_model(tmp_path / "base")
    result, _ = make(base, tmp_path, lora)
    assert result["merge"]["how"] == merge
    assert result["serve"]["reasons"] == refused
    assert result["serve"]["as"] == ("merged" if refused else "adapter or merged")
    assert result["serve"]["max_lora_rank"] == lora.get("r", 4)


def test_memory_grows_with_what_it_is_made_of(tmp_path):
    base = make_model(tmp_path / "base")
    small, log = make(base, tmp_path, simulated=True)
    small = small["memory"]
    wide = make(base, tmp_path, train={"per_device_train_batch_size": 4}, simulated=True)[0]["memory"]
    full = make(base, tmp_path, dtype="float32", simulated=True)[0]["memory"]
    assert wide["activations"] > small["activations"] and wide["weights"] == small["weights"]
    assert full["weights"] > 1.9 * small["weights"] - 4 * 10_000
    assert small["activations_with_gradient_checkpointing"] < small["activations"]
    assert small["total_with_gradient_checkpointing"] <= small["total"]
    assert any(re.search(r"GPU memory about \d\.\d GB, \d\.\d if checkpointed", line) for line in log.lines)


def test_what_finetune_asks_of_a_cluster(tmp_path, monkeypatch):
    base = make_model(tmp_path / "base")
    result, _ = make(base, tmp_path)
    assert result["job"] == {"mem_mb": 6001, "runtime": 31}  # nothing to load, and half an hour to begin with
    steps = {"total": 1000, "sequences_per_step": 16, "sequences": 100}
    report = {"train": {"tokens": 100 * 512}}

    def job(base, **train):
        return estimate_job(base, steps, {"train": {"gpu": 1, "nodes": 1, **train}, "dtype": "bfloat16"}, report)

    # 7.5 operations x 7e9 parameters x 8.192 M tokens / 25e12 = 4 h 47 min
    assert job(7e9) == {"mem_mb": 14_000, "runtime": 317}
    assert job(7e9, gpu=4) == {"mem_mb": 38_000, "runtime": 102}
    assert job(7e9, gpu=4, nodes=2)["mem_mb"] == 22_000  # of each
    assert job(7e10)["runtime"] == 24 * 60


def test_a_full_disk_is_foreseen(tmp_path, monkeypatch):
    base = make_model(tmp_path / "base")
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: Namespace(free=1000))
    _, log = make(base, tmp_path)
    assert any("free" in line and "this run writes" in line for line in log.lines)


def test_a_config_that_is_no_model(tmp_path):
    base = make_model(tmp_path / "base")
    config = base / "config.json"
    config.write_text(config.read_text().replace('"model_type": "llama"', '"model_type": "no_such_model"'))
    with pytest.raises(MoultError, match="transformers cannot build this model"):
        make(base, tmp_path)


def test_parameters_of_a_model_of_useful_size(tmp_path):
    """Qwen2.5-0.5B's published shape and its published number of parameters."""
    from transformers import AutoConfig

    shape = {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    }
    AutoConfig.for_model("qwen2", **shape).save_pretrained(tmp_path / "base")
    model = plan.empty_model(tmp_path / "base", False)
    assert all(parameter.device == torch.device("meta") for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == 494_032_768


def refused(*arguments, **settings) -> MoultError:
    with pytest.raises(MoultError) as error:
        make(*arguments, **settings)
    return error.value


def test_sequences_longer_than_the_model_are_refused_unless_its_positions_are_scaled(tmp_path):
    base = make_model(tmp_path / "base", max_position_embeddings=16)
    error = refused(base, tmp_path)
    assert error.what == "a sequence has 24 tokens, and the model 16 positions (max_position_embeddings)"
    config = read_json(base / "config.json")
    scaled = {**config["rope_parameters"], "rope_type": "linear", "factor": 2.0}
    (base / "config.json").write_text(json.dumps({**config, "rope_parameters": scaled}))
    assert make(base, tmp_path)[0]["steps"]["total"] == 8


def test_everything_that_is_wrong_is_said_at_once(tmp_path):
    base = make_model(tmp_path / "base", max_position_embeddings=16)
    train = {"warmup_steps": 8, "report_to": "comet_ml", "optim": "lomo"}
    error = refused(base, tmp_path, {"target_modules": ["nope"]}, train, attention="flash_attention_2")
    assert error.what.startswith("5 problems:\n")
    for said in ("attn_implementation", "16 positions", "warmup_steps: 8 of 8", "report_to", "optim", "target_modules"):
        assert said in error.what


def test_settings_that_trl_refuses(tmp_path):
    base = make_model(tmp_path / "base")
    error = refused(base, tmp_path, train={"optim": "no_such_optimizer"})
    assert error.what.startswith("train: ") and "no_such_optimizer" in error.what


def test_a_kernel_that_is_not_installed(tmp_path):
    error = refused(make_model(tmp_path / "base"), tmp_path, train={"use_liger_kernel": True})
    assert error.what == "train.use_liger_kernel: the package liger-kernel is not installed"


def test_a_package_that_wants_a_gpu_to_say_more_is_left_to_it(tmp_path, monkeypatch):
    """flash-attn is there, and this machine has no GPU: the job that trains may have one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def wants_a_gpu(*arguments, **settings):
        raise ImportError("FlashAttention2 needs a GPU with compute capability 8.0")

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", wants_a_gpu)
    plan.check_attention(
        AutoConfig.for_model("llama"), {"attn_implementation": "flash_attention_2", "trust_remote_code": False}
    )


def test_a_schedule_that_was_tried_out_is_the_one_that_trains(tmp_path):
    base = make_model(tmp_path / "base")
    schedule = {"lr_scheduler_type": "cosine_with_min_lr"}
    assert "lr_scheduler_kwargs" in refused(base, tmp_path, train=schedule).what
    make(base, tmp_path, train={**schedule, "lr_scheduler_kwargs": {"min_lr_rate": 0.1}})


def test_runs_that_fit_alone_and_not_together_are_told():
    plans = {name: {"disk": {"total": 2 * GB}} for name in ("one", "other")}
    assert room(plans, 4 * GB) == "disk: 4.0 GB for all runs, and 4.0 GB are free"
    assert room(plans, 3 * GB).startswith("WARNING: disk: 4.0 GB for all runs, and 3.0 GB are free: run some at a time")


def test_a_base_that_transformers_cannot_split_is_refused(tmp_path):
    shard = {"gpu": 2, "shard": True}
    make(make_model(tmp_path / "base"), tmp_path, train=shard)
    with pytest.raises(MoultError, match=r"train\.shard: transformers splits only 0% of this model over the GPUs"):
        make(make_model(tmp_path / "other", kind="gpt2"), tmp_path, train=shard)


# --- what the evaluation will show ---


@pytest.mark.parametrize(
    ("questions", "told"),
    [
        ({"answer_rows": 32}, None),
        (
            {"answer_rows": 4, "row_expect": {"exact": True}},
            "4 rows show no change of 50 points or less; to see 10 points, ask 160 questions "
            "(eval.answer_rows, datasets.<name>.test_size)",
        ),
        (
            {"prompts": [{"id": f"p{index}", "prompt": "a", "expect": {"json": True}} for index in range(300)]},
            "300 prompts show 7 points",
        ),
        ({"perplexity": True}, "300 groups of rows show 0.16 nats per token"),
        # Beside others, each has a share of the error.
        (
            {"perplexity": True, "forgetting": True, "answer_rows": 256, "row_expect": {"exact": True}},
            "300 groups of rows show 0.19 nats per token; 256 rows show 8 points",
        ),
    ],
)
def test_what_the_questions_can_show_is_told_before(questions, told):
    log = Log()
    plan.tell_questions({**EVAL, **questions}, 300, True, log)
    assert log.lines == ([f"the smallest change that will show: {told}"] if told else [])
