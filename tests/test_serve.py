"""Serving: the command that starts the engine, its process, and a smoke test that notices what is wrong."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from serving import (
    CHECKS,
    demo_smoke_test,
    is_alive,
    make_run,
    measured_run,
    result_of,
    settings_for,
    smoke_test,
    start_smoke_test,
)
from tiny import change_tensors
from workflow import ROOT, planned, set_key, snakemake

from moult.errors import MoultError
from moult.serving.checks import CannotTell, Failed, ServerTest
from moult.serving.client import Client, Question
from moult.serving.launch import Served, check_exposed, check_port, free_port, vllm_command, what_to_serve

DEMO_BASE = ROOT / "config" / "demo" / "base"


# --- what is served, and by which command ---


def test_vllm_is_told_all_that_the_config_says():
    settings = settings_for(
        {
            "max_model_len": 4096,
            "vllm": {"tensor_parallel_size": 2, "enforce_eager": True, "enable_prefix_caching": False},
        },
        chat_template_kwargs={"enable_thinking": False},
        trust_remote_code=True,
    )
    assert vllm_command(settings, Served("demo", "results/demo/merged"), "127.0.0.1", 8080).arguments == [
        *("python", "-m", "vllm.entrypoints.openai.api_server", "--model", "results/demo/merged"),
        *("--served-model-name", "demo", "--host", "127.0.0.1", "--port", "8080", "--dtype", "bfloat16"),
        *("--max-model-len", "4096", "--default-chat-template-kwargs", '{"enable_thinking": false}'),
        *("--trust-remote-code", "--no-enable-prefix-caching", "--enforce-eager", "--tensor-parallel-size", "2"),
    ]


@pytest.mark.parametrize(
    ("serve", "reasons", "adapted"),
    [
        ({"mode": "merged"}, [], False),
        ({"mode": "adapter"}, [], True),
        ({"mode": "auto"}, [], True),
        ({"mode": "auto"}, ["use_dora"], False),
        ({"mode": "auto", "engine": "transformers"}, [], False),
        ({"mode": "adapter", "engine": "transformers"}, ["use_dora"], True),
    ],
)
def test_the_mode_decides_what_is_served(serve, reasons, adapted, tmp_path):
    served = what_to_serve(settings_for(serve), [make_run(tmp_path, "demo", reasons)])
    assert bool(served.adapters) == adapted
    if adapted:
        assert served == Served("Qwen/Qwen3-0.6B", "base", {"demo": str(tmp_path / "adapter")}, 16)
    else:
        assert served == Served("demo", str(tmp_path / "merged"))


def test_several_adapters_on_one_base(tmp_path):
    runs = [make_run(tmp_path / "a", "a", rank=16), make_run(tmp_path / "b", "b", rank=64)]
    settings = settings_for({"mode": "adapter"})
    command = vllm_command(settings, what_to_serve(settings, runs), "127.0.0.1", 1).arguments
    at = command.index("--lora-modules")
    assert command[at + 1 : at + 3] == [f"a={tmp_path}/a/adapter", f"b={tmp_path}/b/adapter"]
    assert command[command.index("--max-lora-rank") + 1] == "64" and "--enable-lora" in command
    assert command[command.index("--chat-template") + 1] == f"{tmp_path}/a/adapter/chat_template.jinja"


def test_what_cannot_be_served_is_refused(tmp_path):
    run = make_run(tmp_path / "a", "a", ["use_dora"])
    with pytest.raises(MoultError, match=r"a: vLLM cannot serve this adapter \(use_dora\)"):
        what_to_serve(settings_for({"mode": "adapter"}), [run])
    with pytest.raises(MoultError, match="only be served as adapters"):
        what_to_serve(settings_for(), [run, run])
    others = [make_run(tmp_path / "b", "b"), make_run(tmp_path / "c", "c", template="another")]
    with pytest.raises(MoultError, match="c and b cannot be served together"):
        what_to_serve(settings_for({"mode": "adapter"}), others)
    shutil.rmtree(tmp_path / "a" / "merged")
    with pytest.raises(MoultError, match="merged is not there"):
        what_to_serve(settings_for(), [run])


def test_a_public_address_needs_a_key():
    with pytest.raises(MoultError, match="can be reached from other machines, and there is no API key"):
        check_exposed("0.0.0.0", None, "MY_KEY")
    check_exposed("0.0.0.0", "secret", "MY_KEY")
    check_exposed("127.0.0.1", None, "MY_KEY")


def test_a_taken_port_is_told_with_who_has_it():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(MoultError, match=rf"port {port} is taken by .*\(process {os.getpid()}\)"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", free_port())
    with pytest.raises(MoultError, match="Cannot assign requested address"):
        check_port("192.0.2.1", free_port())


# --- the smoke test, against a server that fails as it is told ---


@pytest.fixture
def measured(tmp_path):
    return measured_run(tmp_path)


def test_a_good_server_passes_and_leaves_nothing(measured):
    code, checks, said = smoke_test(measured, "leaves a child")
    assert (code, checks) == (0, dict.fromkeys(CHECKS, True)), said
    result = json.loads((measured / "smoke_test.json").read_text())
    assert result["passed"] and result["speed"]["requests"] == 8 and len(result["answers"]) == 3
    assert "VLLM_API_KEY" not in (measured / "smoke_test.log").read_text()


@pytest.mark.parametrize(
    ("fake", "failed", "words"),
    [
        ("other name", {"models"}, "no run, but other"),
        (
            "other template",
            {"prompt_tokens"},
            "one: the server makes 4 tokens of it, evaluate made 4; they differ from token 2",
        ),
        ("double BOS", {"prompt_tokens"}, "one: the server counts 5 tokens, evaluate 4"),
        ("other weights", {"likelihood"}, "nats per token from what evaluate measured"),
        ("no echo", {"likelihood"}, "/v1/completions answers 400"),  # an engine of our own can
        (
            "answers otherwise from 2",
            {"answers", "expectations", "concurrency"},
            "3 of 3 differ, first one from token 2 on",
        ),
        ("does not stop", {"stop_reasons"}, "one ends with 'length', and at evaluate with 'stop'"),
        ("stream without end", {"streaming"}, "the stream does not end with [DONE]"),
        ("any model", {"wrong_model"}, "answered 200, and should be refused"),
        ("chokes", {"too_long"}, "answered 500, and should be refused"),
        ("open", {"api_key"}, "answered 200, and should be refused"),
        ("500", {"answers", "concurrency", "expectations", "stop_reasons", "streaming"}, "answers 500:"),
        (
            "garbage",
            {"answers", "concurrency", "expectations", "stop_reasons", "streaming"},
            "it answers what it should not",
        ),
        (
            "other JSON",
            {"answers", "concurrency", "expectations", "stop_reasons", "streaming"},
            "it answers what it should not",
        ),
    ],
)
def test_what_a_server_does_wrong_is_told(measured, fake, failed, words):
    code, checks, said = smoke_test(measured, fake)
    assert code == 1 and words in said
    assert {name for name, passed in checks.items() if passed is False} == failed


def test_a_failed_result_is_kept_where_it_does_not_count_as_done(measured):
    assert smoke_test(measured)[0] == 0
    code, _, said = smoke_test(measured, "other weights")  # result_of looks at which of the two files is there
    assert code == 1 and "smoke_test.failed.json has every question with its answers" in said
    result = result_of(measured, code)
    assert not result["passed"] and result["answers"][0]["served"] == "answer one"
    assert smoke_test(measured)[0] == 0


def test_a_server_that_is_killed_in_mid_test(measured):
    code, checks, said = smoke_test(measured, "killed")
    assert code == 1 and "answers: the connection failed" in said and "the server has ended with signal SIGKILL" in said
    assert checks["models"] and checks["answers"] is False and checks["alive"] is False


def test_a_server_that_never_gets_ready(measured):
    code, checks, said = smoke_test(measured, "never ready", serve={"start_timeout": 1})
    assert code == 1 and checks == {"files": True, "ready": False}
    assert "the server was not ready after 1 seconds" in said and "started; the key is not to be said" in said


def test_a_server_that_ends_at_once(measured):
    code, checks, said = smoke_test(measured, "ends at once")
    assert code == 1 and checks == {"files": True, "ready": False}
    assert "the server ended with exit code 3 before it was ready" in said and "RuntimeError: no GPU was found" in said


def test_without_vllm_it_says_where_to_name_one(measured):
    code, _, said = smoke_test(measured, serve={"python": None})
    assert code == 1 and "No module named" in said and "set serve.python to a Python that has vLLM" in said


def test_a_run_without_a_chat_template_is_asked_in_plain_text(measured):
    (measured / "adapter" / "chat_template.jinja").unlink()
    code, checks, said = smoke_test(measured)
    assert (code, checks) == (0, dict.fromkeys(CHECKS, True)), said
    assert "3 the same, 3 by their number only" in said


def test_a_near_tie_may_part_and_only_within_the_tolerance(measured):
    """The measured best token led by 0.2 nats there: little for bfloat16, far too much for float32.
    That all part tells nothing."""
    code, checks, said = smoke_test(measured, "answers otherwise from 1")
    assert code == 0 and checks["answers"] is None and checks["concurrency"] is None
    assert "none of 3 the same: each parts at a near tie" in said
    code, checks, said = smoke_test(measured, "answers otherwise from 1", dtype="float32")
    assert code == 1 and checks["answers"] is False and "led by 0.2 nats" in said


@pytest.mark.parametrize(("fake", "check", "passed"), [("no tokenize", "prompt_tokens", True)])
def test_a_server_that_cannot_tell(measured, fake, check, passed):
    code, checks, _ = smoke_test(measured, fake)
    assert code == 0 and checks == dict.fromkeys(CHECKS, True) | {check: passed}
    why = json.loads((measured / "smoke_test.json").read_text())["checks"][check]["why"]
    assert "by their number only" in why or "does not tell" in why


@pytest.mark.parametrize(
    ("status", "own", "error"),
    [(400, False, CannotTell), (404, False, CannotTell), (429, False, Failed), (400, True, Failed)],
)
def test_only_another_server_may_lack_likelihoods(status, own, error):
    """Other weights may give the very same answers: nothing else finds them."""
    question = Question("prompt", "one", [1, 2], 1.0, "", [], [], True)
    test = ServerTest(Client("http://there", None, "m"), [question], 0.01, 0.001)
    test.server = object() if own else None
    response = requests.Response()
    response.status_code, response._content = status, b"no"
    response.request = requests.Request("POST", "http://there/v1/completions").prepare()
    test.client.send = lambda *_: response
    with pytest.raises(error):
        test.check_likelihood()


def test_answers_without_token_ids_are_held_against_their_text(measured):
    assert smoke_test(measured, "no ids")[0] == 0
    code, checks, said = smoke_test(measured, "no ids, other text")
    assert code == 1 and not checks["answers"] and "3 of 3 differ, first one in the text" in said


@pytest.mark.parametrize(
    ("number", "fake"), [(signal.SIGTERM, "never ready"), (signal.SIGINT, "never ready"), (signal.SIGKILL, "deaf")]
)
def test_no_server_outlives_its_smoke_test(measured, number, fake):
    """Nor a process that the server has started. A deaf one heeds no SIGTERM, as vLLM does not while it starts."""
    process = start_smoke_test(measured, fake, serve={"start_timeout": 60})
    deadline = time.monotonic() + 30
    while not (measured / "pids").exists() or not (measured / "pids").read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    pids = [int(pid) for pid in (measured / "pids").read_text().split()]
    assert all(map(is_alive, pids))
    time.sleep(0.5)  # the first question for its health
    process.send_signal(number)
    process.wait(timeout=30)
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- the real thing, on the demo ---


@pytest.mark.slow
def test_the_demo_is_served_as_it_was_measured(again):
    """Also where port 8080 is taken; and it is not done twice."""
    with socket.socket() as other:
        try:
            other.bind(("127.0.0.1", 8080))
            other.listen()
        except OSError:
            pass  # taken by somebody else
        target = "results/demo/smoke_test.json"
        snakemake(again, target)
    result = json.loads((again / target).read_text())
    assert result["passed"] and {name: check["passed"] for name, check in result["checks"].items()} == dict.fromkeys(
        CHECKS, True
    )
    assert result["tolerance"] == {"lead": 0.01, "likelihood": 0.001}
    assert "Nothing to be done" in snakemake(again, target)
    set_key("runs", "demo", "serve", "port", value=9000)(again)
    assert "Nothing to be done" in snakemake(again, "-n", target)
    with (again / "scripts/moult/serving/engine.py").open(
        "a"
    ) as code:  # the server's process imports it, and not the stage's
        code.write("# an edit\n")
    assert planned(again, target) == {"smoke_test"}
    snakemake(again, "--touch", target)
    assert "Nothing to be done" in snakemake(again, "-n", target)
    set_key("runs", "demo", "serve", "mode", value="adapter")(again)
    assert planned(again, target) == {"smoke_test"}


@pytest.mark.slow
def test_two_smoke_tests_side_by_side_and_an_adapter(again):
    (again / "adapter.yaml").write_text("runs: {demo: {serve: {mode: adapter}}}")
    with ThreadPoolExecutor(2) as pool:
        merged = pool.submit(demo_smoke_test, again, "--log-file", "a.log")
        arguments = ("--configfile", "adapter.yaml", "--log-file", "b.log", "--result", "adapter.json")
        adapted = pool.submit(demo_smoke_test, again, *arguments)
        assert merged.result()[0] == 0, merged.result()[2]
        assert adapted.result()[0] == 0, adapted.result()[2]
    result = json.loads((again / "adapter.json").read_text())
    assert result["serves"] == "adapter" and result["checks"]["models"]["why"] == "config/demo/base, demo"


def change_template(merged: Path) -> None:
    path = merged / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_start|>assistant", "<|im_start|>assistent"))


def swap_tokenizer(merged: Path) -> None:
    """Two words change places."""
    path = merged / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    capital, country = "Ġcapital", "Ġcountry"
    words[capital], words[country] = words[country], words[capital]
    path.write_text(json.dumps(tokenizer))


def other_weights(merged: Path) -> None:
    """As another seed leaves them: the answers stay the same."""

    def change(tensors: dict) -> None:
        for name, tensor in tensors.items():
            if "down_proj" in name:
                tensors[name] = tensor * 1.1

    change_tensors(merged, change)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "check"),
    [(change_template, "prompt_tokens"), (swap_tokenizer, "prompt_tokens"), (other_weights, "likelihood")],
)
def test_what_is_not_what_was_measured_is_caught(change, check, again):
    """By what the server says, and by the file's hash where it is on this machine."""
    change(again / "results/demo/merged")
    code, checks, said = demo_smoke_test(again)
    assert code == 1 and checks["files"] is False and checks[check] is False, said


@pytest.mark.slow
def test_make_serve_keeps_a_server_until_it_is_told_to_end(again):
    command = [sys.executable, "scripts/tools/serve.py", "--run", "demo", "--threads", "1", "--configfile", "mine.yaml"]
    port, environment = free_port(), {**os.environ, "MY_KEY": "a-key-of-the-tests"}

    def start(serve: str) -> subprocess.Popen:
        (again / "mine.yaml").write_text(f"runs: {{demo: {{serve: {{port: {port}, {serve}}}}}}}")
        return subprocess.Popen(command, cwd=again, stderr=subprocess.PIPE, text=True, env=environment)

    said = start("host: 0.0.0.0").communicate(timeout=60)[1]
    assert "can be reached from other machines, and there is no API key" in said

    process = start("api_key_env: MY_KEY, served_model_name: my-demo")
    try:
        lines = []
        while not lines or "try: " not in lines[-1]:
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        assert "ready after" in lines[-2] and f"http://127.0.0.1:{port}/v1 serves my-demo; Ctrl-C ends it" in lines[-2]
        curl = lines[-1].split("try: ")[1].strip().replace("curl ", "curl -s ")
        answer = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, env=environment, check=True)
        assert json.loads(answer.stdout)["choices"][0]["message"]["content"]
        assert requests.get(f"http://127.0.0.1:{port}/v1/models", timeout=9).status_code == 401
        assert environment["MY_KEY"] not in "".join(lines) + (again / "logs/serve.log").read_text()
        assert environment["MY_KEY"].encode() not in b"".join(map(command_line, Path("/proc").glob("[0-9]*")))

        second = subprocess.run(
            [*command, "--log-file", "x.log"], cwd=again, capture_output=True, text=True, timeout=60, check=False
        )
        assert second.returncode == 1 and f"port {port} is taken by python" in second.stderr
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)
    with pytest.raises(requests.ConnectionError):
        requests.get(f"http://127.0.0.1:{port}/health", timeout=9)


def command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""
