"""Batches that are faster and compute the same: rows behind each other, rows without a mask, lengths in steps."""

import copy

import pytest
import torch
from model_types import COMMON, KINDS, make_base
from planning import make
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from moult.model import varlen
from moult.model.shrunken import randomise, shrink
from moult.training import batches
from moult.training.arguments import trainer_config
from moult.training.batches import Collator, choose_batches
from moult.training.packing import try_batches

ROWS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [20, 21, 22, 23, 24], [30, 31, 32, 33, 34, 35, 36, 37, 38]]
EXAMPLES = [{"input_ids": row, "labels": [-100, *row[1:]]} for row in ROWS]
SIZES = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12}
WINDOW = {"sliding_window": 4}
EXACT = {"varlen": None, "unmasked": None}


def small(kind: str, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**COMMON, **KINDS.get(kind, {}), **changes})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        randomise(model)
    return model


def with_lora(model, checkpointed: bool = False):
    targets = "all-linear" if model.config.model_type != "mamba2" else ["in_proj"]  # peft refuses the other
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(model), lora)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def pass_of(model, batch: dict) -> tuple[float, torch.Tensor]:
    """The summed loss of a forward pass, and the gradients of all that is trained."""
    labels = batch.pop("labels")[:, 1:]
    batch.pop("counts", None)
    logits = model(**batch, use_cache=False).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def same(one, other, share: float = 1e-5) -> bool:
    (loss, gradient), (other_loss, other_gradient) = one, other
    return abs(loss - other_loss) <= share * abs(loss) and (
        (gradient - other_gradient).abs().max() <= share * gradient.abs().max()
    )


padded = DataCollatorForLanguageModeling(pad_token_id=0)
flat = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)


# --- rows behind each other -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [("llama", {}), ("qwen3", SIZES), ("mistral", WINDOW), ("deepseek_v3", {}), ("gemma3_text", WINDOW)],
)
def test_loss_and_gradients_are_those_of_padded_rows(kind, changes, checkpointed):
    model = small(kind, **changes)
    expected = pass_of(with_lora(model), padded(EXAMPLES))
    tuned = with_lora(model, checkpointed)
    tuned.get_base_model().set_attn_implementation(varlen.NAME)
    calls = varlen.CALLS.count
    assert same(expected, pass_of(tuned, flat(EXAMPLES)))
    assert varlen.CALLS.count > calls


def test_rows_with_a_mask_and_without_one_are_as_with_sdpa():
    """The validation during training has padded rows."""
    model = small("mistral", **WINDOW)
    fast = copy.deepcopy(model)
    fast.set_attn_implementation(varlen.NAME)
    batch = padded(EXAMPLES)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        for mask in (batch["attention_mask"], None):
            one, other = (m(input_ids=batch["input_ids"], attention_mask=mask).logits[real] for m in (model, fast))
            assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("window", [-1, 3])
def test_the_kernel_is_called_as_torch_wants_it(window, monkeypatch):
    """Heads of 12 become 16, float32 the dtype of autocast; what it returns has the size of the values."""
    import torch.nn.attention.varlen

    seen = {}

    def kernel(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        seen.update(size={query.shape[-1], key.shape[-1], value.shape[-1]}, dtype=query.dtype, window=window_size)
        return varlen.row_by_row(
            query, key, value, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window_size, enable_gqa=enable_gqa
        )

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", kernel)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(26, heads, size, generator=draw) for heads, size in ((6, 12), (2, 12), (2, 8)))
    bounds = torch.tensor([0, 12, 17, 26], dtype=torch.int32)
    arguments = (bounds, bounds, 12, 12)
    options = {"scale": 0.3, "window_size": (window, 0), "enable_gqa": True}
    found = varlen.flash(query, key, value, *arguments, **options)
    assert seen == {"size": {16}, "dtype": torch.bfloat16, "window": (window, 0)}
    expected = varlen.row_by_row(query, key, value, *arguments, **options)
    assert found.shape == expected.shape == (26, 6, 8)
    assert (found - expected).abs().max() < 0.02


def test_torchs_own_operation_takes_what_it_is_given():
    """On fake tensors: shapes and dtypes, forward and backward, through the operation that needs a GPU to compute."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        query, key, value = (
            torch.empty(26, heads, size, dtype=torch.bfloat16, requires_grad=True)
            for heads, size in ((6, 12), (2, 12), (2, 8))
        )
        bounds = torch.zeros(4, dtype=torch.int32)
        options = {"scale": 0.3, "window_size": (3, 0), "enable_gqa": True}
        found = varlen.flash(query, key, value, bounds, bounds, 12, 12, **options)
        assert found.shape == (26, 6, 8) and found.dtype == torch.bfloat16
        found.float().sum().backward()
        assert [part.grad.shape for part in (query, key, value)] == [part.shape for part in (query, key, value)]


def test_the_signature_is_that_of_torchs_kernel():
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    theirs, ours = (list(inspect.signature(f).parameters.values()) for f in (varlen_attn, varlen.row_by_row))
    assert len(theirs) > len(ours)
    positional = [p.kind for p in theirs[:7]] == [p.kind for p in ours[:7]]
    assert positional and {p.name for p in ours[7:]} <= {p.name for p in theirs}


# --- what is found out about a model -----------------------------------------------------------------------------------

FAMILIES = {
    "llama": None,
    "qwen3": None,
    "mistral": None,
    "gemma3_text": None,
    "cohere2": None,
    "gemma2": "its attention has softcap",
    "gpt_oss": "its attention has s_aux",
    "gpt2": "its attention has dropout",
    "bloom": "its layers have an attention of their own",
    "stablelm": "its logits differ by",
    "llama4_text": "its logits differ by",  # chunks, which only the mask knows of
    "jamba": "its logits differ by",
}


@pytest.mark.parametrize(("kind", "reason"), FAMILIES.items())
def test_what_the_kernel_does_not_do_is_found_out(kind, reason):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind))
    found = try_batches(shrink(model))
    assert found["unmasked"] is None
    assert found["varlen"] is None if reason is None else found["varlen"].startswith(reason)


def test_a_window_that_is_longer_than_the_rows_is_not_overlooked(monkeypatch):
    """As it would be if the kernel did not honour it: the small model gets a shorter one."""
    model = shrink(small("mistral", sliding_window=4096))
    assert try_batches(model)["varlen"] is None
    kernel = varlen.row_by_row
    blind = lambda *args, **more: kernel(*args, **{**more, "window_size": (-1, 0)})  # noqa: E731
    monkeypatch.setattr(varlen, "row_by_row", blind)
    assert try_batches(model)["varlen"].startswith("its logits differ by")


def test_plan_says_what_may_be_done(tmp_path):
    result, _ = make(make_base("llama", tmp_path / "base"), tmp_path)
    assert result["batches"] == EXACT


def test_dense_packing_is_warned_of(tmp_path):
    result, log = make(make_base("gemma2", tmp_path / "base"), tmp_path, train={"packing": True})
    assert result["batches"]["varlen"] == "its attention has softcap"
    assert any("train.packing: the fast attention for it cannot be used" in line for line in log.lines)


# --- rows without a mask ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gpt2", "opt", "mamba2", "qwen3_moe"])
def test_padding_on_the_right_needs_no_mask(kind):
    model = small(kind)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert try_batches(model.eval())["unmasked"] is None
    tuned = with_lora(model).eval()
    expected = pass_of(tuned, padded(EXAMPLES))
    tuned.zero_grad()
    batch = Collator(padded, unmasked=True)(EXAMPLES)
    assert "attention_mask" not in batch
    assert same(expected, pass_of(tuned, batch), 1e-6)


def test_a_model_that_looks_ahead_keeps_its_mask():
    model = small("gemma3_text", use_bidirectional_attention=True, sliding_window=16).eval()
    found = try_batches(model)
    assert found["unmasked"].startswith("its logits differ by") and found["varlen"]


def test_lengths_in_steps_change_nothing():
    tuned = with_lora(small("llama"))
    expected = pass_of(tuned, padded(EXAMPLES))
    tuned.zero_grad()
    batch = DataCollatorForLanguageModeling(pad_token_id=0, pad_to_multiple_of=64)(EXAMPLES)
    assert batch["input_ids"].shape == (3, 64)
    assert same(expected, pass_of(tuned, batch), 1e-6)


def test_what_goes_into_an_adapter_need_not_be_cast():
    """Under autocast peft would cast it to float32, and autocast back."""
    found = []
    for cast in (True, False):
        tuned = with_lora(small("llama"))
        for module in tuned.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = cast
        with torch.autocast("cpu", torch.bfloat16):
            found.append(pass_of(tuned, padded(EXAMPLES)))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


# --- what is chosen ---------------------------------------------------------------------------------------------------


def choose(device: str, exact=EXACT, attention=None, dtype="bfloat16", quantization=None, hidden_size=512, **train):
    train = {"packing": False, "padding_free": "auto", "train_sampling_strategy": "auto", **train}
    positions = train.pop("positions", 2048)
    config = AutoConfig.for_model("llama", max_position_embeddings=positions, hidden_size=hidden_size)
    settings = {"train": train, "attn_implementation": attention, "dtype": dtype, "quantization": quantization}
    return choose_batches(settings, exact, device, config)


@pytest.fixture
def ampere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_by_default_there_is_no_padding(device, ampere):
    found = choose(device)
    assert (found.padding_free, found.order, found.attention, found.multiple) == (True, "random", varlen.NAME, None)


def test_packed_rows_have_the_fast_attention_too(ampere):
    found = choose("cuda", packing=True)
    assert (found.padding_free, found.order, found.attention) == (False, "random", varlen.NAME)


@pytest.mark.parametrize(
    "case",
    [
        {"exact": {"varlen": "its attention has softcap", "unmasked": None}},
        {"attention": "sdpa"},
        {"padding_free": False},
        {"dtype": "float32"},
    ],
)
def test_else_rows_of_similar_length_come_together(case, ampere):
    found = choose("cuda", **case)
    assert (found.padding_free, found.order, found.attention) == (False, "group_by_length", None)
    assert found.unmasked and found.multiple == 64


def test_an_old_gpu_has_no_such_kernel(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert choose("cuda").order == "group_by_length"


def test_what_the_config_says_is_kept(ampere):
    assert choose("cpu", padding_free=False, train_sampling_strategy="random").order == "random"
    forced = choose("cuda", attention="flash_attention_2", padding_free=True)
    assert forced.padding_free and forced.attention is None
    # Positions that are no multiple: a learned table of them has no row for padding beyond.
    assert choose("cuda", padding_free=False, positions=1000).multiple is None


def test_a_cpu_computes_in_bfloat16_where_it_can_and_gains(monkeypatch, ampere):
    for able in (True, False):
        monkeypatch.setattr(batches, "computes_bfloat16", lambda able=able: able)
        assert choose("cpu").bfloat16 is able
    monkeypatch.setattr(batches, "computes_bfloat16", lambda: True)
    for case in ({"dtype": "float32"}, {"dtype": "float16"}, {"quantization": "nf4"}, {"hidden_size": 96}):
        assert not choose("cpu", **case).bfloat16
    assert not choose("cuda", padding_free=False).bfloat16


def test_a_batch_is_counted():
    batch = Collator(padded, unmasked=False)(EXAMPLES)
    assert batch["counts"] == (26, 144 + 25 + 81, 36) and "attention_mask" in batch
    packed = [{"input_ids": [5] * 9, "labels": [5] * 9, "seq_lengths": [4, 5]}]
    assert Collator(flat, unmasked=True)(packed)["counts"] == (9, 16 + 25, 9)


@pytest.mark.parametrize("key", ["torch_compile", "use_liger_kernel"])
def test_what_a_cpu_cannot_do_fast_is_refused(key, tmp_path):
    from finetuning import settings

    from moult.errors import MoultError

    with pytest.raises(MoultError, match=f"train.{key}: "):
        trainer_config(settings(**{key: True}), tmp_path, "cpu", 64)
