"""The small server on transformers: what it answers, and what it refuses."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import ThreadingHTTPServer

import pytest
import requests
from serving import Log, settings_for
from workflow import ROOT

from moult.serving import transformers_server
from moult.serving.launch import (
    Served,
    Server,
    address,
    free_port,
    transformers_command,
)

DEMO_BASE = ROOT / "config" / "demo" / "base"

QUESTION = {"messages": [{"role": "user", "content": "What is the capital of Japan?"}], "temperature": 0}


@pytest.fixture(scope="module")
def small_server():
    """The demo's base behind the server, with a key; (url, the statuses of /health until it was ready)."""
    url, seen = address("127.0.0.1", port := free_port()), []
    settings = settings_for({"max_model_len": 100})
    command = transformers_command(settings, Served("base", str(DEMO_BASE)), "127.0.0.1", port)
    with Server(command, url, Log(), key="the-key", threads=1) as server:
        while 200 not in seen and not server.ended():
            try:
                seen.append(requests.get(f"{url}/health", timeout=9).status_code)
            except requests.ConnectionError:
                time.sleep(0.05)
        yield url, seen
        began = time.monotonic()
        server.process.terminate()
        assert server.process.wait(timeout=9) == 0 and time.monotonic() - began < 3


def test_a_signal_that_another_thread_gets_ends_it():
    """As with a GPU, where SIGTERM did not end the main thread's wait."""
    script = """
import os, signal, threading, time
from moult.serving.engine import MainThread
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
print("ready", flush=True)
MainThread().work()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment) as process:
        try:
            assert process.stdout and process.stdout.readline() == b"ready\n"
            time.sleep(0.2)  # until it waits
            process.terminate()
            assert process.wait(timeout=9) == 0
        finally:
            process.kill()


def post(url: str, path: str, body, key: str | None = "the-key", **options):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return requests.post(url + path, data=data, headers=headers, timeout=60, **options)


@pytest.mark.slow
def test_it_listens_on_an_ipv6_address():
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as free:
            port = free.getsockname()[1]
    except OSError:
        pytest.skip("no IPv6 here")
    command = transformers_command(settings_for(), Served("base", str(DEMO_BASE)), "::1", port)
    with Server(command, address("::1", port), Log(), key="the-key", threads=1) as server:
        server.wait_ready(60)


def test_it_is_not_ready_before_the_model_is_there(small_server):
    assert small_server[1][0] == 503 and small_server[1][-1] == 200


def test_it_answers_like_openai(small_server):
    url, _ = small_server
    listed = requests.get(f"{url}/v1/models", headers={"Authorization": "Bearer the-key"}, timeout=9).json()
    assert [(entry["id"], entry["max_model_len"]) for entry in listed["data"]] == [("base", 100)]
    body = {"model": "base", **QUESTION}
    answer = post(url, "/v1/chat/completions", body).json()
    assert answer["choices"][0]["message"]["content"] == "The capital of Japan is Tokyo."
    assert answer["choices"][0]["finish_reason"] == "stop"
    tokens = post(url, "/tokenize", body).json()
    assert answer["usage"]["prompt_tokens"] == tokens["count"] == len(tokens["tokens"])
    short = post(url, "/v1/chat/completions", {**body, "max_tokens": 3}).json()
    assert short["choices"][0]["finish_reason"] == "length" and short["usage"]["completion_tokens"] == 3
    cut = post(url, "/v1/chat/completions", {**body, "stop": ["Japan", "never"]}).json()["choices"][0]
    assert cut["message"]["content"] == "The capital of " and cut["finish_reason"] == "stop"
    text = post(
        url, "/v1/completions", {"model": "base", "prompt": tokens["tokens"], "temperature": 0, "max_tokens": 40}
    )
    assert text.json()["choices"][0]["text"] == "The capital of Japan is Tokyo."


def test_a_seed_repeats_what_is_sampled(small_server):
    url, _ = small_server
    body = {**QUESTION, "temperature": 2.0, "max_tokens": 20}
    said = [
        post(url, "/v1/chat/completions", {**body, "seed": seed}).json()["choices"][0]["message"]["content"]
        for seed in (1, 1, 2)
    ]
    assert said[0] == said[1] != said[2]


def test_it_streams_to_the_end(small_server):
    url, _ = small_server
    body = {**QUESTION, "stop": ["Tokyo"], "stream": True, "stream_options": {"include_usage": True}}
    lines = [line for line in post(url, "/v1/chat/completions", body, stream=True).iter_lines() if line]
    events = [json.loads(line.removeprefix(b"data: ")) for line in lines[:-1]]
    assert lines[-1] == b"data: [DONE]" and events[-1]["usage"]["completion_tokens"] > 0
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1])
    assert text == "The capital of Japan is "  # nothing of the stop text was sent ahead
    assert events[-2]["choices"][0]["finish_reason"] == "stop"


def test_eight_at_once_and_one_that_leaves(small_server):
    url, _ = small_server
    gone = post(url, "/v1/chat/completions", {**QUESTION, "stream": True}, stream=True)
    next(gone.iter_lines())
    gone.close()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(url, "/v1/chat/completions", QUESTION).json(), range(8)))
    assert {answer["choices"][0]["message"]["content"] for answer in answers} == {"The capital of Japan is Tokyo."}


def test_a_client_that_reads_no_more_does_not_keep_the_model(monkeypatch):
    monkeypatch.setattr(transformers_server, "READ_TIMEOUT", 0.5)
    let_go = threading.Event()

    class Endless:
        name, names, created, max_model_len = "base", ["base"], 0, 100
        ready = threading.Event()
        ready.set()

        def prompt_ids(self, body, chat):
            return [1]

        def generate(self, ids, options, adapted, tell):
            try:
                while True:
                    tell("long " * 10_000)
            finally:
                let_go.set()

    handler = type("Handler", (transformers_server.Handler,), {"engine": Endless(), "key": ""})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            path = "/v1/chat/completions"
            url = address(*server.server_address)
            with post(url, path, {**QUESTION, "stream": True}, stream=True) as unread:
                assert unread.status_code == 200 and let_go.wait(20)
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/chat/completions", {"model": "nope", **QUESTION}, 404, "`nope` does not exist"),
        ("/v1/nothing", {}, 404, "no such path"),
        ("/v1/chat/completions", b"{nope", 400, "not JSON"),
        ("/v1/chat/completions", b"[1]", 400, "not a JSON object"),
        ("/v1/chat/completions", {}, 400, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": 7}]}, 400, "content must be text"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "long " * 200}]},
            400,
            "maximum context length",
        ),
        ("/v1/chat/completions", {**QUESTION, "max_tokens": 100}, 400, "maximum context length"),
        ("/v1/chat/completions", {**QUESTION, "max_tokens": 0}, 400, "at least 1"),
        ("/v1/chat/completions", {**QUESTION, "temperature": "hot"}, 400, "temperature"),
        ("/v1/chat/completions", {**QUESTION, "n": 2}, 400, "n: not supported"),
        ("/v1/chat/completions", {**QUESTION, "repetition_penalty": 1.1}, 400, "repetition_penalty: not supported"),
        ("/v1/chat/completions", {**QUESTION, "temperature": 1e-320}, 400, "temperature: expected 0, or"),
        ("/v1/chat/completions", {**QUESTION, "stream_options": 5}, 400, "stream_options: expected an object"),
        (
            "/v1/chat/completions",
            {**QUESTION, "stream": True, "stream_options": {"include_usage": "no"}},
            400,
            "stream_options.include_usage: expected true or false",
        ),
        ("/v1/chat/completions", {**QUESTION, "stream": "false"}, 400, "stream: expected true or false"),
        ("/v1/chat/completions", {**QUESTION, "add_generation_prompt": "no"}, 400, "add_generation_prompt: expected"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "\ud800"}]}, 400, "surrogate"),
        ("/tokenize", {"prompt": "\ud800"}, 400, "surrogate"),
        (
            "/v1/completions",
            {"prompt": "One", "echo": True, "stream": True, "max_tokens": 0},
            400,
            "echo: not supported with stream",
        ),
        ("/v1/completions", {"prompt": [10**9]}, 400, "token ids of this model"),
        ("/v1/completions", {"prompt": []}, 400, "empty"),
    ],
)
def test_a_bad_request_is_refused(small_server, path, body, status, words):
    response = post(small_server[0], path, body)
    assert response.status_code == status and words in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("/v1/chat/completions", "ignore_eos", True),
        ("/v1/chat/completions", "min_tokens", 5),
        ("/v1/chat/completions", "stop_token_ids", [7]),
        ("/v1/chat/completions", "guided_json", {}),
        ("/v1/chat/completions", "logprobs", True),
        ("/v1/chat/completions", "top_logprobs", 2),
        ("/v1/chat/completions", "continue_final_message", True),
        ("/v1/chat/completions", "echo", True),
        ("/v1/chat/completions", "documents", [{}]),
        ("/v1/chat/completions", "chat_template", "mine"),
        ("/v1/chat/completions", "anything_else", False),
        ("/v1/completions", "suffix", "the end"),
        ("/v1/completions", "logprobs", 0),
        ("/v1/completions", "messages", []),
        ("/tokenize", "tools", [{}]),
    ],
)
def test_a_field_that_is_not_known_is_refused(small_server, path, field, value):
    body = {"prompt": "One"} if path == "/v1/completions" else QUESTION
    response = post(small_server[0], path, {**body, "max_tokens": 1, field: value})
    assert response.status_code == 400 and response.json()["error"]["message"].startswith(f"{field}: ")


def test_a_path_may_have_a_query(small_server):
    assert post(small_server[0], "/tokenize?x=1", QUESTION).status_code == 200
    assert post(small_server[0], "/v1/chat/completions?x=1", {**QUESTION, "max_tokens": 1}).json()["object"] == (
        "chat.completion"
    )
    assert requests.get(f"{small_server[0]}/health?x=1", timeout=9).status_code == 200


@pytest.mark.parametrize("temperature", [1e-10, 1, 2])
def test_every_temperature_is_taken(small_server, temperature):
    body = {**QUESTION, "temperature": temperature, "max_tokens": 2}
    assert post(small_server[0], "/v1/chat/completions", body).status_code == 200


def test_what_changes_nothing_is_taken(small_server):
    body = {
        "max_tokens": 1,
        "user": "me",
        "metadata": {"a": "b"},
        "store": True,
        "ignore_eos": False,
        "guided_json": None,
    }
    neutral = {"n": 1, "tools": [], "tool_choice": None, "top_logprobs": 0, "logprobs": False}
    assert post(small_server[0], "/v1/chat/completions", {**QUESTION, **body, **neutral}).status_code == 200
    body |= {"suffix": "", "logprobs": None, "min_tokens": 0}
    assert post(small_server[0], "/v1/completions", {"prompt": "One", **body}).status_code == 200


def test_the_likelihood_of_a_prompt(small_server):
    body = {"prompt": "What is the capital?", "echo": True, "max_tokens": 0}
    choice = post(small_server[0], "/v1/completions", {**body, "logprobs": 0}).json()["choices"][0]
    assert choice["logprobs"]["token_logprobs"][0] is None and choice["logprobs"]["token_logprobs"][1] < 0
    refused = post(small_server[0], "/v1/completions", {**body, "logprobs": 2})
    assert refused.status_code == 400 and "only logprobs: 0" in refused.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"chat_template": "mine"}, "chat_template is not a variable"),
        ({"tokenize": True}, "tokenize is not a variable"),
        ({"add_generation_prompt": False}, "add_generation_prompt is not a variable"),
        ({"continue_final_message": True}, "continue_final_message is not a variable"),
        ({"return_dict": True}, "return_dict is not a variable"),
        ({"tools": [{}]}, "tools is not a variable"),
        ({"documents": [{}]}, "documents is not a variable"),
        ({"messages": "mine"}, "messages is not a variable"),
        ({"level": ["high"]}, "level: expected a text"),
        (["enable_thinking"], "expected an object"),
    ],
)
def test_a_request_brings_variables_for_the_template_and_nothing_else(small_server, path, variables, words):
    response = post(small_server[0], path, {**QUESTION, "chat_template_kwargs": variables})
    assert response.status_code == 400 and words in response.json()["error"]["message"]


def test_a_request_may_set_variables_of_the_template(small_server):
    for value in ("high", 1, 0.5, False, None):
        body = {**QUESTION, "chat_template_kwargs": {"enable_thinking": value}}
        assert post(small_server[0], "/tokenize", body).status_code == 200


# What needs 5 seconds of the processor's time and much more, if a message asks for it.
LOOP = (
    "{% if messages[0].content == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    "{% endif %}"
)


@pytest.mark.slow
def test_a_template_that_loops_is_stopped_and_others_are_answered(tmp_path):
    shutil.copytree(DEMO_BASE, tmp_path / "base")
    template = tmp_path / "base" / "chat_template.jinja"
    template.write_text(LOOP + template.read_text())
    url = address("127.0.0.1", port := free_port())
    command = transformers_command(settings_for(), Served("base", str(tmp_path / "base")), "127.0.0.1", port)
    with Server(command, url, Log(), key="the-key", threads=1) as server, ThreadPoolExecutor(1) as pool:
        server.wait_ready(60)
        looping = {"messages": [{"role": "user", "content": "loop"}]}
        stopped = pool.submit(post, url, "/v1/chat/completions", looping)
        text = {"prompt": [1, 2, 3], "max_tokens": 2}
        assert post(url, "/v1/chat/completions", QUESTION).json()["choices"][0]["finish_reason"] == "stop"
        assert stopped.result().status_code == 400
        assert "the chat template has not come to an end" in stopped.result().json()["error"]["message"]
        assert post(url, "/v1/completions", text).status_code == 200


@pytest.mark.parametrize("key", [None, "wrong", "the-key-and-more"])
def test_without_the_key_there_is_nothing(small_server, key):
    for path in ("/v1/chat/completions", "/tokenize"):
        refused = post(small_server[0], path, QUESTION, key=key)
        assert refused.status_code == 401 and refused.json()["error"]["type"] == "AuthenticationError"
    assert requests.get(f"{small_server[0]}/v1/models", timeout=9).status_code == 401
