"""containers/compose.yaml: valid, all of it found in what print_runtime writes, and nothing open to others unasked."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from workflow import ROOT

COMPOSE = ROOT / "containers" / "compose.yaml"
SERVICES = ("vllm-server", "open-webui", "dozzle")


def runtime(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "scripts/tools/print_runtime.py", "--format", "env", "--run", "demo", *arguments]
    variables = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=variables, check=False)


def written(*arguments: str) -> dict[str, str]:
    done = runtime(*arguments)
    assert done.returncode == 0, done.stderr
    return {name: shlex.split(value)[0] for name, value in (line.split("=", 1) for line in done.stdout.splitlines())}


def services() -> dict:
    every = yaml.safe_load(COMPOSE.read_text())["services"]
    return {name: every[name] for name in SERVICES}


def test_what_the_compose_file_asks_for_is_what_print_runtime_writes():
    asked = dict(re.findall(r"\$\{(\w+)(:[-?][^}]*)?\}", json.dumps(services())))
    assert set(asked) - {"MOULT_API_KEY"} <= set(written())
    ports = {name: str(asked[name]).removeprefix(":-") for name in ("SERVE_PORT", "WEBUI_PORT", "DOZZLE_PORT")}
    assert ports == {name: written()[name] for name in ports}
    assert list(ports.values()) == ["8080", "3000", "9999"]


def test_pinned_healthy_and_on_loopback():
    for name, service in services().items():
        tag = service["image"].rpartition(":")[2]
        assert re.fullmatch(r"v\d+\.\d+\.\d+", tag), name
        assert service["healthcheck"]["test"], name
        assert all(re.match(r"127\.0\.0\.1:|\$\{SERVE_HOST:-127\.0\.0\.1\}:", port) for port in service["ports"]), name
    vllm = services()["vllm-server"]
    assert "3000" in services()["open-webui"]["ports"][0] and "9999" in services()["dozzle"]["ports"][0]
    assert services()["open-webui"]["environment"]["OPENAI_API_BASE_URL"] == "http://vllm-server:8080/v1"
    assert vllm["volumes"][0]["target"] == "/model" and vllm["volumes"][0]["read_only"]


def test_a_public_address_is_written_only_with_a_key(tmp_path):
    (tmp_path / "open.yaml").write_text("runs: {demo: {serve: {host: 0.0.0.0}}}")
    done = runtime("--configfile", str(tmp_path / "open.yaml"), MOULT_API_KEY="")
    assert done.returncode != 0 and "there is no API key" in done.stderr
    done = runtime("--configfile", str(tmp_path / "open.yaml"), MOULT_API_KEY="a-key-of-the-tests")
    assert done.returncode == 0 and "a-key-of-the-tests" not in done.stdout


@pytest.mark.parametrize(
    ("host", "key", "starts"),
    [("127.0.0.1", "", True), ("0.0.0.0", "", False), ("0.0.0.0", "a-key-of-the-tests", True), ("::", "", False)],
)
def test_without_a_key_nothing_is_served_to_others(host, key, starts, tmp_path):
    """What .env was written with, and what `up` is started with, may differ."""
    entrypoint = [word.replace("$$", "$") for word in services()["vllm-server"]["entrypoint"]]
    (tmp_path / "python3").write_text('#!/bin/sh\necho started "$@"\n')
    (tmp_path / "python3").chmod(0o755)
    variables = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SERVE_HOST": host, "VLLM_API_KEY": key}
    done = subprocess.run(
        [*entrypoint, "--model", "/model"], capture_output=True, text=True, env=variables, check=False
    )
    assert (done.returncode == 0) == starts
    if starts:
        assert done.stdout == "started -m vllm.entrypoints.openai.api_server --model /model\n"
    else:
        assert "export MOULT_API_KEY" in done.stderr and not done.stdout


def odd_config(folder: Path) -> str:
    kwargs = {"enable_thinking": False, "say": 'it\'s "$5"'}
    run = {"model": {"name": "config/demo/base", "chat_template_kwargs": kwargs}, "serve": {"max_model_len": 4096}}
    (folder / "odd.yaml").write_text(yaml.safe_dump({"runs": {"demo": run}}))
    return str(folder / "odd.yaml")


def check_command(command: str) -> None:
    """The words that reach vLLM, however the run is set up."""
    words = shlex.split(command)
    assert words[:4] == ["--model", "/model", "--served-model-name", "demo"]
    assert words[words.index("--max-model-len") + 1] == "4096" and words[words.index("--port") + 1] == "8080"
    kwargs = json.loads(words[words.index("--default-chat-template-kwargs") + 1])
    assert kwargs == {"enable_thinking": False, "say": 'it\'s "$5"'}


def test_the_command_survives_a_shell(tmp_path):
    check_command(written("--configfile", odd_config(tmp_path))["VLLM_ARGS"])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="there is no docker-compose")
def test_compose_takes_the_file(tmp_path):
    shutil.copy(COMPOSE, tmp_path)
    config = odd_config(tmp_path)
    command = ["docker-compose", "-f", str(tmp_path / "compose.yaml"), "config"]
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    # `run moult` works without .env; what `up` would mount then is not there, and says so.
    assert done.returncode == 0 and "write-.env-with-print_runtime" in done.stdout
    (tmp_path / ".env").write_text(runtime("--configfile", config).stdout)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = yaml.safe_load(done.stdout)["services"]
    assert set(SERVICES) <= set(found)
    check_command(found["vllm-server"]["command"].replace("$$", "$"))
    model = (ROOT / "results" / "demo" / "merged").resolve()
    mount = next(volume for volume in found["vllm-server"]["volumes"] if "target" in volume)
    assert mount["source"] == str(model) and mount["target"] == "/model" and mount["read_only"]
    broken = (tmp_path / "compose.yaml").read_text().replace("healthcheck:", "healthchek:")
    (tmp_path / "compose.yaml").write_text(broken)
    assert subprocess.run(command, capture_output=True, env=environment, check=False).returncode != 0
