"""What the config check proposes for keys and values that are nearly right, or right for other tools."""

import re

import pytest
from configs import SCHEMA, config

from moult.workflow.config import ConfigError
from moult.workflow.hints import ALIASES


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        config(text)
    return error.value.problems


def properties(section: str) -> dict:
    name = {"datasets.<name>": "dataset"}.get(section, section)
    return SCHEMA["$defs"][name]["properties"] if name in SCHEMA["$defs"] else SCHEMA["properties"][name]["properties"]


def test_every_alias_stands_for_a_key_that_may_be_set():
    seen: set[str] = set()
    for key, aliases in ALIASES.items():
        section, _, name = key.rpartition(".")
        known = properties(section) if section else SCHEMA["properties"]
        assert "x-refused" not in known[name], key
        assert not seen & set(aliases.split()), f"{key}: an alias of two keys"
        seen |= set(aliases.split())
        # A key of that section under this very name would never be looked up.
        assert not set(aliases.split()) & known.keys(), key


def test_a_refused_key_is_never_proposed():
    for section in ("lora", "train"):
        refused = {name for name, field in properties(section).items() if "x-refused" in field}
        for name in refused:
            [problem] = problems(f"{section}: {{{name}_: 1}}")
            proposed = re.search(r"did you mean ([\w.<>-]+)|known here: (.*)", problem)
            words = set(re.split(r"[ ,?.]+", (proposed[1] or proposed[2]) if proposed else ""))
            assert not words & refused, problem


@pytest.mark.parametrize(
    ("text", "hints"),
    [
        (
            "lora: {rank: 8, alpha: 16, dropout: 0.05, lora_target: all, lora_r: 4}",
            ["r", "lora_alpha", "lora_dropout", "target_modules", "r"],
        ),
        (
            "train: {lr: 1, epochs: 2, num_epochs: 3, micro_batch_size: 2, batch_size: 4, batch-size: 4, Epochs: 1}",
            [
                "learning_rate",
                "num_train_epochs",
                "num_train_epochs",
                *["per_device_train_batch_size"] * 3,
                "num_train_epochs",
            ],
        ),
        (
            "train: {cutoff_len: 512, sequence_len: 512, model_name: x, rank: 8, random_seed: 1}",
            [*["datasets.<name>.max_length"] * 2, "model.name", "lora.r", "seed, at the top"],
        ),
        ("datasets: {a: {cutoff_len: 512, path: x, val_set_size: 1}}", ["max_length", "source", "val_size"]),
        ("runs: {v: {dataset: a, lora: {rank: 8}, train: {epochs: 1}}}", ["r", "num_train_epochs"]),
        ("override: {train: {epochs: 1}, dataset: {max_samples: 10}}", ["sample_size", "num_train_epochs"]),
        # axolotl and LLaMA-Factory have no sections.
        (
            "{base_model: x, lora_rank: 8, micro_batch_size: 2, output_dir: x, val_file: x}",
            [
                "model.name",
                "lora.r",
                "train.per_device_train_batch_size",
                "paths.results",
                "datasets.<name>.val_source",
            ],
        ),
        ("model: {model_name_or_path: x, torch_dtype: float32}", ["name", "dtype"]),
    ],
)
def test_keys_of_other_tools(text, hints):
    found = [problem for problem in problems(text) if "unknown key" in problem]
    assert [re.search(r"did you mean (.*)\?$", problem)[1] for problem in found] == hints


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("train: {learning_rat: 1}", "train.learning_rat: unknown key; did you mean learning_rate?"),
        ("lora: {learning_rate: 1}", "lora.learning_rate: unknown key here; it belongs in train"),
        ("lora_alpha: 8", "lora_alpha: unknown key here; it belongs in lora"),
        # What nobody would look for below eval or serve is not proposed there.
        (
            "eval: {template: x}",
            "eval.template: unknown key; known here: answer_rows, benchmarks, confidence, contamination",
        ),
        ("eval: {max_tokens: 5}", "eval.max_tokens: unknown key; did you mean max_new_tokens?"),
        ("eval: {prompts: [{id: p, prompt: q, target: x}]}", "eval.prompts.0.target: unknown key; known here: expect"),
    ],
)
def test_other_keys(text, problem):
    assert problems(text)[0].startswith(problem)


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "q_proj,v_proj",
        "q_proj, v_proj",
        "q_proj v_proj",
        "q_proj;v_proj",
        "q_proj|v_proj",
        "[q_proj, v_proj]",
        "['q_proj','v_proj']",
        '["q_proj", "v_proj"]',
    ],
)
@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
def test_a_list_of_names_as_text(key, text):
    quoted = "'" + text.replace("'", "''") + "'"
    hint = f"lora.{key}: {text!r} is one text; make it a list: [q_proj, v_proj]"
    assert problems(f"lora: {{{key}: {quoted}}}") == [hint]
    assert problems(f"lora: {{{key}: [o_proj, {quoted}]}}") == [hint]


@pytest.mark.parametrize(
    "text", ["all", "ALL", "all_linear", "all linear", "all-linears", "alllinear", "linear", "[all]"]
)
def test_nearly_all_linear(text):
    shown = "all" if text == "[all]" else text
    hint = f"lora.target_modules: {shown!r} names no layer; did you mean all-linear?"
    assert problems(f"lora: {{target_modules: {text}}}") == [hint]


@pytest.mark.parametrize(
    "text",
    [
        "all-linear",
        "ALL-LINEAR",
        "null",
        "[q_proj, v_proj]",
        "[linear, attn.q_proj]",
        "'.*\\.(q_proj|v_proj)'",
        "'model\\.layers\\.[0-9]{1,2}\\.mlp\\.up_proj'",
        "'.*proj'",
        "q_proj",
    ],
)
def test_what_may_match_a_layer_is_left_to_plan(text):
    config(f"lora: {{target_modules: {text}}}")


def test_a_long_text_takes_no_time():
    assert problems("lora: {target_modules: '" + "a " * 50_000 + "*', r: 0}") == ["lora.r: must be >= 1, got 0"]
