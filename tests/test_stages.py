"""What each stage reads of the config, and no more; which runs share a stage's result."""

import json

import pytest
import yaml
from configs import BASE, SCHEMA, config

from moult.files import canonical
from moult.workflow.config import merged, resolve
from moult.workflow.stages import STAGES, encoded_as, measured_as, stage_settings

# --- what each stage reads --------------------------------------------------------------------------------------------

BOTH = {"evaluate_base", "evaluate_tuned"}
ASKING = {*BOTH, "smoke_test", "evaluate_export"}
SCORING = {"score", "score_export"}
CARDS = {"model_card", "export_card"}
BENCHMARKS = {"benchmark_base", "benchmark_tuned"}
PROMPT = "eval: {prompts: [{id: p, prompt: q, expect: {contains: x}}]}\n"


PAGES = {"report", "summary", "compare"}


def read_by_stages(resolved: dict, run: str = "a") -> dict[str, str]:
    """Of the pages nothing is expected: no stage reads them, and they show most settings."""
    return {stage: canonical(stage_settings(resolved, stage, run)) for stage in STAGES if stage not in PAGES}


@pytest.mark.parametrize(
    ("edit", "stages"),
    [
        ("train: {learning_rate: 1.0e-5}", {"finetune"}),
        ("train: {eval_steps: 7}", {"finetune"}),
        ("train: {max_steps: 7}", {"plan", "finetune"}),
        ("train: {early_stopping_patience: 3}", {"plan", "finetune"}),
        ("train: {gpu: 2}", {"plan", "finetune"}),
        ("train: {gpu: 2, shard: true}", {"plan", "finetune"}),
        ("lora: {r: 8}", {"plan", "finetune"}),
        ("runs: {a: {lora: {r: 8}}}", {"plan", "finetune"}),
        ("runs: {b: {lora: {r: 8}}}", set()),
        ("runs: {v: {dataset: a, lora: {r: 8}}}", set()),
        ("seed: 5", {"prepare", "finetune", *SCORING}),
        ("runs: {a: {seed: 5}}", {"finetune", *SCORING}),
        ("runs: {a: {seeds: [0, 5]}}", SCORING),
        ("eval: {prompts: [{id: p, prompt: other, expect: {contains: x}}]}", {*ASKING, "contamination", *SCORING}),
        ("eval: {prompts: [{id: p, prompt: q, expect: {contains: y}}]}", {*SCORING, "smoke_test", "evaluate_export"}),
        ("eval: {row_expect: {exact: true}}", SCORING),
        ("eval: {confidence: 0.9}", SCORING),
        ("eval: {max_new_tokens: 9}", ASKING),
        ("eval: {forgetting: false}", {*BOTH, *SCORING, "evaluate_export"}),
        ("eval: {forgetting_limit: 0.2}", SCORING),
        ("eval: {merge_check_rows: 4}", {"evaluate_tuned", "evaluate_export"}),
        ("datasets: {a: {max_length: 64}}", {"encode"}),
        ("datasets: {a: {languages: [en]}}", {"prepare", *CARDS}),
        ("datasets: {a: {val_size: 0.2}}", {"prepare"}),
        ("datasets: {a: {test_size: null}}", {"prepare"}),
        ("datasets: {a: {test_source: held.jsonl}}", {"prepare"}),
        ("datasets: {a: {columns: {prompt: q}}}", {"prepare"}),
        ("datasets: {b: {max_length: 64, languages: [en]}}", set()),
        ("model: {dtype: float16}", {"plan", "finetune", *ASKING, *BENCHMARKS}),
        ("model: {quantization: nf4}", {"plan", "finetune", "evaluate_tuned"}),
        ("eval: {gpu: 2}", set()),
        (
            "eval: {benchmarks: [{task: gsm8k}]}",
            {"contamination", *SCORING},
        ),  # its rules have a param for each benchmark
        ("eval: {contamination: report}", SCORING),  # `drop` reaches encode by a param of its rule
        ("eval: {lm_eval: {batch_size: 4}}", BENCHMARKS),
        ("eval: {lm_eval: {python: /opt/python, container: other.sif}}", set()),
        ("model: {chat_template_kwargs: {thinking: false}}", {"encode", "plan", *ASKING, *BENCHMARKS, *CARDS}),
        ("model: {chat_template: null}", {"encode"}),
        ("model: {revision: v2}", {"fetch_model", "inspect_model"}),
        ("serve: {max_model_len: 64}", {"smoke_test", "evaluate_export"}),
        ("serve: {mode: adapter}", {"smoke_test", "evaluate_export"}),
        ("serve: {host: 0.0.0.0, port: 9000, api_key_env: KEY}", set()),
        ("serve: {container: other.sif}", set()),
        ("exports: [gguf-q8_0, fp8]", set()),
        ("export: {llama_cpp: /opt/llama.cpp}", {"export_gguf", "evaluate_export"}),
        ("export: {imatrix: true}", {"export_gguf"}),
        ("export: {calibration_rows: 8}", {"export_compressed"}),
        ("export: {imatrix: true, calibration_rows: 8}", {"export_gguf", "export_compressed"}),
        ("export: {kl_limit: 0.3}", {"evaluate_export"}),
        ("export: {python: /opt/python, container: other.sif}", set()),
        ("network: {tls: off}", set()),
        ("container: other.sif", set()),
        ("paths: {results: elsewhere}", set()),
    ],
)
def test_an_edit_reaches_the_stages_that_read_it_and_no_other(edit, stages):
    before, after = read_by_stages(config(PROMPT)), read_by_stages(config(PROMPT, edit))
    assert {stage for stage in before if before[stage] != after[stage]} == stages


def test_the_order_of_keys_is_nothing():
    text = PROMPT + "train: {max_steps: 3, warmup_steps: 2}\nruns: {v: {dataset: a}, w: {dataset: b}}"

    def backwards(value):
        return {key: backwards(value[key]) for key in reversed(value)} if isinstance(value, dict) else value

    forth = merged(yaml.safe_load(BASE), yaml.safe_load(text))
    back = backwards(forth)
    assert json.dumps(forth) != json.dumps(back)
    for run in ("a", "b"):
        assert read_by_stages(resolve(forth, SCHEMA), run) == read_by_stages(resolve(back, SCHEMA), run)


def test_hub_rows_are_read_where_fetch_dataset_puts_them():
    resolved = config(
        "datasets: {h: {source: [org/data, local.jsonl], subset: main, revision: v1}}\npaths: {results: r}"
    )
    hub, local = [entry["path"] for entry in stage_settings(resolved, "prepare", "h")["sources"]]
    assert hub.startswith("r/datasets/org--data--main--train@v1")
    assert hub.endswith(".parquet")
    assert local == "local.jsonl"


def test_a_part_of_a_mix_may_have_columns_of_its_own():
    resolved = config("""
datasets:
  m: {source: [x.jsonl, {path: y.jsonl, columns: {}}, {path: z.jsonl, columns: {text: t}}], columns: {prompt: q}}
""")
    sources = stage_settings(resolved, "prepare", "m")["sources"]
    assert [source["columns"] for source in sources] == [{"prompt": "q"}, {}, {"text": "t"}]


# --- what runs share --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "encoded", "measured"),
    [
        ("{dataset: a, lora: {r: 8}, train: {learning_rate: 1}, seed: 9}", "a", "a"),
        ("{dataset: a, eval: {confidence: 0.9, row_expect: {exact: true}}}", "a", "a"),
        ("{dataset: a, eval: {prompts: [{id: p, prompt: q, expect: {contains: y}}]}}", "a", "a"),
        ("{dataset: a, eval: {prompts: [{id: p, prompt: other}]}}", "a", "v"),
        ("{dataset: a, eval: {answer_rows: 1}}", "a", "v"),
        ("{dataset: a, eval: {forgetting: false}}", "a", "v"),
        ("{dataset: a, eval: {forgetting_limit: 0.2}}", "a", "a"),
        ("{dataset: a, model: {dtype: float32}}", "a", "v"),
        ("{dataset: a, model: {quantization: nf4}}", "a", "a"),
        ("{dataset: a, train: {gpu: 2, shard: true}}", "a", "a"),
        ("{dataset: a, model: {chat_template: null}}", "v", "v"),
        ("{dataset: a, model: {revision: v2}}", "v", "v"),
        ("{dataset: a, model: {name: org/other}}", "v", "v"),
        ("{dataset: b}", "b", "b"),
    ],
)
def test_runs_share_tokens_and_the_measurement_of_the_base(variant, encoded, measured):
    resolved = config(f"{PROMPT}runs: {{v: {variant}}}")
    tokens, base = encoded_as(resolved), measured_as(resolved)
    assert (tokens["v"], base["v"]) == (encoded, measured)
    assert (tokens["a"], base["a"]) == ("a", "a")


def test_a_new_run_changes_no_old_one(tmp_path):
    other = "{dataset: a, model: {name: org/other}}"
    old = config(f"{PROMPT}paths: {{results: {tmp_path}}}\nruns: {{m: {other}}}")
    assert encoded_as(old)["m"] == "m"
    new = config(f"{PROMPT}paths: {{results: {tmp_path}}}\nruns: {{m: {other}, k: {other}}}")
    assert encoded_as(new) | {"a": "a"} == {"a": "a", "b": "b", "k": "k", "m": "k"}
    (tmp_path / "m/tokens").mkdir(parents=True)
    (tmp_path / "m/tokens/report.json").touch()
    assert encoded_as(new)["k"] == encoded_as(new)["m"] == "m"
