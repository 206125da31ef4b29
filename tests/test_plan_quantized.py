"""plan of a quantized base: what of it is quantized, and what would fail later, or compute something else."""

import model_types
import pytest
import torch
from planning import make
from tiny import make_model

from moult.errors import MoultError
from moult.model.architecture import auto_class


@pytest.fixture
def make_kind(tmp_path):
    """`make_kind("mamba")`: a model of model_types.py in a folder."""
    from transformers import AutoConfig

    def make_one(kind: str):
        config = AutoConfig.for_model(kind, **{**model_types.COMMON, **model_types.KINDS[kind]})
        torch.manual_seed(0)
        auto_class(config).from_config(config).save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return make_one


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_is_quantized_is_counted(kind, quantization, tmp_path):
    plan, _ = make(make_model(tmp_path / "base", kind=kind), tmp_path, quantization=quantization)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    matrices = [target["shape"] for target in plan["targets"].values()]
    linear = sum(rows * columns for rows, columns in matrices)
    everything = sum(parameter.numel() for parameter in model.parameters())
    assert plan["quantization"] == {
        "kind": quantization,
        "layers": len(matrices),
        "parameters": linear,
        "share": linear / everything,
    }
    assert plan["serve"]["base"] == "not quantized"
    plain, _ = make(tmp_path / "base", tmp_path)
    assert plain["quantization"] is None and plain["serve"]["base"] is None


def test_experts_stay_in_16_bits_and_that_is_said(make_kind, tmp_path):
    plan, log = make(make_kind("qwen3_moe"), tmp_path, quantization="nf4")
    assert plan["quantization"]["share"] < 0.5
    assert any("of the parameters are quantized; the others (stacked weights of experts" in line for line in log.lines)


@pytest.mark.parametrize(
    ("kind", "quantization", "what"),
    [
        ("mamba", "nf4", "model.quantization: nf4 fails on a small model of this architecture: Expected size"),
        (
            "deepseek_v3",
            "int8",
            "model.quantization: int8 fails on a small model of this architecture: The size of tensor a",
        ),
    ],
)
def test_architectures_that_do_not_stand_it_are_refused(kind, quantization, what, make_kind, tmp_path):
    with pytest.raises(MoultError) as error:
        make(make_kind(kind), tmp_path, quantization=quantization)
    assert error.value.what.startswith(what)
    assert "set model.quantization: null" in error.value.fix


def test_layers_of_another_class_are_not_quantized_and_that_is_refused(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(AutoConfig.for_model("falcon", **sizes)).save_pretrained(base)
    with pytest.raises(MoultError, match="bitsandbytes quantizes no layer of this model: FalconForCausalLM"):
        make(base, tmp_path, quantization="nf4")


@pytest.mark.parametrize(
    ("lora", "quantization", "what"),
    [
        ({"use_dora": True}, "int8", "model.quantization: these LoRA settings fail on a quantized model: 'NoneType'"),
        ({"modules_to_save": ["q_proj"], "target_modules": ["k_proj"]}, "nf4", "only Tensors of floating point dtype"),
        (
            {"target_modules": [], "target_parameters": ["q_proj.weight"]},
            "nf4",
            "lora.target_parameters: model.layers.0.self_attn.q_proj.weight, model.layers.1.self_attn.q_proj.weight: "
            "a quantized weight is packed",
        ),
    ],
)
def test_lora_settings_that_fail_on_a_quantized_model_are_refused(lora, quantization, what, tmp_path):
    with pytest.raises(MoultError) as error:
        make(make_model(tmp_path / "base"), tmp_path, lora=lora, quantization=quantization)
    assert what in error.value.what


def test_what_works_is_not_refused(tmp_path):
    base = make_model(tmp_path / "base", tie_word_embeddings=False)
    for lora in (
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"use_rslora": True, "init_lora_weights": "gaussian"},
    ):
        assert make(base, tmp_path, lora=lora, quantization="nf4")[0]["quantization"]["kind"] == "nf4"


def test_a_layer_that_computes_something_else_is_found(tmp_path, monkeypatch):
    from bitsandbytes.nn import Linear4bit

    true = Linear4bit.forward
    monkeypatch.setattr(Linear4bit, "forward", lambda self, x: true(self, x) * 1.01)
    with pytest.raises(MoultError, match="computes other logits than its weights give"):
        make(make_model(tmp_path / "base"), tmp_path, quantization="nf4")
