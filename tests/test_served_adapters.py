"""Several adapters on one server: a server that answers one run with another's adapter is found out."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
from serving import FAKE_ENGINE, make_run, result_of
from workflow import ROOT

from moult.files import write_json, write_jsonl
from moult.serving.adapters import answer_alike, interleaved
from moult.serving.client import Question
from moult.serving.launch import free_port
from moult.workflow.runtime import read_config
from moult.workflow.stages import places_of

CONFIG = {
    "model": {"name": str(ROOT / "config/demo/base")},
    "datasets": {"cups": {"source": "cups.jsonl"}},
    "runs": {name: {"dataset": "cups"} for name in ("a", "b", "twin")},
    "eval": {"prompts": [{"id": text, "prompt": text} for text in ("one", "two")], "max_new_tokens": 8},
    "serve": {"mode": "adapter"},
    "paths": {"results": "results"},
}
# What each answers is its own; but for twin, which answers as a does.
FIRST_TOKEN = {"a": 4, "b": 40, "twin": 4}


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Three runs of one base as evaluate leaves them, in a working directory of their own."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "config", "config", ignore=shutil.ignore_patterns("demo", "recipes"))
    write_json("mine.yaml", CONFIG)  # JSON is YAML
    config = read_config(["mine.yaml"])
    for name, first in FIRST_TOKEN.items():
        places = places_of(config, name)
        make_run(Path(places.adapter).parent, name)
        word = "a" if name == "twin" else name
        answers = [
            {
                "kind": "prompt",
                "id": text,
                "prompt": text,
                "answer": f"{word} says {text}",
                "token_ids": [first, number, 2],
                "margins": [5.0, 5.0, 5.0],
                "stopped": True,
                "prompt_ids": [1, 7, number, 3],
                "prompt_nll": 9.5,
            }
            for number, text in enumerate(("one", "two"))
        ]
        write_jsonl(places.tuned_answers, answers)
        write_json(places.merge_check, {"dtype": "float32"})
        write_jsonl(places.test_rows, [])
    return tmp_path


@contextmanager
def served(names: list[str], fake: str):
    """The address of a fake server that has the adapters of these runs."""
    files = {name: f"results/{name}/tuned/answers.jsonl" for name in names}
    environment = {**os.environ, "FAKE": fake, "FAKE_ADAPTERS": json.dumps(files)}
    command = [sys.executable, FAKE_ENGINE, "--served-model-name", "base", "--port", str(port := free_port())]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        for _ in range(100):
            try:
                requests.get(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except requests.ConnectionError:
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def smoke_test(names: list[str], fake: str = "") -> tuple[int, dict, str]:
    """Exit code, the checks of the result, and what was said."""
    with served(names, fake) as url:
        command = [sys.executable, ROOT / "scripts/smoke_test.py", "--run", *names, "--base-url", url]
        command += ["--configfile", "mine.yaml"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, result_of(Path("results", names[0]), done.returncode)["checks"], done.stderr


def test_a_server_that_keeps_adapters_apart_passes(runs):
    code, checks, said = smoke_test(["a", "b"])
    assert code == 0 and all(check["passed"] is not False for check in checks.values()), said
    assert checks["adapters"] == {"passed": True, "why": "a, b: 8 answers, 8 at once, are each adapter's own"}
    assert not Path("results/b/smoke_test.json").exists()


def test_one_run_is_not_asked_about_adapters(runs):
    code, checks, said = smoke_test(["a"])
    assert code == 0 and "adapters" not in checks, said


@pytest.mark.parametrize(
    ("fake", "words"),
    [
        ("mixes adapters up", "served 'b says one', which is the answer of b; measured 'a says one'"),
        ("mixes requests up", "served 'b says two', which is the answer of b to two; measured 'a says one'"),
    ],
)
def test_a_server_that_mixes_adapters_up_is_found_out(runs, fake, words):
    """It does so only when both are asked at the same moment, so no other check sees it."""
    code, checks, said = smoke_test(["a", "b"], fake)
    failed = {name for name, check in checks.items() if check["passed"] is False}
    assert code == 1 and failed == {"adapters"}, said
    assert "answers are not the adapter's own, first that of a to one: " in said and words in said


def test_an_adapter_that_answers_as_nobody_is_told(runs):
    """As the base would, where vLLM has not found the adapter's layers."""
    with served(["a", "b"], "answers otherwise from 0") as url:
        command = [sys.executable, ROOT / "scripts/smoke_test.py", "--run", "a", "b", "--base-url", url]
        done = subprocess.run([*command, "--configfile", "mine.yaml"], capture_output=True, text=True, check=False)
    assert "8 of 8 answers are not the adapter's own" in done.stderr
    assert "which none of these runs has given" in done.stderr


def test_runs_that_answer_alike_cannot_be_told_apart(runs):
    code, checks, _ = smoke_test(["a", "twin"], "mixes adapters up")
    assert code == 0 and checks["adapters"]["passed"] is None
    assert checks["adapters"]["why"].startswith("a and twin have answered alike to all that they were asked")


def test_several_runs_need_a_server(runs):
    command = [sys.executable, ROOT / "scripts/smoke_test.py", "--run", "a", "b", "--configfile", "mine.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "several runs need --base-url, a server that has the adapters of all" in done.stderr


def question(text: str, prompt: int, answer: int) -> Question:
    return Question("prompt", text, [prompt], 1.0, "", [answer], [1.0], True)


def test_the_questions_take_turns():
    asked = interleaved({"a": [question("1", 1, 1), question("2", 2, 2)], "b": [question("3", 3, 3)]})
    assert [(run, one.id) for run, one in asked] == [("a", "1"), ("b", "3"), ("a", "2"), ("b", "3")]


def test_one_other_question_is_enough_to_tell_two_runs_apart():
    ours = [question("1", 1, 1), question("2", 2, 2)]
    assert answer_alike(ours, list(ours))
    assert not answer_alike(ours, ours[:1]) and not answer_alike(ours, [ours[0], question("2", 2, 3)])
