"""What the tests of serving share."""

import json
import os
import subprocess
import sys
from pathlib import Path

from workflow import ROOT, hear_sigint

from moult.files import sha256_folder, write_json, write_jsonl
from moult.serving.launch import Run

FAKE_ENGINE = ROOT / "tests" / "fake_engine.py"

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


def make_run(folder: Path, name: str, reasons=(), rank: int = 16, template: str = "<{{ messages }}>") -> Run:
    run = Run(name, "base", *(str(folder / part) for part in ("adapter", "merged", "plan.json")))
    write_json(Path(run.merged, "config.json"), {})
    write_json(Path(run.adapter, "adapter_config.json"), {})
    Path(run.adapter, "chat_template.jinja").write_text(template)
    write_json(run.plan, {"serve": {"reasons": list(reasons), "max_lora_rank": rank}})
    return run


def measured_run(folder: Path) -> Path:
    """A run as evaluate leaves it: two prompts, a row and an instruction, measured. The fake engine knows the answers. The
    instruction is none of the config's, and not asked."""
    rows = []
    kinds = [("prompt", "one"), ("prompt", "two"), ("row", "three"), ("instruction", "four")]
    for number, (kind, text) in enumerate(kinds):
        rows.append(
            {
                "kind": kind,
                "id": text,
                "prompt": text,
                "reference": None,
                "answer": f"answer {text}",
                "token_ids": [4, 5, 6, 2],
                "stopped": True,
                "prompt_ids": [1, 7, number + 10, 3],
                "prompt_nll": 9.5,
                "margins": [5.0, 0.2, 4.0, 3.0],
            }
        )
    write_jsonl(folder / "answers.jsonl", rows)
    messages = [{"role": "user", "content": "three"}, {"role": "assistant", "content": "?"}]
    write_jsonl(folder / "test.jsonl", [{"id": "three", "messages": messages}])
    make_run(folder, "run")
    write_json(folder / "merge.json", {"files": sha256_folder(folder / "merged"), "adapter": {}})
    write_json(folder / "merge_check.json", {"dtype": "float32"})
    return folder


def start_smoke_test(
    folder: Path, fake: str, serve: dict | None = None, dtype: str = "bfloat16", kind: str = ""
) -> subprocess.Popen:
    settings = settings_for({"python": str(FAKE_ENGINE), "start_timeout": 5, **(serve or {})}, dtype=dtype)
    prompts = [{"id": text, "prompt": text, "expect": {"contains": f"answer {text}"}} for text in ("one", "two")]
    settings["eval"] = {"prompts": prompts, "max_new_tokens": 8}
    command = [sys.executable, ROOT / "scripts" / "smoke_test.py", "--run", "run", "--settings", json.dumps(settings)]
    for name, file in (
        *(("answers", "answers.jsonl"), ("merge-check", "merge_check.json"), ("rows", "test.jsonl"), ("base", "base")),
        *(("adapter", "adapter"), ("merged", "merged"), ("merge", "merge.json"), ("plan", "plan.json")),
        *(("result", "smoke_test.json"), ("log-file", "smoke_test.log")),
    ):
        command += [f"--{name}", file]
    environment = {**os.environ, "FAKE": fake, "FAKE_ANSWERS": "answers.jsonl", "FAKE_PIDS": "pids", "FAKE_KIND": kind}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=hear_sigint
    )


def smoke_test(folder: Path, fake: str = "", **options) -> tuple[int, dict, str]:
    """Exit code, {check: passed}, and what was said."""
    process = start_smoke_test(folder, fake, **options)
    said = process.communicate(timeout=120)[1]
    checks = result_of(folder, process.returncode)["checks"]
    for pid in (folder / "pids").read_text().split() if (folder / "pids").exists() else []:
        assert not is_alive(int(pid)), "a process was left behind"
    return process.returncode, {name: check["passed"] for name, check in checks.items()}, said


def is_alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"
