"""What the training log and metrics.json say about speed."""

import pytest
import torch
from model_types import COMMON, KINDS
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from moult.training.throughput import Cost, Work, cost_of, line, peak_of, summary


def build(kind: str, **changes):
    config = AutoConfig.for_model(kind, **{**COMMON, **KINDS.get(kind, {}), **changes})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_operations_are_those_of_the_real_step(tied, checkpointed):
    """Counted by torch, with rows so short that attention is next to nothing, and an adapter so small."""
    config = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "vocab_size": 512}
    model = build("llama", tie_word_embeddings=tied, **config)
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=1, target_modules=["q_proj"])).train()
    cost = cost_of(model)
    if checkpointed:
        tuned.gradient_checkpointing_enable({"use_reentrant": False})
        tuned.enable_input_require_grads()
    ids = torch.randint(5, 500, (16, 8))
    with FlopCounterMode(display=False) as counter:
        tuned(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    expected = cost.operations(ids.numel(), 16 * 8**2, checkpointed)
    if checkpointed:
        # torch stops recomputing a layer before its last product, and the head is no layer.
        expected -= 2 * ids.numel() * (4 * 128 * 384 + 128 * 512)
    # Nothing goes back through what is before the first adapter.
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_attention_is_that_of_a_causal_row():
    """Half of what a dense one takes, forward and backward: 2 heads x 64 numbers, 3 layers."""
    model = build("llama", num_attention_heads=2, num_key_value_heads=2, head_dim=64, num_hidden_layers=3)
    cost = cost_of(model.requires_grad_(False))
    query = torch.randn(1, 2, 256, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        ((query @ query.detach().mT).softmax(-1) @ query.detach()).sum().backward()
    forward = 2 * (2 * 256**2 * 64 * 2)
    assert counter.get_total_flops() > forward
    assert cost.attention * 256**2 == 3 * forward / 2


def test_of_the_experts_those_count_that_a_token_goes_through():
    model = build("qwen3_moe", num_experts=4, num_experts_per_tok=1).requires_grad_(False)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    others = sum(p.numel() for p in model.parameters()) - experts - model.get_input_embeddings().weight.numel()
    assert experts > 0 and cost_of(model).matrices == others + experts / 4


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA L4", 121.0),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA A10", None),
        ("NVIDIA L40", None),
        ("Tesla T4", None),
    ],
)
def test_peaks(name, peak):
    assert peak_of(name) == peak


def test_a_line_of_two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 7)
    work = Work(tokens=3000, squares=0, padded=4000, waited=1.0)
    found = line(work, 2.0, Cost(matrices=1e9, attention=0.0), True, 2, torch.device("cuda"))
    assert found == {
        "seconds": 2.0,
        "tokens_per_second": 1500.0,
        "padding_share": 0.25,
        "data_wait_share": 0.25,
        "tflops": pytest.approx(6e9 * 3000 / 2 / 2 / 1e12),
        "mfu": pytest.approx(6e9 * 3000 / 2 / 2 / 1e12 / 121.0),
        "peak_memory_allocated": 5,
        "peak_memory_reserved": 7,
    }


def test_the_summary_is_the_mean_over_time():
    common = {"padding_share": 0.0, "data_wait_share": 0.1, "tflops": 1.0}
    history = [
        {"loss": 1.0, "seconds": 1.0, "tokens_per_second": 100.0, **common},
        {"eval_loss": 1.0},
        {"loss": 1.0, "seconds": 3.0, "tokens_per_second": 200.0, **common},
    ]
    found = summary(history)
    assert found["seconds"] == 4.0 and found["tokens_per_second"] == 175.0 and found["tflops"] == 1.0
    assert found["mfu"] is None and found["peak_memory_allocated"] is None
    assert summary([])["tokens_per_second"] is None
