"""The benchmarks of lm-eval, as far as Moult's own Python sees them: their config, their samples, and what score makes of them.

tests/integration/test_lm_eval.py runs the real one.
"""

import random
import sys

import pytest
import yaml
from configs import config
from workflow import checkout, snakemake

from moult.errors import MoultError
from moult.files import write_json, write_jsonl
from moult.measuring.benchmarks import Answered, compare_benchmark, read_answers
from moult.measuring.intervals import PairedDifference
from moult.measuring.samples import question_in, rows_of
from moult.workflow.benchmarks import benchmarks_of, files_of
from moult.workflow.config import ConfigError
from moult.workflow.environments import LM_EVAL, check_python
from moult.workflow.stages import benchmarked_as

TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
"""
OPTIONS = {"confidence": 0.95, "resamples": 500, "seed": 0}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a task of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "questions.jsonl").write_text('{"question": "?"}\n')
    (tmp_path / "task.yaml").write_text(TASK)
    return tmp_path


# --- the config -------------------------------------------------------------------------------------------------------


def test_what_an_entry_names(folder):
    resolved = config("eval: {benchmarks: [{task: gsm8k, limit: 200}, {path: ./task.yaml, num_fewshot: 2}]}")
    hub, own = benchmarks_of(resolved["runs"]["a"])
    assert (hub.name, hub.slug, hub.asked()) == ("gsm8k", "gsm8k", {"task": "gsm8k", "limit": 200, "num_fewshot": None})
    assert (own.name, own.where()) == ("task", {"path": "./task.yaml"})
    assert own.slug.startswith("task-")
    assert own.slug != benchmarks_of({"eval": {"benchmarks": [{"path": "other/task.yaml"}]}})[0].slug
    assert files_of("task.yaml") == ["task.yaml", "questions.jsonl"]


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ("[{limit: 2}]", "give each entry either task (a name that lm-eval knows) or path (a task's YAML file)"),
        (
            "[{task: x, path: task.yaml}]",
            "give each entry either task (a name that lm-eval knows) or path (a task's YAML file)",
        ),
        ("[{task: x}, {task: x}]", "x is there twice"),
        (
            "[{path: none.yaml}]",
            "none.yaml does not exist; give the path of a task's YAML file, or a task that lm-eval knows",
        ),
    ],
)
def test_entries_that_name_nothing(folder, entries, problem):
    with pytest.raises(ConfigError) as error:
        config(f"eval: {{benchmarks: {entries}}}")
    assert error.value.problems == [f"eval.benchmarks: {problem}"]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[", "task.yaml: not YAML (while parsing a flow node"),
        ("task: [a, b]", "task.yaml: not a task of lm-eval: it has no name (task: my_task)"),
        ("task: t\ndataset_path: json", "task.yaml: dataset_path is json, and there are no data files"),
        ("task: t\n", "task.yaml: no dataset_path"),
        (
            TASK + "process_docs: !function utils.run\n",
            "task.yaml:6: runs Python of its own (!function), and Moult runs none",
        ),
        (TASK + "include: other.yaml\n", "task.yaml: include leads to another file"),
        (TASK + "class: !!str x\n", "task.yaml: class leads to another file"),
        (TASK + "unsafe_code: true\n", "task.yaml: unsafe_code runs what a model writes"),
        (TASK.replace("questions", "absent"), "task.yaml: absent.jsonl does not exist"),
    ],
)
def test_a_task_that_cannot_be_run(folder, text, what):
    (folder / "task.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        config("eval: {benchmarks: [{path: task.yaml}]}")
    assert error.value.problems[0].startswith(f"eval.benchmarks: {what}")


def test_a_changed_task_is_read_again(folder):
    assert len(files_of("task.yaml")) == 2
    (folder / "task.yaml").write_text("task: t\ndataset_path: org/data\n")
    assert files_of("task.yaml") == ["task.yaml"]


def test_runs_share_the_base_whatever_their_data():
    shared = "{task: x, limit: 9}"
    resolved = config(
        f"eval: {{benchmarks: [{shared}]}}",
        "runs: {v: {dataset: b, lora: {r: 4}}, other: {dataset: a, eval: {benchmarks: [{task: x}, {task: y}]}}, "
        "half: {dataset: a, model: {dtype: float16}}, plain: {dataset: a, model: {chat_template: null}}}",
    )
    assert benchmarked_as(resolved) == {
        "x": {"a": "a", "b": "a", "v": "a", "other": "other", "half": "half", "plain": "plain"},
        "y": {"other": "other"},
    }


def test_a_python_without_lm_eval_is_told(tmp_path):
    with pytest.raises(MoultError, match="does not have lm_eval"):
        check_python(sys.executable, *LM_EVAL)
    with pytest.raises(MoultError, match="No such file"):
        check_python(str(tmp_path / "python"), *LM_EVAL)


# --- samples ----------------------------------------------------------------------------------------------------------


def sample(doc_id: int, part: str, **values) -> dict:
    """What lm-eval 0.4.13 logs of a question and a filter."""
    return {
        "doc_id": doc_id,
        "doc": {"question": "?"},
        "target": 42,
        "arguments": [("prompt", {"until": []})],
        "resps": [["so 42"]],
        "filtered_resps": ["42"],
        "filter": part,
        "metrics": list(values),
        "doc_hash": f"d{doc_id}",
        "prompt_hash": f"p{doc_id}",
        "target_hash": "t",
        **values,
    }


def test_a_row_for_each_question():
    import numpy as np

    logged = [sample(n, part, exact_match=np.float64(n), f1=(1, 0)) for part in ("strict", "loose") for n in (1, 0)]
    rows = rows_of({"b": logged, "a": [sample(0, "none", acc=True, odd=float("nan"))]})
    assert [(row["task"], row["doc_id"]) for row in rows] == [("a", 0), ("b", 0), ("b", 1)]
    assert rows[0]["values"] == {"acc,none": 1.0}
    assert rows[2] == {
        "task": "b",
        "doc_id": 1,
        "doc_hash": "d1",
        "prompt_hash": "p1",
        "target": "42",
        "answer": "so 42",
        "values": {"exact_match,strict": 1.0, "exact_match,loose": 1.0},
    }


def test_the_answer_to_a_choice_is_its_likelihoods():
    chosen = sample(0, "none", acc=1.0) | {"resps": [[(-1.23456, False)], [(-2.5, True)]]}
    assert rows_of({"t": [chosen]})[0]["answer"] == [-1.2346, -2.5]


def test_the_question_without_what_the_task_writes_around_it():
    long = "How many eggs are left for sale each day, if three are eaten for breakfast?"
    assert question_in({"question": f"{long} ", "answer": "9"}, f"Question: {long}\nAnswer:") == long
    # A choice is no question, and neither is a number.
    assert question_in({"a": "No", "question": long}, "Is it so?\nNo\nYes") == "Is it so?\nNo\nYes"
    assert question_in({"sentence": long, "option1": "eggs"}, 1) == long


# --- base against tuned -----------------------------------------------------------------------------------------------


def answered(values: list[dict], metrics=("acc,none",), better: bool = True) -> Answered:
    rows = [
        {"task": "t", "doc_id": n, "doc_hash": "d", "prompt_hash": "p", "values": one} for n, one in enumerate(values)
    ]
    summary = {
        "metrics": [{"name": metric, "higher_is_better": better} for metric in metrics],
        "limit": None,
        "tasks": {"t": {"num_fewshot": 0, "version": "1"}},
        "cut": 0,
        "versions": {"lm_eval": "0.4.13"},
    }
    return Answered(rows, summary)


def of(metric: str, numbers) -> list[dict]:
    return [{metric: number} for number in numbers]


def test_rates_are_compared_as_all_others_are():
    base, tuned = [0.0] * 30 + [1.0] * 20, [1.0] * 10 + [0.0] * 20 + [1.0] * 20
    found = compare_benchmark("b", answered(of("acc,none", base)), answered(of("acc,none", tuned)), None, OPTIONS)
    acc = found["metrics"]["acc,none"]
    assert (found["metric"], found["questions"], acc["n"]) == ("acc,none", 50, 50)
    assert (acc["base"]["value"], acc["tuned"]["value"]) == (0.4, 0.6)
    paired = PairedDifference([b > 0 for b in base], [t > 0 for t in tuned], list(map(str, range(50))))
    assert acc["difference"]["interval"] == paired.interval(0.95)
    assert 0.1 < acc["smallest_effect"] < 0.3


def test_the_interval_of_any_other_metric_is_that_of_the_paired_differences():
    generator = random.Random(0)
    base = [generator.gauss(10, 5) for _ in range(200)]
    tuned = [value + generator.gauss(0.5, 0.5) for value in base]
    found = compare_benchmark(
        "b", answered(of("bleu,x", base), ["bleu,x"]), answered(of("bleu,x", tuned), ["bleu,x"]), None, OPTIONS
    )
    bleu = found["metrics"]["bleu,x"]
    low, high = bleu["difference"]["interval"]
    assert 0.4 < low < bleu["difference"]["value"] < high < 0.6  # unpaired, 200 questions give +/- 1
    assert bleu["base"]["interval"][1] - bleu["base"]["interval"][0] > 1
    assert bleu["smallest_effect"] == pytest.approx(0.1, abs=0.03)


def test_the_metric_that_counts_can_be_chosen():
    both = answered([{"acc,none": 1.0, "acc_norm,none": 0.0}] * 4, ("acc,none", "acc_norm,none"))
    assert compare_benchmark("b", both, both, "acc_norm,none", OPTIONS)["metric"] == "acc_norm,none"
    with pytest.raises(
        MoultError, match="b has no metric f1 with a mean over the questions; it has: acc,none, acc_norm,none"
    ):
        compare_benchmark("b", both, both, "f1", OPTIONS)


def test_other_questions_are_refused():
    base, tuned = answered(of("acc,none", [1.0, 0.0])), answered(of("acc,none", [1.0, 0.0]))
    tuned.rows[1]["prompt_hash"] = "another"
    with pytest.raises(MoultError, match=r"answered different questions of b \(t 1\)"):
        compare_benchmark("b", base, tuned, None, OPTIONS)
    with pytest.raises(MoultError, match="their numbers differ"):
        compare_benchmark("b", Answered(base.rows[:1], base.summary), base, None, OPTIONS)


def test_what_the_stages_write_is_read(tmp_path):
    made = answered(of("acc,none", [1.0]))
    write_jsonl(tmp_path / "x.jsonl", made.rows)
    write_json(tmp_path / "x.json", made.summary)
    assert read_answers(tmp_path / "x.jsonl") == made


def test_without_lm_eval_nothing_starts(tmp_path):
    folder = checkout(tmp_path / "moult")
    evaluation = {"benchmarks": [{"task": "gsm8k"}], "lm_eval": {"python": "/nowhere/python"}}
    (folder / "b.yaml").write_text(yaml.safe_dump({"runs": {"demo": {"eval": evaluation}}}))
    output = snakemake(folder, "results/demo/metrics.json", "--configfile", "b.yaml", code=1)
    assert "eval.lm_eval.python: /nowhere/python: No such file or directory\n  -> make its environment" in output
    assert not (folder / "results").exists()
