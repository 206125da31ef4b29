"""The memory that a run needs: simulated on fake tensors, compared with what others have measured and with the GPU."""

import dataclasses
from argparse import Namespace

import pytest
import torch
from model_types import make_base
from planning import Log, make
from published import FIGURES, SHAPES, Figure
from tiny import make_model
from transformers import AutoConfig, AutoModelForCausalLM

import plan
from moult.errors import MoultError
from moult.training import simulation
from moult.training.memory import (
    GB,
    Run,
    attention_of,
    check_fits,
    memory_of,
    moments_of,
    steps_of,
    weights_of,
    what_fits,
)
from moult.training.simulation import Step, depths_of, simulate
from moult.training.targets import inject

MLA = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "lora_dropout": 0.0}
TRAIN = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "gradient_checkpointing": "auto",
    "packing": False,
    "gpu": 1,
    "shard": False,
}


def empty(kind: str, **sizes):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))


def shaped(name: str):
    kind, sizes = SHAPES[name]
    return empty(kind, **{"tie_word_embeddings": False, **sizes})


def run_of(model, length: int = 1024, lora: dict = LORA, quantization=None, exact=None, **train) -> Run:
    lengths = {"length": {"longest_kept": length}}
    settings = {
        "lora": lora,
        "train": {**TRAIN, **train},
        "dtype": "bfloat16",
        "quantization": quantization,
        "attn_implementation": None,
    }
    report = {"max_length": length, "train": lengths, "val": {**lengths, "sequences": 50}}
    exact = {"varlen": None, "unmasked": None} if exact is None else exact
    return Run(model, inject(model, lora, []), settings, report, exact)


# --- the simulation ---------------------------------------------------------------------------------------------------


def simulated(figure: Figure) -> float:
    """GB of what the set-up of a published figure needs, without margin."""
    model = shaped(figure.model)
    activations = simulate(model, figure.lora, [Step(figure.rows, figure.length, **figure.step)])[0]
    run = run_of(model, lora=figure.lora, quantization=figure.step.get("quantization"))
    trained = sum(parameter.numel() for parameter in run.targets.model.parameters() if parameter.requires_grad)
    width = 4 if figure.step.get("float32_adapter", True) else 2
    # Weights with the adapter in float32; gradient and moments have the adapter's dtype.
    return (weights_of(run)[0] + trained * (width - 4) + trained * 3 * width + activations) / GB


# One of each kind: the others have the same code, and two seconds each.
QUICK = ("torchtune Llama-3.1-8B nf4 2x2048", "peft MetaMathQA Llama-3.2-3B 16-bit 4x768")


@pytest.mark.parametrize(
    "figure",
    [
        pytest.param(figure, marks=() if str(figure) in QUICK else pytest.mark.slow, id=str(figure))
        for figure in FIGURES
    ],
)
def test_published_figures(figure):
    got = simulated(figure)
    if figure.known is None:
        assert got == pytest.approx(figure.gb, rel=0.15)
    else:
        assert got == pytest.approx(figure.known, rel=0.01)
        assert got != pytest.approx(figure.gb, rel=0.15), "no longer a deviation: take it off the list"


@pytest.mark.parametrize(
    ("kind", "sizes", "layers", "depths"),
    [
        ("llama", {}, 7, [2, 4]),
        pytest.param("gpt2", {"n_embd": 128, "n_head": 4, "n_layer": 7}, 7, [2, 4], marks=pytest.mark.slow),
        pytest.param("gemma3_text", {"head_dim": 32}, 13, [6, 12], marks=pytest.mark.slow),
        pytest.param("deepseek_v3", {"first_k_dense_replace": 3, **MLA}, 9, [5, 7], marks=pytest.mark.slow),
    ],
)
def test_a_few_layers_say_what_all_would(kind, sizes, layers, depths, monkeypatch):
    common = {"vocab_size": 512}
    if kind != "gpt2":
        common |= {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": layers, "num_attention_heads": 4}
    model = empty(kind, **common, **sizes)
    step = Step(2, 128)
    steps = [step, dataclasses.replace(step, checkpointing=True), dataclasses.replace(step, training=False)]
    assert depths_of(model, LORA) == depths
    few = simulate(model, LORA, steps)
    monkeypatch.setattr(simulation, "depths_of", lambda model, lora: [layers])
    assert few == pytest.approx(simulate(model, LORA, steps), rel=0.01)


def test_layers_that_are_not_alike_are_all_run():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 128}
    model = empty("llama", num_hidden_layers=9, **sizes)
    assert depths_of(model, {**LORA, "rank_pattern": {"layers.3.mlp.up_proj": 64}}) == [9]
    assert depths_of(empty("llama", num_hidden_layers=3, **sizes), LORA) == [3]


def test_it_is_the_same_each_time_and_leaves_the_model_as_it_was():
    model = empty(
        "llama", hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, vocab_size=512
    )
    steps = [Step(2, 64), Step(2, 64, checkpointing=True)]
    assert simulate(model, LORA, steps) == simulate(model, LORA, steps)
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert torch.nn.functional.dropout is not None and torch.nn.functional.dropout(torch.ones(3), 0.0).sum() == 3


@pytest.mark.slow
def test_what_costs_memory():
    model = shaped("Llama-3.1-8B")
    step = Step(4, 1024)
    changes = [
        {},
        {"checkpointing": True},
        {"attention": "dense"},
        {"attention": "eager"},
        {"cast_inputs": False},
        {"training": False},
    ]
    plain, checkpointed, dense, uncast, validation = (
        simulate(model, LORA, [dataclasses.replace(step, **change)])[0] / 2**30
        for change in changes
        if change.get("attention") != "eager"
    )
    assert plain == pytest.approx(27.1, abs=0.1)  # 27.1 GiB: 42.7 in all, 15.6 of them weights and optimizer
    assert checkpointed == pytest.approx(2.3, abs=0.1)
    assert plain < dense and uncast < plain - 3 and validation < 1
    eager = simulate(model, LORA, [dataclasses.replace(step, attention="eager")])[0] / 2**30
    assert eager > plain + 32 * 4 * 32 * 1024**2 * 2 / 2**30  # the scores of each layer
    dropout = simulate(model, {**LORA, "lora_dropout": 0.05}, [step])[0] / 2**30
    assert dropout == pytest.approx(plain + 4.9, abs=0.3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["gpt2", "qwen3_moe", "llama4_text", "gpt_oss", "jamba", "falcon_h1", "gemma3n_text", "gptj"]
)
def test_architectures_are_simulated(kind, tmp_path):
    """Experts, Mamba, layers of several kinds, an attention of its own: with what plan leaves out of LoRA."""
    found = make(make_base(kind, tmp_path / "base"), tmp_path, simulated=True)[0]["memory"]
    assert found["how"] == "simulated"
    assert found["activations"] > found["activations_with_gradient_checkpointing"] > 0


# --- what a run needs -------------------------------------------------------------------------------------------------


def test_parts_and_total():
    run = run_of(shaped("Llama-3.1-8B"))
    found = memory_of(run)
    assert found["how"] == "simulated" and found["attention"] == "flash" and found["gpu"] is None
    assert found["tokens_per_batch"] == 4 * 1024
    trained = 41_943_040
    assert found["weights"] == 8_030_261_248 * 2 + trained * 4
    assert found["optimizer"] == trained * 12 and found["gathered"] == 0
    peak = found["weights"] + found["optimizer"] + found["activations"]
    assert found["total"] == round(peak * 1.08) + 1_500_000_000


@pytest.mark.parametrize(
    ("train", "exact", "tokens"),
    [
        ({"padding_free": "auto"}, {"varlen": None, "unmasked": None}, 1000 + 900 + 500 + 401),
        ({"padding_free": "auto", "per_device_train_batch_size": 2}, {"varlen": None, "unmasked": None}, 1900),
        ({"padding_free": "auto", "per_device_train_batch_size": "auto"}, {"varlen": None, "unmasked": None}, 1000),
        ({"padding_free": True}, {"varlen": "softcap", "unmasked": None}, 1000 + 900 + 500 + 401),
        ({"padding_free": "auto"}, {"varlen": "softcap", "unmasked": None}, 4 * 1000),
        ({"padding_free": False}, {"varlen": None, "unmasked": None}, 4 * 1000),
        ({"padding_free": "auto", "packing": True}, {"varlen": None, "unmasked": None}, 4 * 1000),
    ],
)
def test_rows_without_padding_have_only_their_own_tokens(train, exact, tokens):
    run = dataclasses.replace(run_of(empty("llama"), 1000, exact=exact, **train), lengths=[1000, 900, 500, 401, 9, 9])
    step = steps_of(run)[0]
    assert tokens <= step.rows * step.length < tokens + 4
    short = steps_of(run.shorter(512))[0]
    assert short.length <= 512


@pytest.mark.slow
def test_the_validation_may_be_what_needs_most():
    run = run_of(shaped("Llama-3.1-8B"), 1024)
    long = {**run.report, "val": {"length": {"longest_kept": 32768}, "sequences": 50}}
    found = memory_of(dataclasses.replace(run, report=long))
    assert found["validation"] > found["activations_with_gradient_checkpointing"]
    held = found["weights"] + found["optimizer"] - 4 * 41_943_040
    assert found["total_with_gradient_checkpointing"] == round((held + found["validation"]) * 1.08) + 1_500_000_000


@pytest.mark.slow
def test_several_gpus():
    model = shaped("Llama-3.1-8B")
    one, four = (weights_of(run_of(model, gpu=gpus, shard=gpus > 1)) for gpus in (1, 4))
    adapter = 41_943_040 * 4
    assert four[0] - adapter == pytest.approx((one[0] - adapter) / 4, rel=1e-6)
    assert 2 * 0.43e9 < four[1] < 2.5e9  # two layers and the head
    beside = memory_of(run_of(model, gpu=4))
    assert beside["weights"] == one[0] and beside["optimizer"] == 41_943_040 * 16  # DDP's buckets


def test_quantized_weights():
    model = shaped("Llama-3.1-8B")
    plain, nf4, int8 = (weights_of(run_of(model, quantization=how))[0] for how in (None, "nf4", "int8"))
    embeddings = 2 * 128256 * 4096 * 2
    assert nf4 == pytest.approx(embeddings + 6.98e9 * (0.5 + 1 / 64 + 1 / 4096) + 41_943_040 * 4, rel=0.001)
    assert int8 == pytest.approx(embeddings + 6.98e9 + 41_943_040 * 4, rel=0.001)
    assert plain == 8_030_261_248 * 2 + 41_943_040 * 4


@pytest.mark.parametrize(
    ("optimizer", "bytes_of_each"),
    [("adamw_torch_fused", 8), ("adamw_bnb_8bit", 2), ("paged_adamw_8bit", 0), ("sgd", 0), ("", 8)],
)
def test_optimizers(optimizer, bytes_of_each):
    assert moments_of(optimizer) == bytes_of_each


@pytest.mark.parametrize(
    ("train", "wanted", "exact", "attention"),
    [
        ({}, None, {"varlen": None, "unmasked": None}, "flash"),
        ({}, None, {"varlen": "sinks", "unmasked": "it looks ahead"}, "dense"),
        ({"per_device_train_batch_size": 1}, None, {"unmasked": "it looks ahead"}, "flash"),
        ({"packing": True}, None, {"varlen": None}, "flash"),
        ({"packing": True}, "sdpa", {"varlen": None}, "dense"),
        ({"packing": True}, None, {"varlen": "softcap", "unmasked": None}, "dense"),
        ({"packing": True}, "flash_attention_2", {}, "flash"),
        ({}, "eager", {"varlen": None}, "eager"),
        ({"padding_free": "auto"}, None, {"varlen": "softcap", "unmasked": None}, "flash"),
    ],
)
def test_what_the_attention_gets(train, wanted, exact, attention):
    settings = {"train": {**TRAIN, **train}, "attn_implementation": wanted, "dtype": "bfloat16"}
    assert attention_of(Run(None, None, settings, {}, exact)) == attention


def test_where_the_model_cannot_be_run_the_formula_stands_in(tmp_path):
    base = make_model(tmp_path / "base")
    assert make(base, tmp_path, simulated=True)[0]["memory"]["how"] == "simulated"
    found = make(base, tmp_path)[0]["memory"]  # there the simulation raises what a model may
    assert found["how"] == "formula" and found["total"] > found["weights"] > 0


# --- whether it fits --------------------------------------------------------------------------------------------------


def test_what_fits_is_silent_and_what_may_not_is_a_warning():
    run = run_of(shaped("Llama-3.1-8B"))
    found = memory_of(run)
    assert found["total_with_gradient_checkpointing"] / GB == pytest.approx(22.3, abs=0.5)
    for gigabytes, lines in ((24, 0), (None, 0), (21, 1)):
        log = Log()
        check_fits(run, {**found, "gpu": gigabytes and gigabytes * GB}, log)
        assert len(log.lines) == lines
    assert log.lines[0].startswith("this run needs about 22") and "may run out of memory" in log.lines[0]


@pytest.mark.slow
def test_what_cannot_fit_is_refused_with_what_would():
    run = run_of(shaped("Llama-3.1-8B"), 4096)
    with pytest.raises(MoultError) as error:
        check_fits(run, memory_of(run, 24 * GB), Log())
    assert error.value.what.startswith("this run needs about 28.6 GB on each GPU with gradient checkpointing")
    assert "a batch of 4 x 4,096 tokens" in error.value.what
    assert error.value.fix.startswith("set one of these: ")
    assert error.value.fix.endswith("; model.quantization: nf4; train.gpu: 2 and train.shard: true")
    assert (
        memory_of(dataclasses.replace(run.changed(quantization="nf4")))["total_with_gradient_checkpointing"] < 24 * GB
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gigabytes", "length", "settings", "expected"),
    [
        (80, 4096, {"gradient_checkpointing": False}, ["train.gradient_checkpointing: auto"]),
        (80, 4096, {"gradient_checkpointing": False}, ["per_device_train_batch_size: 2", "accumulation_steps: 8"]),
        (12, 2048, {}, ["train.gpu: 8 and train.shard: true"]),
        (24, 8192, {"gradient_checkpointing": False}, ["gradient_checkpointing: auto", "batch_size: 1", "nf4"]),
        (1, 2048, {}, []),
    ],
)
def test_what_is_proposed(gigabytes, length, settings, expected):
    """`expected`: words of one of the options; where there are none, there is no option."""
    options = list(what_fits(run_of(shaped("Llama-3.1-8B"), length, **settings), gigabytes * GB))
    assert any(all(word in option for word in expected) for option in options) == bool(expected)


def test_without_a_gpu_and_without_a_word_nothing_is_refused(tmp_path):
    assert make(make_model(tmp_path / "base"), tmp_path)[0]["memory"]["gpu"] is None


def test_a_gpu_that_is_too_small_stops_the_plan(tmp_path):
    base = make_model(tmp_path / "base")
    with pytest.raises(MoultError, match=r"there are 0\.0 GB \(train\.gpu_memory"):
        make(base, tmp_path, train={"gpu_memory": 1e-6})
    assert not (tmp_path / "plan.json").exists()


def test_the_gpu_of_this_machine(monkeypatch):
    sizes = [Namespace(total_memory=25 * GB), Namespace(total_memory=24 * GB)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", sizes.__getitem__)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert plan.gpu_memory({"gpu_memory": None}) == 24 * GB
    assert plan.gpu_memory({"gpu_memory": 80}) == 80 * GB
    monkeypatch.setenv("SLURM_JOB_ID", "1")  # this stage asks Slurm for no GPU
    assert plan.gpu_memory({"gpu_memory": None}) is None
