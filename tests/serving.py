"""What the tests of serving share."""

import json
import subprocess
import sys
from pathlib import Path

CHECKS = (
    *("files", "ready", "models", "answers", "prompt_tokens", "expectations", "stop_reasons", "likelihood"),
    *("streaming", "concurrency", "wrong_model", "too_long", "api_key", "alive"),
)


def settings_for(serve: dict | None = None, **model) -> dict:
    own = {"engine": "vllm", "mode": "merged", "served_model_name": None, "max_model_len": None, "python": "python"}
    of_model = {"name": "Qwen/Qwen3-0.6B", "dtype": "bfloat16", "attn_implementation": None, "trust_remote_code": False}
    return {
        "serve": {**own, "host": "127.0.0.1", "port": 8080, "start_timeout": 30, "vllm": {}, **(serve or {})},
        "model": {**of_model, "chat_template_kwargs": {}, **model},
    }


class Log:
    def debug(self, *args) -> None: ...

    info = warning = debug


def result_of(folder: Path, code: int) -> dict:
    """The result of a smoke test that has ended with this exit code: there is one, and in its place."""
    names = ("smoke_test.json", "smoke_test.failed.json")
    name, other = names if code == 0 else names[::-1]
    assert not (folder / other).exists()
    return json.loads((folder / name).read_text())


def demo_smoke_test(folder: Path, *arguments: str) -> tuple[int, dict, str]:
    command = [sys.executable, "scripts/smoke_test.py", "--run", "demo", "--threads", "1", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    checks = result_of(folder / "results/demo", done.returncode)["checks"]
    return done.returncode, {name: check["passed"] for name, check in checks.items()}, done.stderr
