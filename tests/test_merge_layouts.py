"""merge into files whose tensors are not the model's parameters: experts in pieces, towers beside the text, other names."""

import json

import pytest
import torch
from layouts import KINDS, adapt, load, make_any
from merging import make_plan, run_merge
from planning import LORA
from safetensors.torch import load_file
from tiny import change_tensors

from moult.errors import MoultError
from moult.files import read_json
from moult.model.architecture import auto_class
from moult.model.layout import check_way_back, in_files, sources, stored_as
from moult.model.safetensors import Tensor, read_tensors

STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LORA_ON = {kind: {**LORA, "target_modules": ["q_proj", "o_proj", "down_proj"]} for kind in KINDS} | {
    "qwen3_moe": {**LORA, "target_modules": ["q_proj", "v_proj"], "target_parameters": STACKS},
    "mixtral": {**LORA, "target_modules": ["q_proj"], "target_parameters": STACKS},
    "gpt_oss": {**LORA, "target_modules": ["q_proj"], "target_parameters": STACKS},
    "phi3": {**LORA, "target_modules": "all-linear"},
}
TOWERS = [kind for kind, settings in KINDS.items() if "towers" in settings]


def all_tensors(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def prepared(base, tmp_path, lora: dict) -> tuple:
    """(adapter, plan) of `base`; the adapter leaves out what the plan has left out."""
    plan = read_json(make_plan(base, tmp_path, lora))
    return adapt(base, tmp_path / "adapter", {**lora, **plan["lora"]}), plan


def divergence(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    p, q = ours.log_softmax(-1), theirs.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40).unsqueeze(0), use_cache=False).logits.double()


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_turn_back_into_the_tensors_of_the_files(kind, tmp_path):
    base = make_any(tmp_path / "base", kind, dtype=torch.bfloat16, shard="60KB")
    model, files = load(base), all_tensors(base)
    state, back = model.state_dict(), {}
    for source in sources(model, read_tensors(base)):
        back |= in_files(source, {name: state[name] for name in source.parameters}, model)
    assert {name.split(".")[-1] for name in set(files) - set(back)} <= {"weight", "bias"}
    assert all("visual" in name for name in set(files) - set(back)), "all but the towers that the class does not load"
    assert all(torch.equal(tensor, files[name]) for name, tensor in back.items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_merge_gives_the_files_that_transformers_writes_of_peft_s(kind, tmp_path):
    from peft import PeftModel

    base = make_any(tmp_path / "base", kind, shard="60KB")
    adapter, plan = prepared(base, tmp_path, LORA_ON[kind])
    merged, _ = run_merge(base, adapter, tmp_path)
    assert read_json(merged / "metadata.json")["how"] == "streamed"
    tuned = PeftModel.from_pretrained(load(base), adapter)
    before = logits(tuned)
    tuned.merge_and_unload().save_pretrained(tmp_path / "peft")
    expected, after, files = all_tensors(tmp_path / "peft"), all_tensors(merged), all_tensors(base)
    assert set(after) == set(files) >= set(expected)
    assert all(torch.equal(tensor, after[name]) for name, tensor in expected.items())
    changed = {name for name in files if not torch.equal(files[name], after[name])}
    stacks = len(plan["target_parameters"])
    assert len(changed) == read_json(merged / "metadata.json")["merged_tensors"] >= len(plan["targets"]) + stacks
    assert divergence(before, logits(load(merged))) < 1e-9
    assert divergence(before, logits(load(base))) > 1e-4
    assert {path.name for path in merged.glob("*.safetensors*")} == {path.name for path in base.glob("*.safetensors*")}


@pytest.mark.parametrize("kind", TOWERS)
def test_towers_get_no_lora_by_default_and_are_copied(kind, tmp_path):
    base = make_any(tmp_path / "base", kind, dtype=torch.bfloat16)
    adapter, plan = prepared(base, tmp_path, LORA)
    merged, _ = run_merge(base, adapter, tmp_path)
    files, after = all_tensors(base), all_tensors(merged)
    changed = {name for name in files if not torch.equal(files[name].view(torch.uint8), after[name].view(torch.uint8))}
    assert changed == {target["tensor"] for target in plan["targets"].values()}
    assert changed and not [name for name in changed if "vis" in name or "projector" in name]
    assert all("language_model" in name for name in changed)
    # Nothing but the text part is in the adapter, so a plain load of it works for a server too.
    assert not [name for name in all_tensors(adapter) if "vis" in name or "projector" in name]
    assert (merged / "config.json").read_bytes() == (base / "config.json").read_bytes()


@pytest.mark.slow
def test_vllm_gets_no_adapter_of_a_class_that_it_does_not_make(tmp_path):
    reasons = {}
    for kind in ("qwen3_5", "gemma3"):
        folder = tmp_path / kind
        base = make_any(folder / "base", kind)
        reasons[kind] = read_json(make_plan(base, folder, LORA))["serve"]["reasons"]
    assert reasons == {"qwen3_5": ["tuned as Qwen3_5ForCausalLM, not as Qwen3_5ForConditionalGeneration"], "gemma3": []}


@pytest.mark.parametrize(
    "kind",
    [
        "ernie4_5_vl_moe",
        "gemma4",
        "inkling2",
        "jamba",
        "llama4",
        "molmo2",
        "qwen3_5_moe",
        "qwen3_vl_moe",
        "deepseek_v2",
    ],
)
def test_the_conversion_of_whole_models_has_a_way_back(kind):
    """In the sizes that transformers gives them, without weights."""
    from transformers import AutoConfig
    from transformers.core_model_loading import revert_weight_conversion

    config = AutoConfig.for_model(kind)
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    state = {name: torch.empty(tensor.shape, device="meta") for name, tensor in model.state_dict().items()}
    files = revert_weight_conversion(model, state)
    tensors = {name: Tensor(name, "x", "F32", tuple(tensor.shape), 0, 0) for name, tensor in files.items()}
    found = sources(model, tensors)
    for source in found:
        check_way_back(source, tensors, model)
    assert {name for source in found for name in source.parameters} == set(state)
    assert {name for source in found for name in source.tensors} == set(tensors)


def test_what_a_class_does_not_load_is_named_in_the_plan_by_the_files_names(tmp_path):
    base = make_any(tmp_path / "base", "qwen3_5")
    stored = stored_as(load(base), read_tensors(base))
    assert stored["model.layers.0.mlp.down_proj.weight"] == "model.language_model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_experts_without_the_prefix_of_the_base_model(kind, tmp_path):
    """Files that were saved of the model without its head."""
    base = make_any(tmp_path / "base", kind, dtype=torch.bfloat16)
    change_tensors(base, lambda tensors: {name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    adapter, _ = prepared(base, tmp_path, LORA_ON[kind])
    from peft import PeftModel

    before = logits(PeftModel.from_pretrained(load(base, torch.float32), adapter))
    merged, _ = run_merge(base, adapter, tmp_path)
    assert not [name for name in all_tensors(merged) if name.startswith("model.")]
    assert divergence(before, logits(load(merged, torch.float32))) < 1e-4
    assert divergence(before, logits(load(base, torch.float32))) > 1e-3


def test_experts_that_are_stacked_in_the_files_too(tmp_path):
    base = make_any(tmp_path / "base", "qwen3_moe")
    stacked = load(base).state_dict()
    change_tensors(base, lambda tensors: {name: tensor.contiguous() for name, tensor in stacked.items()})
    adapter, plan = prepared(base, tmp_path, LORA_ON["qwen3_moe"])
    assert all(target["tensor"] == name for name, target in plan["target_parameters"].items())
    from peft import PeftModel

    expected = PeftModel.from_pretrained(load(base), adapter).merge_and_unload().state_dict()
    merged, _ = run_merge(base, adapter, tmp_path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in all_tensors(merged).items())


def test_stacks_of_experts_are_rounded_once(tmp_path):
    """peft rounds the product to bfloat16 first: its sum is the worse one."""
    base = make_any(tmp_path / "base", "qwen3_moe", dtype=torch.bfloat16)
    adapter, _ = prepared(base, tmp_path, LORA_ON["qwen3_moe"])
    from peft import PeftModel

    exact = PeftModel.from_pretrained(load(base, torch.float32), adapter).merge_and_unload()
    exact.to(torch.bfloat16).save_pretrained(tmp_path / "exact")
    expected = all_tensors(tmp_path / "exact")
    merged, _ = run_merge(base, adapter, tmp_path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in all_tensors(merged).items())


@pytest.mark.parametrize("kind", ["mixtral", "gemma3", "qwen3_5"])
def test_what_peft_computes_is_written_into_the_base_s_own_files(kind, tmp_path):
    """DoRA; norms in float32 among bfloat16, a tensor that nobody loads."""
    base = make_any(tmp_path / "base", kind, dtype=torch.bfloat16, shard="60KB")
    for path in base.glob("*.safetensors"):
        change_tensors(base, norms_in_float32, path.name)
    lora = {**LORA, "use_dora": True, "target_modules": ["q_proj", "v_proj"]}
    adapter, plan = prepared(base, tmp_path, lora)
    merged, log = run_merge(base, adapter, tmp_path)
    assert any("with peft" in line and "use_dora" in line for line in log.lines)
    files, after = all_tensors(base), all_tensors(merged)
    assert {name: tensor.dtype for name, tensor in after.items()} == {name: t.dtype for name, t in files.items()}
    changed = {name for name in files if not torch.equal(files[name], after[name])}
    assert changed == {target["tensor"] for target in plan["targets"].values()}
    from peft import PeftModel

    before = logits(PeftModel.from_pretrained(load(base, torch.float32), adapter))
    assert divergence(before, logits(load(merged, torch.float32))) < 1e-4
    assert divergence(before, logits(load(base, torch.float32))) > 1e-3


def norms_in_float32(tensors):
    extra = {"nobody.loads.this": torch.full((3,), 0.1)} if any("norm" in name for name in tensors) else {}
    return {name: t.float() + 1e-4 if "norm" in name else t for name, t in tensors.items()} | extra


def test_lora_on_an_embedding_is_computed_by_peft(tmp_path):
    from tiny import make_model

    base = make_model(tmp_path / "base")
    adapter, plan = prepared(base, tmp_path, {**LORA, "target_modules": ["q_proj", "embed_tokens"]})
    assert plan["merge"] == {"how": "peft", "reasons": ["LoRA on Embedding"]}
    from peft import PeftModel

    before = logits(PeftModel.from_pretrained(load(base), adapter))
    merged, _ = run_merge(base, adapter, tmp_path)
    assert divergence(before, logits(load(merged))) < 1e-9
    assert divergence(before, logits(load(base))) > 1e-4
    assert read_json(merged / "metadata.json")["merged_tensors"] == 3


def test_a_tied_head_that_is_stored_as_well_stays_the_embedding(tmp_path):
    from tiny import make_model

    base = make_model(tmp_path / "base", kind="qwen3", tie_word_embeddings=True, dtype=torch.bfloat16)
    change_tensors(base, lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    lora = {**LORA, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    adapter, _ = prepared(base, tmp_path, lora)
    merged, _ = run_merge(base, adapter, tmp_path)
    files, after = all_tensors(base), all_tensors(merged)
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(after["lm_head.weight"], files["lm_head.weight"])


def test_an_adapter_tensor_that_peft_would_leave_out_is_refused(tmp_path):
    base = make_any(tmp_path / "base", "phi3")
    lora = {**LORA, "use_dora": True, "target_modules": ["qkv_proj"]}
    adapter, _ = prepared(base, tmp_path, lora)
    extra = {"base_model.model.model.layers.9.self_attn.qkv_proj.lora_A.weight": torch.zeros(4, 64)}
    change_tensors(adapter, lambda tensors: {**tensors, **extra}, "adapter_model.safetensors")
    with pytest.raises(MoultError, match=r"1 tensors match no layer of the base: base_model\.model\.model\.layers\.9"):
        run_merge(base, adapter, tmp_path)
    assert not list(tmp_path.glob("merged*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "vit"}, "base: transformers cannot continue a text with a model of the type vit"),
        ({"model_type": "t5"}, "base: transformers cannot continue a text with a model of the type t5"),
        ({"num_attention_heads": 5, "hidden_size": "many"}, "transformers cannot build this model"),
    ],
)
def test_remote_code_is_no_advice_for_what_transformers_knows(change, message, tmp_path):
    from moult.model.architecture import empty_model

    base = make_any(tmp_path / "base", "phi3")
    config = {**json.loads((base / "config.json").read_text()), "architectures": None, **change}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(MoultError, match=message) as error:
        empty_model(base, trust_remote_code=False)
    assert "trust_remote_code" not in error.value.fix
