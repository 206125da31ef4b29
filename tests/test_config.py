"""The config: what is refused and with which words, how runs come about, where things are."""

import subprocess
import sys

import pytest
import yaml
from configs import BASE, SCHEMA, config
from workflow import ROOT

from moult.workflow.config import (
    ConfigError,
    dataset_slug,
    duplicate_keys,
    is_local,
    local_model,
    merged,
    misplaced,
    resolve,
    slug,
)
from moult.workflow.stages import stage_settings


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        config(text)
    assert "config/README.md lists all keys" in str(error.value)
    assert all(f"\n  - {problem}" in str(error.value) for problem in error.value.problems)
    return error.value.problems


# --- refused ----------------------------------------------------------------------------------------------------------

NOTHING_MEASURED = (
    "eval: nothing would be measured; set perplexity: true, or add checks (expect of prompts, row_expect) or benchmarks"
)
REFUSED = [
    # unknown keys: the probable one, or the section that has it
    ("train: {learning_rat: 1}", "train.learning_rat: unknown key; did you mean learning_rate?"),
    ("train: {lr: 1}", "train.lr: unknown key; did you mean learning_rate?"),
    ("train: {patience: 3}", "train.patience: unknown key; did you mean early_stopping_patience?"),
    (
        "datasets: {a: {val_size: 0.5, test_size: 0.5}}",
        "datasets.a: val_size 0.5 and test_size 0.5 leave no training rows; lower them",
    ),
    ("eval: {perplexity: false}", NOTHING_MEASURED),
    ("eval: {perplexity: false, answer_rows: 0, row_expect: {exact: true}}", NOTHING_MEASURED),
    ("modle: {}", "modle: unknown key; did you mean model?"),
    ("datasets: {a: {columns: {promt: q}}}", "datasets.a.columns.promt: unknown key; did you mean prompt?"),
    ("runs: {a: {datset: a}}", "runs.a.datset: unknown key; did you mean dataset?"),
    ("train: {r: 3}", "train.r: unknown key here; it belongs in lora"),
    ("lora: {learning_rate: 1}", "lora.learning_rate: unknown key here; it belongs in train"),
    ("languages: [en]", "languages: unknown key here; it belongs in datasets.<name>"),
    ("runs: {a: {max_new_tokens: 9}}", "runs.a.max_new_tokens: unknown key here; it belongs in eval"),
    ("paths: {zzz: 1}", "paths.zzz: unknown key; known here: models, results"),
    # fields that a stage controls itself, with the reason
    ("train: {output_dir: x}", "train.output_dir: not yours to set: checkpoints go to results/<run>/trainer_state"),
    ("train: {seed: 4}", "train.seed: not yours to set: it is the top-level seed"),
    ("lora: {task_type: SEQ_CLS}", "lora.task_type: not yours to set: it is always CAUSAL_LM"),
    # types, limits, choices
    ("lora: {r: 2.5}", "lora.r: expected integer, got 2.5"),
    ("seed: true", "seed: expected integer, got True"),
    ("seed: 4294967296", "seed: must be <= 4294967295, got 4294967296"),
    ("train: {learning_rate: -1}", "train.learning_rate: must be > 0, got -1"),
    ("lora: {lora_dropout: 1}", "lora.lora_dropout: must be < 1, got 1"),
    ("train: {max_steps: five}", "train.max_steps: expected integer, got 'five'"),
    ("lora: {use_dora: 1}", "lora.use_dora: expected boolean, got 1"),
    ("model: {dtype: bf16}", "model.dtype: 'bf16' is none of bfloat16, float16, float32; did you mean bfloat16?"),
    ("train: {eval_strategy: never}", "train.eval_strategy: 'never' is none of no, steps, epoch"),
    ("datasets: {a: {sample_size: all}}", "datasets.a.sample_size: 'all' does not match '^full$' …"),
    ("datasets: {a: {val_size: 2.5}}", "datasets.a.val_size: 2.5 is not a multiple of 1 (A number of rows is …"),
    ("datasets: {a: {languages: en}}", "datasets.a.languages: expected array, got 'en'"),
    ("datasets: {a: {languages: [EN]}}", "datasets.a.languages.0: 'EN' does not match '^[a-z]{2,3}$' (An ISO 639-1 …"),
    ("datasets: {c: {}}", "datasets.c.source: missing"),
    ("datasets: {a: {source: null}}", "datasets.a.source: expected string or array or object, got None"),
    ("datasets: {a: {source: []}}", "datasets.a.source: [] should be non-empty …"),
    ("datasets: {a: {source: {weight: 1}}}", "datasets.a.source.path: missing"),
    ("datasets: {a: {source: [{path: x, weight: 0}]}}", "datasets.a.source.0.weight: must be > 0, got 0"),
    ("model: {name: null}", "model.name: missing (run a needs it); a hub id or a local folder"),
    # what YAML makes of words, numbers and nothing
    ("train:", "train: expected object, got None (an empty section; leave it out)"),
    ("datasets: {a: {languages: [no]}}", "datasets.a.languages.0: expected string, got False (quote it: YAML …"),
    ("model: {revision: 1234567}", "model.revision: expected string or null, got 1234567 (quote it)"),
    ("model: {revision: 2024-01-01}", "model.revision: 2024-01-01 is a date to YAML; quote it"),
    ("model: {chat_template_kwargs: {day: 2024-01-01}}", "model.chat_template_kwargs.day: 2024-01-01 is a date …"),
    ("model: {chat_template_kwargs: {1: x}}", "model.chat_template_kwargs.1: the key 1 is not text; quote it"),
    ("datasets: {2024: {source: x}}", "datasets.2024: the key 2024 is not text; quote it"),
    ("train: {learning_rate: .nan}", "train.learning_rate: nan is not a finite number"),
    ("datasets: {a: {val_size: .inf}}", "datasets.a.val_size: inf is not a finite number"),
    ("train: {learning_rate: 1e999}", "train.learning_rate: inf is not a finite number"),
    # names become folders
    (
        "datasets: {../x: {source: x}}",
        "datasets.../x: not a name; use letters, digits, '.', '_' and '-' (at most 64), …",
    ),
    ("runs: {a/b: {dataset: a}}", "runs.a/b: not a name; …"),
    ("runs: {.a: {dataset: a}}", "runs..a: not a name; …"),
    ("runs: {-rf: {dataset: a}}", "runs.-rf: not a name; …"),
    ('runs: {"a\\n": {dataset: a}}', "runs.a\n: not a name; …"),
    (f"runs: {{{'x' * 65}: {{dataset: a}}}}", f"runs.{'x' * 65}: not a name; …"),
    ("serve: {engine: tgi}", "serve.engine: 'tgi' is none of vllm, transformers"),
    ("serve: {port: 0}", "serve.port: must be >= 1, got 0"),
    ("serve: {api_key: secret}", "serve.api_key: unknown key; did you mean api_key_env?"),
    ("serve: {vllm: {api_key: secret}}", "serve.vllm.api_key: not yours to set: a key in a config …"),
    (
        "serve: {vllm: {hos: 0.0.0.0}}",
        "serve.vllm.hos: vLLM takes it for host, which is not yours to set: it is serve.host",
    ),
    ("serve: {vllm: {config: more.yaml}}", "serve.vllm.config: not yours to set: a file of options …"),
    ("serve: {vllm: {ssl_keyfile: k.pem}}", "serve.vllm.ssl_keyfile: not yours to set: `make serve` …"),
    ("serve: {vllm: {enforce_eager: null}}", "serve.vllm.enforce_eager: expected string or number or …"),
    ("serve: {vllm: {api-key: secret}}", "serve.vllm.api-key: not yours to set: write _ instead of -"),
    (
        "runs: {a: {serve: {vllm: {max_lora_rank: 8}}}}",
        "runs.a.serve.vllm.max_lora_rank: not yours to set: it follows from the adapter",
    ),
    ("runs: {Models: {dataset: a}}", "runs.Models: reserved name (results/models holds something else)"),
    ("datasets: {prepared: {source: x}}", "runs.prepared: reserved name (results/prepared holds something else)"),
    ("runs: {A: {dataset: a}}", "runs.A: there is also a; some file systems take the two for one folder"),
    ("eval: {prompts: [{id: ../x, prompt: q}]}", "eval.prompts.0.id: '../x' does not match …"),
    # runs
    ("runs: {v: {dataset: aa}}", "runs.v.dataset: no dataset is named aa; did you mean a?"),
    ("runs: {v: {}}", "runs.v.dataset: no dataset is named v; there are: a, b"),
    ("runs: {a: {dataset: b}}", "runs.a.dataset: a is a dataset, and the run of that name is its own; rename the run"),
    # eval, and settings that exclude each other
    ("eval: {prompts: [{id: p, prompt: x}, {id: p, prompt: y}]}", "eval.prompts: the id p is there twice"),
    ("eval: {prompts: [{id: p}]}", "eval.prompts.p: give either prompt or messages"),
    ("eval: {prompts: [{id: p, prompt: x, messages: [{}]}]}", "eval.prompts.p: give either prompt or messages"),
    ("eval: {prompts: [{id: p, prompt: x, expect: {exact: true}}]}", "eval.prompts.p.expect: true and match compare …"),
    ("eval: {prompts: [{id: p, prompt: x, expect: {match: (a)}}]}", "eval.prompts.p.expect: true and match compare …"),
    ("eval: {row_expect: {regex: (}}", "eval.row_expect.regex: '(' is no regular expression: …"),
    (
        "eval: {row_expect: {regex: 'a{1,99999999999}'}}",
        "eval.row_expect.regex: 'a{1,99999999999}' is no regular expression: …",
    ),
    ("eval: {row_expect: {match: abc}}", "eval.row_expect.match: has no group; put the part that is compared in ( )"),
    ("eval: {row_expect: {exact: 'true'}}", "eval.row_expect.exact: 'true' is text here, and no check of all rows; …"),
    ("eval: {row_expect: {}}", "eval.row_expect: {} should be non-empty …"),
    ("train: {gpu: 3, nodes: 2}", "train.gpu is 3 and train.nodes 2: each node takes as many, so make it a multiple"),
    ("train: {shard: true}", "train.shard: train.gpu is 1, so there is nothing to split the base over; raise it, or …"),
    (
        "{train: {shard: true, gpu: 2}, model: {quantization: nf4}}",
        "train.shard: a quantized base cannot be split; set model.quantization: null, or leave shard out",
    ),
    (
        "{train: {shard: true, gpu: 2}, lora: {modules_to_save: [lm_head]}}",
        "train.shard: lora.modules_to_save trains weights of the base, which is in pieces; leave one of the two out",
    ),
    (
        "{train: {shard: true, gpu: 2}, lora: {bias: all}}",
        "train.shard: lora.bias trains weights of the base, which is in pieces; leave one of the two out",
    ),
    (
        "{train: {shard: true, gpu: 2, per_device_train_batch_size: auto}}",
        "train.shard: it cannot try batches out; set train.per_device_train_batch_size to a number",
    ),
    (
        "{train: {shard: true, gpu: 2}, lora: {use_dora: true}}",
        "train.shard: lora.use_dora reads whole weights of the base, which is in pieces; leave one of the two out",
    ),
    (
        "{train: {shard: true, gpu: 2}, lora: {init_lora_weights: pissa}}",
        "train.shard: lora.init_lora_weights: pissa reads whole weights of the base, which is in pieces; leave one of …",
    ),
    (
        "{model: {quantization: nf4}, lora: {init_lora_weights: olora}}",
        "lora.init_lora_weights: olora needs a base that is not quantized; set true or gaussian",
    ),
    (
        "{model: {quantization: int8}, lora: {bias: all}}",
        "lora.bias: the biases of a quantized base cannot be trained; leave it out",
    ),
    ("train: {fsdp: full_shard}", "train.fsdp: not yours to set: it is train.shard"),
    ("model: {quantization: fp4}", "model.quantization: 'fp4' is none of nf4, int8, null; did you mean nf4?"),
    ("model: {load_in_4bit: true}", "model.load_in_4bit: unknown key; did you mean quantization?"),
    ("train: {eval_strategy: no}", "train.eval_strategy: 'no' leaves no best by validation loss; set load_best_…"),
    ("train: {save_strategy: no}", "train.save_strategy: 'no' leaves no best by validation loss; set load_best_…"),
    (
        "train: {early_stopping_patience: 3, eval_strategy: no, load_best_model_at_end: false}",
        "train.early_stopping_patience: eval_strategy: 'no' makes no validations to count; set steps or epoch",
    ),
    (
        "train: {early_stopping_patience: 3, load_best_model_at_end: false}",
        "train.early_stopping_patience: with load_best_model_at_end: false the adapter of the last step is used, …",
    ),
    ("train: {early_stopping_patience: 0}", "train.early_stopping_patience: must be >= 1, got 0"),
    (
        "train: {early_stopping_threshold: 0.1}",
        "train.early_stopping_threshold: it needs early_stopping_patience; set that, or leave it out",
    ),
    ("train: {packing: true, padding_free: true}", "train.padding_free: packing has it already; leave it out"),
]


@pytest.mark.parametrize(("text", "problem"), REFUSED, ids=[text for text, _ in REFUSED])
def test_refused(text, problem):
    found = problems(text)
    start, more, _ = problem.partition("…")
    assert [line[: len(start)] if more else line for line in found[:1]] == [start]
    # Every run has the same model: only there one mistake is as many problems.
    assert len(found) == (2 if "model.name" in problem else 1)


def test_what_no_file_name_and_no_number_can_be():
    assert problems('datasets: {a: {source: "a\\0b"}}') == [
        "datasets.a.source: holds '\\x00', which no file name or command can hold"
    ]
    [half] = problems('model: {chat_template_kwargs: {"\\ud800": 1}}')
    assert half.startswith("model.chat_template_kwargs.'\\ud800': holds '\\ud800'") and half.encode()
    assert problems("train: {learning_rate: 1" + "0" * 400 + "}") == [
        "train.learning_rate: the number is too large (the limit is 2 to the 63rd)"
    ]


def test_nested_without_end():
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ConfigError, match="nested too deeply to read"):
        resolve({"pathvars": {"x": deep}}, SCHEMA)
    loop: list = []
    loop.append(loop)
    with pytest.raises(ConfigError, match="more than 500,000 values; look for YAML anchors"):
        resolve({"pathvars": {"x": loop}}, SCHEMA)


def test_a_long_value_is_shown_in_part():
    [problem] = problems(f"train: {{learning_rate: {'x' * 10_000}}}")
    assert problem.startswith("train.learning_rate: expected number") and len(problem) < 700


def test_all_problems_are_said_at_once():
    found = problems("seed: -1\ntrain: {learning_rat: 1, seed: 2}\nlora: {r: 0}\ndatasets: {a: {split: 5}}")
    assert [problem.partition(":")[0] for problem in found] == [
        "datasets.a.split",
        "lora.r",
        "seed",
        "train.learning_rat",
        "train.seed",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {learning_rat: 1}", "train.learning_rat: unknown key; did you mean learning_rate?"),
        ("runs: {demo: {model: {chat_template_kwargs: {day: 2024-01-01}}}}", "2024-01-01 is a date to YAML; quote it"),
        ("datasets: {new: {source: nowhere.jsonl}}", "nowhere.jsonl"),
        ("datasets: {new: {source: 'no*where.jsonl'}}", "no*where.jsonl"),
    ],
)
def test_snakemake_stops_with_the_message(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    target = "results/prepared/new/train.jsonl"
    command = [sys.executable, "-m", "snakemake", "-n", f"--configfile={tmp_path}/mine.yaml", target]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    assert message in result.stdout + result.stderr
    assert "Traceback (most recent call last)" not in result.stdout + result.stderr


# --- accepted ---------------------------------------------------------------------------------------------------------


def test_what_yaml_and_the_command_line_make_of_values_is_undone():
    resolved = config("""
train: {learning_rate: 1e-4, warmup_steps: '5', packing: 'true', eval_strategy: no, logging_strategy: off,
        save_strategy: no, load_best_model_at_end: 'false', gradient_checkpointing: 'false', max_steps: '7'}
lora: {r: 2.0, lora_alpha: '8', init_lora_weights: 'false'}
model: {chat_template: 'null'}
network: {tls: off}
datasets: {a: {sample_size: '100', val_size: 3.0, source: {path: x, weight: 1e-1}}}
eval: {prompts: [{id: p, prompt: q, expect: {contains: 'true'}}]}
""")
    train = resolved["train"]
    assert train["learning_rate"] == 1e-4
    assert (train["warmup_steps"], train["max_steps"]) == (5, 7)
    assert (train["eval_strategy"], train["logging_strategy"], train["save_strategy"]) == ("no", "no", "no")
    assert [train[key] for key in ("packing", "load_best_model_at_end", "gradient_checkpointing")] == [
        True,
        False,
        False,
    ]
    assert (resolved["lora"]["r"], resolved["lora"]["lora_alpha"]) == (2, 8)
    assert isinstance(resolved["lora"]["r"], int)
    assert resolved["lora"]["init_lora_weights"] is False
    assert resolved["model"]["chat_template"] is None
    assert resolved["network"]["tls"] == "off"
    assert resolved["datasets"]["a"]["sample_size"] == 100
    assert stage_settings(resolved, "prepare", "a")["sources"][0]["weight"] == 0.1
    # Text stays text where text is meant: an answer may have to contain "true".
    assert resolved["eval"]["prompts"][0]["expect"]["contains"] == "true"


def test_resolving_changes_nothing_that_was_given():
    given = yaml.safe_load(BASE)
    resolve(given, SCHEMA)
    assert given == yaml.safe_load(BASE)


def test_the_shipped_configs_are_valid():
    shipped = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    assert "demo" in resolve(shipped, SCHEMA)["runs"]
    debug = yaml.safe_load((ROOT / "config/debug.yaml").read_text())
    resolved = resolve(merged(shipped, debug), SCHEMA)
    # It is laid over what a run says itself.
    assert shipped["runs"]["demo"]["train"]["max_steps"] != resolved["runs"]["demo"]["train"]["max_steps"] == 5
    assert resolved["datasets"]["demo"]["max_rows"] == 200


# --- runs -------------------------------------------------------------------------------------------------------------


def test_each_dataset_is_a_run_and_variants_change_what_they_name():
    runs = config("""
seed: 3
lora: {r: 4, rank_pattern: {q_proj: 2}}
runs:
  a: {train: {learning_rate: 1.0e-5}}
  a-r64: {dataset: a, seed: 9, lora: {r: 64, rank_pattern: {k_proj: 8}}}
""")["runs"]
    assert {name: run["dataset"] for name, run in runs.items()} == {"a": "a", "b": "b", "a-r64": "a"}
    assert [runs[name]["train"]["learning_rate"] for name in ("a", "b", "a-r64")] == [1e-5, 2e-4, 2e-4]
    assert [runs[name]["lora"]["r"] for name in ("a", "b", "a-r64")] == [4, 4, 64]
    assert [runs[name]["seed"] for name in ("a", "b", "a-r64")] == [3, 3, 9]
    assert runs["a-r64"]["lora"]["rank_pattern"] == {"q_proj": 2, "k_proj": 8}


def test_a_run_with_a_model_of_its_own_takes_nothing_else_from_the_common_one():
    runs = config("""
model: {revision: v2, dtype: float16}
runs:
  other: {dataset: a, model: {name: org/other}}
  half: {dataset: a, model: {dtype: float32}}
""")["runs"]
    defaults = {key: field.get("default") for key, field in SCHEMA["$defs"]["model"]["properties"].items()}
    assert runs["other"]["model"] == {**defaults, "name": "org/other"}
    assert runs["half"]["model"] == {**runs["a"]["model"], "dtype": "float32"}
    assert runs["a"]["model"]["chat_template"] == "chatml"


@pytest.mark.parametrize(
    ("text", "runs"),
    [
        ("datasets: {a: null}", ["b"]),
        ("datasets: {a: null}\nruns: {v: {dataset: a}, a: {seed: 1}}", ["b"]),
        ("runs: {v: null}", ["a", "b"]),
    ],
)
def test_null_takes_an_entry_out(text, runs):
    assert list(config(text)["runs"]) == runs


# --- where things are -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("Qwen/Qwen3-0.6B", False),
        ("gpt2", False),
        ("./gpt2", True),
        ("../models/x", True),
        ("/models/x", True),
        ("~/x", True),
        ("data/*.jsonl", True),
        ("rows.jsonl.gz", True),
        ("a/b/c", True),
        ("here", True),
    ],
)
def test_a_path_is_told_from_a_hub_id(tmp_path, monkeypatch, name, local):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert is_local(name) is local


def test_models_are_looked_up_in_the_mount_first(tmp_path):
    (tmp_path / "org/model").mkdir(parents=True)
    mount = {"models": str(tmp_path)}
    assert local_model({"name": "org/model"}, mount) == str(tmp_path / "org/model")
    assert local_model({"name": "org/absent"}, mount) is None
    assert local_model({"name": "org/model"}, {"models": None}) is None


def test_distinct_names_have_distinct_folders():
    names = [
        ("a/b", None),
        ("/a/b", None),
        ("./a/b", None),
        ("a/b", "v1"),
        ("a/b", "v/1"),
        ("a/b", "v-1"),
        ("a b", None),
    ]
    slugs = [slug(*name) for name in names]
    parts = [("glue", "sst2", "train"), ("glue/sst2", None, "train"), ("glue", None, "train")]
    slugs += [dataset_slug({"subset": subset, "split": split, "revision": None}, hub) for hub, subset, split in parts]
    assert len({text.lower() for text in slugs}) == len(names) + len(parts)
    assert slugs[0] == "a--b"
    assert not [text for text in slugs if "/" in text or text.startswith(".")]


# --- what the values do not show --------------------------------------------------------------------------------------


def test_keys_that_are_there_twice_are_found_with_their_lines(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "seed: 1\nlora: &l {r: 4}\ndatasets:\n  d:\n    source: [{path: a, path: b}]\nseed: 2\nruns: {v: {lora: *l}}\n"
    )
    assert sorted(duplicate_keys(path)) == [
        f"datasets.d.source.0.path: there twice, in lines 5 and 5 of {path}",
        f"seed: there twice, in lines 1 and 6 of {path}",
    ]
    path.write_text('{\n\t"seed": 1\n}')  # JSON, and no YAML
    assert duplicate_keys(path) == []


def test_links_that_leave_the_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk" / "a" / "tokens").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "results").symlink_to("disk")  # all of them elsewhere is fine
    (tmp_path / "disk" / "b").symlink_to("a")
    assert misplaced(config()) == []
    (tmp_path / "disk" / "b").unlink()
    (tmp_path / "disk" / "a" / "merged").symlink_to(tmp_path / "other")
    [problem] = misplaced(config())
    assert problem.startswith(f"results/a/merged: a link to {tmp_path / 'other'}, outside of results")


def test_a_config_of_a_thousand_runs_is_not_too_large():
    runs = {f"r{index}": {"dataset": "a", "train": {"max_steps": index + 1}} for index in range(1000)}
    assert len(resolve(yaml.safe_load(BASE) | {"runs": runs}, SCHEMA)["runs"]) > 1000
