"""The checks of a server against llama.cpp's and Ollama's, which tell other things than vLLM, and some not at all."""

import os
import subprocess
import time
from pathlib import Path

import pytest
import requests
from serving import CHECKS, FAKE_ENGINE, Log, measured_run, settings_for, smoke_test

from moult.errors import MoultError
from moult.serving.checks import ServerTest, tolerance_of_export
from moult.serving.client import Client
from moult.serving.launch import (
    Served,
    export_to_serve,
    free_port,
    llama_cpp_command,
    own_command,
    settings_of_export,
)
from moult.serving.questions import read_questions


@pytest.fixture
def measured(tmp_path):
    return measured_run(tmp_path)


# --- llama.cpp's ---


def test_llama_cpps_server_passes_with_what_it_cannot_tell(measured):
    code, checks, said = smoke_test(measured, kind="llama.cpp")
    assert (code, checks) == (0, dict.fromkeys(CHECKS, True) | {"likelihood": None, "wrong_model": None}), said
    assert "3 the same" in said and "by their number only" not in said
    assert "serves it under any name" in said and "does not tell how likely a prompt is" in said


@pytest.mark.parametrize(
    ("fake", "failed", "words"),
    [
        (
            "other template",
            {"prompt_tokens"},
            "the server makes 4 tokens of it, evaluate made 4; they differ from token 2",
        ),
        ("double BOS", {"prompt_tokens"}, "the server counts 5 tokens, evaluate 4"),
        ("does not stop", {"stop_reasons"}, "one ends with 'length', and at evaluate with 'stop'"),
        ("answers otherwise from 2", {"answers", "expectations", "concurrency"}, "first one from token 2 on"),
        ("chokes", {"too_long"}, "answered 500, and should be refused"),
        ("open", {"api_key"}, "answered 200, and should be refused"),
    ],
)
def test_what_it_does_wrong_is_told(measured, fake, failed, words):
    code, checks, said = smoke_test(measured, fake, kind="llama.cpp")
    assert code == 1 and words in said
    assert {name for name, passed in checks.items() if passed is False} == failed


def test_its_own_path_tells_where_an_answer_parts(measured):
    """Its chats tell text only. The measured best token led by 0.2 nats there. That all of them part tells nothing."""
    code, checks, said = smoke_test(measured, "answers otherwise from 1", kind="llama.cpp")
    assert code == 0 and checks["answers"] is None and "none of 3 the same: each parts at a near tie" in said


# --- Ollama's, which has neither /health nor /tokenize ---


@pytest.fixture
def ollama(measured):
    """A server that runs already: its address, and its process, which is told how to fail by `start`."""
    processes = []

    def start(fake: str = "", kind: str = "ollama") -> str:
        port = free_port()
        own = {"FAKE": fake, "FAKE_KIND": kind, "FAKE_ANSWERS": str(measured / "answers.jsonl")}
        environment = {name: value for name, value in os.environ.items() if name != "VLLM_API_KEY"} | own
        command = [str(FAKE_ENGINE), "--served-model-name", "run", "--port", str(port)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                requests.get(f"http://127.0.0.1:{port}/v1/models", timeout=9)
                break
            except requests.ConnectionError:
                time.sleep(0.05)
        return f"http://127.0.0.1:{port}"

    yield start
    for process in processes:
        process.kill()
        process.wait()


def checked(folder: Path, url: str, lead: float = 0.5, drift: float = 0.02) -> ServerTest:
    prompts = [{"id": text, "prompt": text, "expect": {"contains": f"answer {text}"}} for text in ("one", "two")]
    questions = read_questions(str(folder / "answers.jsonl"), str(folder / "test.jsonl"), prompts, True, None)
    test = ServerTest(Client(url, None, "run"), questions, lead, drift)
    test.run(test.client.wait, Log())
    return test


def results(test: ServerTest) -> dict:
    return {name: check.passed for name, check in test.checks.items()}


def test_ollama_passes_with_what_it_cannot_tell(measured, ollama):
    test = checked(measured, ollama())
    asked = [name for name in CHECKS if name != "files"]
    assert results(test) == dict.fromkeys(asked, True) | dict.fromkeys(("likelihood", "too_long", "api_key"))
    assert "3 by their number only" in test.checks["prompt_tokens"].why


def test_what_ollama_does_wrong_is_told(measured, ollama):
    test = checked(measured, ollama("double BOS"))
    assert test.checks["prompt_tokens"].passed is False
    test = checked(measured, ollama("answers otherwise from 2"))
    assert test.checks["answers"].passed is False and "in the text" in test.checks["answers"].why


# --- an export that loses much ---


@pytest.mark.parametrize("kind", ["", "llama.cpp", "ollama"])
def test_other_answers_do_not_fail_an_export_that_loses_much(measured, ollama, kind):
    lossy, exact = tolerance_of_export("gguf-q4_k_m"), tolerance_of_export("gguf-q8_0")
    url = ollama("answers otherwise from 2", kind)
    assert checked(measured, url, *exact).checks["answers"].passed is False
    test = checked(measured, url, *lossy)
    assert False not in results(test).values()
    assert "3 are others, as they may be" in test.checks["answers"].why
    assert test.checks["stop_reasons"].passed is None


def test_an_export_that_loses_much_may_not_read_or_stop_otherwise(measured, ollama):
    lossy = tolerance_of_export("gguf-q4_k_m")
    for fake, check in (("other template", "prompt_tokens"), ("does not stop", "stop_reasons")):
        assert checked(measured, ollama(fake, "llama.cpp"), *lossy).checks[check].passed is False


# --- how it is started ---


def test_a_gguf_is_served_by_llama_cpp_and_the_others_by_the_runs_engine(tmp_path):
    for name in ("demo-Q8_0.gguf", "demo-adapter.gguf", "base-BF16.gguf", "config.json"):
        (tmp_path / name).touch()
    folder = str(tmp_path)
    assert export_to_serve(folder, "gguf-q8_0", "demo", "api") == Served("api", f"{folder}/demo-Q8_0.gguf")
    adapted = Served("api", f"{folder}/base-BF16.gguf", {"api": f"{folder}/demo-adapter.gguf"})
    assert export_to_serve(folder, "adapter-gguf", "demo", "api") == adapted
    assert export_to_serve(folder, "fp8", "demo", "api") == Served("api", folder)
    with pytest.raises(MoultError) as raised:
        export_to_serve(folder, "gguf-q4_k_m", "demo", "api")
    assert "results/demo/exports/gguf-q4_k_m/export.json" in raised.value.fix
    engines = [settings_of_export(settings_for(), format)["serve"]["engine"] for format in ("gguf-q8_0", "fp8")]
    assert engines == ["llama.cpp", "vllm"]


def test_an_own_llama_server_is_used_where_it_is_built(tmp_path):
    settings = settings_for({"max_model_len": 4096}, chat_template_kwargs={"enable_thinking": False})
    settings["export"] = {"llama_cpp": str(tmp_path), "python": "of/the/exports"}
    served = Served("demo", "base.gguf", {"demo": "adapter.gguf"})
    arguments = [
        *("--model", "base.gguf", "--alias", "demo", "--host", "127.0.0.1", "--port", "8080"),
        *("--ctx-size", "4096", "--parallel", "8", "--kv-unified", "--lora", "adapter.gguf"),
        *("--chat-template-kwargs", '{"enable_thinking": false}'),
    ]
    bundled = llama_cpp_command(settings, served, "127.0.0.1", 8080)
    assert bundled == own_command(settings, "llamacpp_server", arguments)
    assert bundled.arguments[:4] == ["of/the/exports", "-P", "-m", "moult.serving.llamacpp_server"]
    built = tmp_path / "build" / "bin" / "llama-server"
    built.parent.mkdir(parents=True)
    built.touch()
    assert llama_cpp_command(settings, served, "127.0.0.1", 8080).arguments == [str(built), *arguments]
