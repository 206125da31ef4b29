"""The real lm-eval asks the demo's models: tasks with local data, offline, and a task whose data are on a hub.

    make benchmark-env
    python -m pytest tests/integration/test_lm_eval.py

LM_EVAL_PYTHON names another Python that has lm-eval. Without either nothing is tested.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from fake_hub import FakeHub
from workflow import ROOT, planned, snakemake

from moult.files import read_json, read_jsonl

PYTHON = os.environ.get("LM_EVAL_PYTHON") or str(ROOT / ".venv-benchmark" / "bin" / "python")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not shutil.which(PYTHON), reason="no Python with lm-eval: `make benchmark-env`, or set LM_EVAL_PYTHON to one"
    ),
]

METRICS = "results/demo/metrics.json"
QUESTIONS = {"Japan": "Tokyo", "Egypt": "Cairo", "Norway": "Oslo", "Peru": "Lima", "Spain": "Madrid", "Italy": "Rome"}
WRITTEN = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: capitals.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [], max_gen_toks: 48, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOSEN = """
task: choices
dataset_path: %s
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["Tokyo", "Cairo", "Oslo", "Lima", "Madrid", "Rome"]
doc_to_target: "{{label}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: mcc, aggregation: matthews_corrcoef, higher_is_better: true}
"""


@pytest.fixture
def folder(again):
    """The demo, with two tasks that ask for capitals."""
    rows = [
        {"question": f"What is the capital of {country}?", "answer": json.dumps({"answer": city}), "label": label}
        for label, (country, city) in enumerate(QUESTIONS.items())
    ]
    (again / "capitals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (again / "written.yaml").write_text(WRITTEN)
    local = "json\ndataset_kwargs: {data_files: {test: capitals.jsonl}}"
    (again / "chosen.yaml").write_text(CHOSEN % local)
    return again


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """Whoever asks the hub is refused."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


def configure(folder: Path, benchmarks: list[dict], **runs) -> tuple[str, str]:
    evaluation = {"benchmarks": benchmarks, "lm_eval": {"python": PYTHON}}
    (folder / "b.yaml").write_text(yaml.safe_dump({"runs": {"demo": {"eval": evaluation}, **runs}}))
    return "--configfile", "b.yaml"


def stage(folder: Path, script: str, settings: dict, **options) -> subprocess.CompletedProcess:
    command = [PYTHON, f"scripts/{script}.py", "--settings", json.dumps(settings)]
    command += [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def test_the_whole_dag_offline(folder):
    written, chosen = {"path": "written.yaml", "limit": 5}, {"path": "chosen.yaml"}
    arguments = configure(folder, [written])
    rules = {"fetch_benchmark", "contamination", "benchmark_base", "benchmark_tuned", "score"}
    assert planned(folder, METRICS, *arguments) == rules
    snakemake(folder, METRICS, *arguments)
    metrics = read_json(folder / METRICS)
    found = metrics["benchmarks"]["written"]
    match = found["metrics"]["exact_match,none"]
    assert (found["questions"], found["cut"], match["base"]["value"], match["tuned"]["value"]) == (5, 0, 0.0, 1.0)
    assert any(reason.startswith("benchmark written ") for reason in metrics["verdict"]["reasons"])
    assert metrics["contamination"]["benchmarks"] == {"written": 0}
    answers = [
        row["answer"] for path in folder.glob("results/demo/benchmark_tuned/*.jsonl") for row in read_jsonl(path)
    ]
    assert answers[0] == '{"answer": "Tokyo"}'

    # One more asks nothing again, and another run of the same model shares the base.
    twin = {"dataset": "demo", "model": {"name": "config/demo/base"}, "eval": {"benchmarks": [written]}}
    arguments = configure(folder, [written, chosen], twin=twin)
    assert planned(folder, METRICS, *arguments) == rules
    output = snakemake(folder, "-n", "results/twin/metrics.json", *arguments)
    assert "benchmark_tuned" in output
    assert "benchmark_base" not in output
    snakemake(folder, METRICS, *arguments)
    assert list(read_json(folder / METRICS)["benchmarks"]["chosen"]["metrics"]) == ["acc,none"]
    assert planned(folder, METRICS, *arguments) == set()

    # Changed questions are asked again.
    with (folder / "capitals.jsonl").open("a") as file:
        file.write('{"question": "What is the capital of Chad?", "answer": "", "label": 0}\n')
    assert planned(folder, METRICS, *arguments) == rules


SETTINGS = {
    "dtype": "bfloat16",
    "attn_implementation": None,
    "chat_template_kwargs": {},
    "trust_remote_code": False,
    "batch_size": 4,
}


def ask(folder: Path, path: str, model: str, limit: int | None = 3) -> list[dict]:
    if not (folder / "data").exists():
        done = stage(folder, "fetch_benchmark", {"path": path}, data="data", items="items.jsonl", metadata="items.json")
        assert done.returncode == 0, done.stderr
    options = {"data": "data", "samples": "out.jsonl", "summary": "out.json", "base": "config/demo/base"}
    options |= {"template": "results/demo/tokens/chat_template.jinja", "model": model}
    asked = json.dumps({"path": path, "limit": limit, "num_fewshot": None})
    done = stage(folder, "run_benchmark", SETTINGS, benchmark=asked, **options)
    assert done.returncode == 0, done.stderr
    return list(read_jsonl(folder / "out.jsonl"))


def test_the_template_is_the_runs_whatever_the_folder_has(folder):
    before = ask(folder, "written.yaml", "results/demo/merged")
    path = folder / "results/demo/merged/chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_start|>assistant", "<|im_start|>assistent"))
    assert ask(folder, "written.yaml", "results/demo/merged") == before


def test_data_of_the_hub_are_fetched_once_and_asked_offline(folder):
    (folder / "chosen.yaml").write_text(CHOSEN % "org/capitals")
    with FakeHub() as hub:
        commit = hub.add("dataset", "org/capitals", {"test.jsonl": (folder / "capitals.jsonl").read_bytes()})
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_ENDPOINT", hub.url)
            options = {"data": "data", "items": "items.jsonl", "metadata": "items.json"}
            done = stage(folder, "fetch_benchmark", {"path": "chosen.yaml"}, **options)
        assert done.returncode == 0, done.stderr
    told = read_json(folder / "items.json")
    assert told["commits"] == {"org/capitals": [commit]}
    assert (told["metrics"], told["not_compared"]) == (["acc,none"], ["mcc,none"])
    assert next(row["question"] for row in read_jsonl(folder / "items.jsonl")) == "What is the capital of Japan?"
    rows = ask(folder, "chosen.yaml", "config/demo/base", None)
    assert len(rows) == len(QUESTIONS)
    assert all(len(row["answer"]) == len(QUESTIONS) for row in rows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "gsm8q"}, "knows no task gsm8q; did you mean gsm8k"),
        ({"task": "humaneval"}, "humaneval runs code that the model has written"),
        ({"path": "broken.yaml"}, "lm-eval cannot load broken.yaml: UndefinedError: 'missing' is undefined"),
        ({"path": "remote.yaml"}, "no connection to 127.0.0.1:9"),
    ],
)
def test_what_cannot_be_asked_is_told(folder, settings, message):
    (folder / "broken.yaml").write_text(WRITTEN.replace("{{question}}", "{{missing}}"))
    (folder / "remote.yaml").write_text(CHOSEN % "org/nowhere")
    done = stage(folder, "fetch_benchmark", settings, data="data", items="items.jsonl", metadata="items.json")
    assert done.returncode == 1
    assert message in " ".join(done.stderr.split())
    assert not (folder / "data").exists()


def test_a_prompt_that_is_too_long_is_counted_and_an_answer_refused(folder):
    rows = [
        {"question": f"{'Hello there. ' * 2000}What is the capital of {name}?", "answer": "", "label": 0}
        for name in QUESTIONS
    ]
    (folder / "capitals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ask(folder, "chosen.yaml", "config/demo/base")
    assert read_json(folder / "out.json")["cut"] == 3
    shutil.rmtree(folder / "data")
    (folder / "written.yaml").write_text(WRITTEN.replace("48", "1000000"))
    with pytest.raises(AssertionError, match="answers of up to 1,000,000 tokens, and the model reads at most"):
        ask(folder, "written.yaml", "config/demo/base")
