"""plan tries out on a small model of the same architecture: what LoRA can train, whether it merges, whether packing is exact."""

import copy
import json

import pytest
import torch
from finetuning import SETTINGS, Run, tokenizer
from model_types import COMMON, FAST, KINDS, Row, line, lines_of, make_base, try_out
from planning import make
from tiny import make_tokens

from moult.errors import MoultError
from moult.model.estimates import estimate_activations
from moult.model.shrunken import LIMIT, generic, generic_names, needed_layers, of_one_layer, shrink, size
from moult.training.packing import ROUNDING, leak, mixing
from moult.training.trial import find_faults

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def empty(kind: str, **changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **changes))


def refused(*arguments, **settings) -> MoultError:
    with pytest.raises(MoultError) as error:
        make(*arguments, **settings)
    return error.value


# --- the small model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("llama", 2),
        ("gpt2", 2),
        ("qwen2_moe", 2),
        ("gemma3_text", 6),  # five with a window, one without
        ("deepseek_v3", 4),  # three dense ones, then experts
        ("qwen3_next", 4),  # three of linear attention
        ("jamba", 5),
    ],
)
def test_of_a_model_in_its_published_size_a_small_one_is_made(kind, layers):
    model = empty(kind)
    small = shrink(model)
    assert size(model) > 1e8 and size(small) < LIMIT
    assert small.config.num_hidden_layers == layers == needed_layers(model)
    assert generic_names(small) == generic_names(model)
    assert small(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_a_model_that_is_small_is_tried_as_it_is():
    model = empty("llama", **COMMON)
    assert size(shrink(model)) == size(model)


def test_the_random_state_stays():
    before = torch.random.get_rng_state()
    shrink(empty("llama", **COMMON))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_model_that_cannot_be_made_small_does_not_stop_the_plan(tmp_path, monkeypatch):
    import plan

    monkeypatch.setattr(plan, "shrink", lambda model: None)
    result, log = make(make_base("jamba", tmp_path / "base"), tmp_path, train={"packing": True})
    assert result["steps"]["total"] > 0 and result["left_out"] == {}
    assert any("no small model of this architecture" in line for line in log.lines)


def test_names_without_numbers():
    assert generic("model.layers.12.mlp.experts.3.w1") == "model.layers.*.mlp.experts.*.w1"
    assert of_one_layer("model.layers.12.mlp.experts.3.w1") == "model.layers.12.mlp.experts.*.w1"
    assert of_one_layer("lm_head") == generic("lm_head") == "lm_head"


# --- what LoRA can train ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "left_out", "exclude"),
    [
        ("llama", {}, None),
        ("jamba", {"model.layers.*.mamba.dt_proj": "gets no gradient"}, ["dt_proj"]),
        ("llama4_text", {"model.layers.*.feed_forward.router": "'tuple' object has no attribute 'dtype'"}, ["router"]),
        ("falcon_h1", {"out_proj": "Module 'out_proj' is incompatible with Mamba-based models"}, ["out_proj"]),
    ],
)
def test_what_all_linear_picks_and_cannot_train_is_left_out_and_named(kind, left_out, exclude, tmp_path):
    result, log = make(make_base(kind, tmp_path / "base"), tmp_path)
    assert result["left_out"] == left_out
    assert result["lora"] == ({"exclude_modules": exclude} if exclude else {})
    assert not any(name.rsplit(".", 1)[-1] in (exclude or []) for name in result["targets"])
    for name, why in left_out.items():
        assert f"LoRA is not on {name}: {why}" in log.lines


def test_towers_for_images_are_left_out_of_all_linear_and_of_names():
    text = {**COMMON, "sliding_window": 8, "query_pre_attn_scalar": 16}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = empty("gemma3", text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    names = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    faults = find_faults(shrink(model), names, LORA)
    assert faults and all("vision_tower" in name or "multi_modal_projector" in name for name in faults)
    assert all(generic(name) in faults for name in names if "vision_tower" in name)


def test_the_users_own_exclusions_stay(tmp_path):
    base = make_base("jamba", tmp_path / "base")
    assert make(base, tmp_path, {"exclude_modules": ["k_proj"]})[0]["lora"] == {
        "exclude_modules": ["dt_proj", "k_proj"]
    }
    result, _ = make(base, tmp_path, {"exclude_modules": r".*\.[kv]_proj"})
    assert not any(name.endswith(("k_proj", "v_proj", "dt_proj")) for name in result["targets"])


@pytest.mark.parametrize(
    ("kind", "lora", "what", "fix"),
    [
        (
            "jamba",
            {"target_modules": ["q_proj", "dt_proj"]},
            "trained on model.layers.*.mamba.dt_proj: gets no",
            "dt_proj",
        ),
        ("jamba", {"target_modules": r".*\.(q|dt)_proj"}, "trained on model.layers.*.mamba.dt_proj", "leave it out"),
        ("llama4_text", {"target_modules": ["router"]}, "'tuple' object has no attribute", "leave router out"),
        ("falcon_h1", {"target_modules": ["out_proj"]}, "incompatible", "leave it out of lora.target_modules"),
        ("qwen3_moe", {"lora_dropout": 0.1}, "lora.lora_dropout: ", "set lora.lora_dropout: 0"),
        ("qwen3_moe", {"target_parameters": ["experts.nope"]}, "nothing is named experts.nope", "experts.gate_up_proj"),
        ("bert", {}, "TRL's loss of this architecture is", "another model"),
    ],
)
def test_what_the_user_names_and_cannot_work_is_refused(kind, lora, what, fix, tmp_path):
    error = refused(make_base(kind, tmp_path / "base"), tmp_path, lora)
    assert what in error.what and fix in error.fix


# --- experts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_all_linear_reaches_experts(kind, tmp_path):
    result, _ = make(make_base(kind, tmp_path / "base"), tmp_path)
    layer = "model.layers.1.mlp.experts"
    stacked = result["target_parameters"]
    assert {f"{layer}.gate_up_proj", f"{layer}.down_proj"} <= set(stacked)
    assert stacked[f"{layer}.gate_up_proj"]["experts"] == 4
    assert stacked[f"{layer}.gate_up_proj"]["r"] == 8  # gate and up, of rank 4 each (peft)
    assert {entry["wrapper"] for entry in stacked.values()} >= {layer, f"{layer}.base_layer"}
    assert result["serve"]["as"] == "merged"


@pytest.mark.parametrize("kind", ["gpt_oss", "granitemoe", "qwen2_moe"])
def test_experts_out_of_reach_are_told_and_what_to_write_reaches_them(kind, tmp_path):
    base = make_base(kind, tmp_path / "base")
    result, log = make(base, tmp_path)
    assert not result["target_parameters"]
    assert result["out_of_reach"]["share"] > 0.2
    names = result["out_of_reach"]["target_parameters"]
    assert any(f"lora.target_parameters: [{', '.join(names)}]" in line for line in log.lines)
    reached, _ = make(base, tmp_path, {"target_parameters": names})
    assert reached["out_of_reach"] is None
    assert {".".join(name.split(".")[-2:]) for name in reached["target_parameters"]} == set(names)


def test_layers_with_the_name_of_an_expert_are_told_and_what_to_write_reaches_them(tmp_path):
    base = make_base("deepseek_v3", tmp_path / "base")
    result, log = make(base, tmp_path)
    names = [
        f"{place}.{layer}.weight"
        for place in ("mlp", "shared_experts")
        for layer in ("down_proj", "gate_proj", "up_proj")
    ]
    assert result["out_of_reach"]["target_parameters"] == names
    assert any(f"lora.target_parameters: [{', '.join(names)}]" in line for line in log.lines)
    reached, _ = make(base, tmp_path, {"target_parameters": names})
    assert reached["out_of_reach"] is None
    assert "model.layers.1.mlp.shared_experts.up_proj.weight" in reached["target_parameters"]


# --- estimates --------------------------------------------------------------------------------------------------------


def test_a_config_with_a_list_of_sizes(tmp_path):
    assert make(make_base("gemma3n_text", tmp_path / "base"), tmp_path)[0]["memory"]["activations"] > 0


def test_an_estimate_that_cannot_be_made_is_left_out():
    from transformers import PretrainedConfig

    assert estimate_activations(PretrainedConfig(), 0, 1, "float32") is None


# --- packing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
def test_packing_that_is_exact(kind, tmp_path):
    make(make_base(kind, tmp_path / "base"), tmp_path, train={"packing": True})


def test_packing_that_only_the_fast_attention_makes_exact(tmp_path):
    """OPT's own attention does not look at position_ids. Where the fast one does not run, finetune refuses (`leak`)."""
    make(make_base("opt", tmp_path / "base"), tmp_path, train={"packing": True})


@pytest.mark.parametrize(
    ("kind", "attention"), [("gpt_oss", None), ("opt", "sdpa"), ("bloom", None), ("mpt", None), ("jamba", None)]
)
@pytest.mark.parametrize("key", ["packing", "padding_free"])
def test_packing_of_rows_that_see_each_other_is_refused(kind, attention, key, tmp_path):
    error = refused(make_base(kind, tmp_path / "base"), tmp_path, train={key: True}, attention=attention)
    assert error.what.startswith(f"train.{key}: rows that are packed into one sequence see each other")
    assert error.fix == f"set train.{key}: false"


def test_packing_that_lacks_a_package(tmp_path):
    error = refused(make_base("qwen3_5_text", tmp_path / "base"), tmp_path, train={"packing": True})
    assert "can't keep packed sequences apart without `causal_conv1d`" in error.what


def test_a_leak_shows_without_knowing_the_logits_of_a_row_alone():
    rows = [[5, 6, 7, 8, 9], [10, 11, 12, 13], [14, 15, 16]]
    exact, mixes = shrink(empty("llama", **COMMON)), shrink(empty("opt", **COMMON | KINDS["opt"]))
    assert mixing(exact, rows) < ROUNDING < mixing(mixes, rows)
    assert leak(exact, rows, "cpu") == 0.0
    assert leak(mixes, rows, "cpu") > 0.1


# --- the trial step of finetune ---------------------------------------------------------------------------------------


def ready(kind: str, tmp_path) -> Run:
    base = make_base(kind, tmp_path / "base")
    tokenizer(base)
    config = copy.deepcopy(SETTINGS)
    config["lora"]["lora_dropout"] = 0.0
    config["train"]["max_steps"] = 2
    return Run(tmp_path / "run", config, base, make_tokens(tmp_path / "tokens"))


@pytest.mark.slow
def test_layers_without_gradient_stop_the_trial_step(tmp_path):
    run = ready("jamba", tmp_path)
    place = tmp_path / "run" / "plan.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "lora": {}}))
    said = run.go(code=1).stderr
    assert "LoRA gets no gradient on model.layers.*.mamba.dt_proj" in said and "lora.exclude_modules" in said


@pytest.mark.slow
def test_rows_that_see_each_other_stop_the_trial_step(tmp_path):
    run = ready("opt", tmp_path)
    run.config["train"]["padding_free"] = True
    run.config["attn_implementation"] = "sdpa"
    assert "rows that are packed into one sequence see each other" in run.go(code=1).stderr


# --- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture(kind, tmp_path):
    check(kind, try_out(kind, tmp_path))


@pytest.mark.parametrize("kind", FAST)
def test_an_architecture_of_each_kind_of_trouble(kind, tmp_path):
    check(kind, try_out(kind, tmp_path))


# What stands between their last layer and their logits is no part of TRL's fused loss: layers of the head, a cap of the logits.
REFUSED = ("bert", "recurrent_gemma")


def check(kind: str, row: Row) -> None:
    if kind in REFUSED:
        assert "TRL's loss" in row.refused
        return
    assert not row.refused
    assert row.kl < 1e-6
    assert lines_of("\n".join(["| head |", "| --- |", line(row.cells())]))[kind].startswith(f"| {kind} | ")
