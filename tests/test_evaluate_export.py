"""evaluate_export: an export is the model that was measured, or it is told what is not."""

import json
import logging
import shutil
import struct
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import serve
from exporting import export_python  # noqa: F401
from safetensors.torch import load_file
from tiny import change_tensors

import evaluate_export
from moult.errors import MoultError
from moult.files import read_json, read_jsonl, sha256_folder, write_json
from moult.serving.checks import CannotTell, CheckResult, ServerTest
from moult.serving.client import Client, Failed
from moult.workflow.exports import FORMATS
from moult.workflow.runtime import read_config
from moult.workflow.stages import stage_settings

RUN = "results/demo"


# --- its own checks ---


def test_a_file_that_was_changed_and_another_merge_are_told(tmp_path):
    (tmp_path / "demo-Q8_0.gguf").write_bytes(b"GGUF")
    merge = {"files": {"model.safetensors": "a"}, "adapter": {"adapter_model.safetensors": "b"}}
    made = {"files": sha256_folder(tmp_path), "made_from": merge["files"]}
    assert "1 as they were made" in evaluate_export.check_files(str(tmp_path), "gguf-q8_0", made, merge)
    with pytest.raises(Failed, match="made of another model than the one that is merged now"):
        evaluate_export.check_files(
            str(tmp_path), "gguf-q8_0", {**made, "made_from": {"model.safetensors": "c"}}, merge
        )
    with pytest.raises(Failed, match="another model"):
        evaluate_export.check_files(str(tmp_path), "adapter-gguf", made, merge)
    (tmp_path / "Modelfile").touch()
    (tmp_path / "demo-Q8_0.gguf").write_bytes(b"GGuF")
    with pytest.raises(Failed, match=r"is not what was made: Modelfile, demo-Q8_0\.gguf differ"):
        evaluate_export.check_files(str(tmp_path), "gguf-q8_0", made, merge)


def test_a_divergence_over_the_limit_fails():
    kl = {"mean_kl": 0.0049, "max_kl": 0.1, "top1_agreement": 1.0, "rows": 8, "positions": 95}
    assert "0.0049 nats" in evaluate_export.check_divergence(kl, 0.005)
    for mean in (0.0051, float("nan")):
        with pytest.raises(Failed, match=r"take a format with more bits, or raise export\.kl_limit"):
            evaluate_export.check_divergence({**kl, "mean_kl": mean}, 0.005)
    with pytest.raises(CannotTell, match="adapter"):
        evaluate_export.check_divergence(None, None)


@pytest.mark.parametrize("passed", [True, False])
def test_a_failed_result_is_kept_where_it_does_not_count_as_done(passed, tmp_path):
    test = ServerTest(Client("http://there", None, "demo"), [], 0.5, 0.02)
    test.checks = {"files": CheckResult(True, "fine"), "divergence": CheckResult(passed, "why")}
    settings = {"serve": {"engine": "vllm"}, "export": {"kl_limit": None}}
    args = Namespace(
        run="demo", format="gguf-q8_0", export="the/folder", settings=settings, check=str(tmp_path / "check.json")
    )
    names = ["check.json", "check.failed.json"]
    for name in names:
        (tmp_path / name).write_text("old")
    if passed:
        evaluate_export.keep(args, test, {"mean_kl": 0.001}, "cpu", logging.getLogger())
    else:
        with pytest.raises(MoultError) as raised:
            evaluate_export.keep(args, test, {"mean_kl": 0.1}, "cpu", logging.getLogger())
        assert "1 of 2 checks failed:\n  - divergence: why" in raised.value.what
    (left,) = tmp_path.iterdir()
    assert left.name == names[not passed]
    result = read_json(left)
    assert (result["engine"], result["kl_limit"], result["why_no_kl"]) == ("llama.cpp", 0.005, None)
    assert result["checks"]["divergence"] == {"passed": passed, "why": "why"}


def test_only_what_was_measured_is_served(tmp_path):
    folder, metrics = tmp_path / "model", tmp_path / "export.json"
    folder.mkdir()
    (folder / "demo-Q8_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(MoultError, match="is not made, or has not passed its checks"):
        serve.check_measured(folder, metrics)
    write_json(metrics, {"files": sha256_folder(folder)})
    serve.check_measured(folder, metrics)
    (folder / "demo-Q8_0.gguf").write_bytes(b"GGuF")
    with pytest.raises(MoultError, match=r"demo-Q8_0\.gguf is not what was measured"):
        serve.check_measured(folder, metrics)
    shutil.rmtree(folder)
    with pytest.raises(MoultError, match="is not what was measured"):
        serve.check_measured(folder, metrics)


# --- the whole stage, on the demo ---


def evaluate(folder: Path, format: str, python: str) -> tuple[int, dict, str]:
    """Exit code, the result with its checks as {check: passed}, and what was said."""
    settings = stage_settings(read_config([]), "evaluate_export", "demo")
    to = f"{RUN}/exports/{format}"
    (verdict := folder / to / "export.json").write_text("of another check")
    command = [python, "scripts/evaluate_export.py", "--settings", json.dumps(settings), "--run", "demo"]
    for name, value in (
        *(("format", format), ("export", f"{to}/model"), ("made", f"{to}/made.json"), ("base", "config/demo/base")),
        *(("merged", f"{RUN}/merged"), ("merge", f"{RUN}/merge.json"), ("tokens", f"{RUN}/tokens")),
        *(("tuned", f"{RUN}/tuned"), ("rows", "results/prepared/demo/test.jsonl"), ("threads", "1")),
        *((name, f"{to}/{name}.jsonl") for name in ("likelihood", "answers", "general")),
        ("check", f"{to}/check.json"),
    ):
        command += [f"--{name}", value]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert not verdict.exists()
    name = "check.json" if done.returncode == 0 else "check.failed.json"
    result = read_json(folder / to / name)
    result["checks"] = {name: check["passed"] for name, check in result["checks"].items()}
    return done.returncode, result, done.stderr


def failed(result: dict) -> set[str]:
    return {name for name, passed in result["checks"].items() if passed is False}


def as_made(folder: Path, format: str) -> None:
    """What lies in the export's folder now is what was made, of the demo."""
    to = folder / RUN / "exports" / format
    made = {"files": sha256_folder(to / "model"), "made_from": read_json(folder / RUN / "merge.json")["files"]}
    write_json(to / "made.json", made)


def assert_as_tuned(folder: Path, format: str, *names: str) -> None:
    """The outputs have the rows of the merged model's, in their order and form."""
    for name in names:
        ours, theirs = (list(read_jsonl(folder / RUN / at / name)) for at in (f"exports/{format}", "tuned"))
        assert [row["id"] for row in ours] == [row["id"] for row in theirs]
        assert ours[0].keys() == theirs[0].keys()
        if name != "answers.jsonl":
            assert [row["tokens"] for row in ours] == [row["tokens"] for row in theirs]
            nll, wanted = (sum(row["nll"] for row in rows) for rows in (ours, theirs))
            assert nll == pytest.approx(wanted, rel=0.02)


def test_a_copy_of_the_merged_model_passes(again):
    """As fp8, which the run's engine serves: here Moult's own, on a CPU."""
    model = again / RUN / "exports" / "fp8" / "model"
    shutil.copytree(again / RUN / "merged", model)
    as_made(again, "fp8")
    code, result, said = evaluate(again, "fp8", sys.executable)
    assert code == 0 and set(result["checks"].values()) == {True}, said
    assert result["kl"]["mean_kl"] < 1e-9 and result["kl"]["rows"] == 8 and result["speed"]["requests"] == 8
    assert_as_tuned(again, "fp8", "likelihood.jsonl", "answers.jsonl", "general.jsonl")
    ours, theirs = (list(read_jsonl(again / RUN / at / "answers.jsonl")) for at in ("exports/fp8", "tuned"))
    own = {"margins": None, "prompt_nll": None}
    same = [{**row, **own} == {**other, **own} for row, other in zip(ours, theirs, strict=True)]
    assert sum(same) >= len(same) - 2  # at near ties, which another batch may decide otherwise


@pytest.mark.slow
def test_other_weights_are_caught_by_their_hash_and_by_their_divergence(again):
    model = again / RUN / "exports" / "fp8" / "model"
    shutil.copytree(again / RUN / "merged", model)
    as_made(again, "fp8")
    half_trained(again, model)
    code, result, said = evaluate(again, "fp8", sys.executable)
    assert code == 1 and failed(result) == {"files"} and "model.safetensors differ" in said
    as_made(again, "fp8")
    code, result, said = evaluate(again, "fp8", sys.executable)
    assert code == 1 and "divergence" in failed(result), said


def half_trained(folder: Path, model: Path) -> None:
    """The weights halfway between the base and the merged model, in the merged model's files."""
    base = load_file(folder / "config" / "demo" / "base" / "model.safetensors")

    def change(tensors: dict) -> None:
        for name, tensor in tensors.items():
            tensors[name] = ((tensor.float() + base[name].float()) / 2).to(tensor.dtype)

    change_tensors(model, change)


@pytest.fixture(scope="module")
def gguf(demo, export_python, tmp_path_factory) -> Path:  # noqa: F811
    """A copy of the demo with GGUFs of it."""
    folder = tmp_path_factory.mktemp("gguf") / "demo"
    shutil.copytree(demo, folder, copy_function=shutil.copy2)
    for format in ("gguf-bf16", "gguf-q8_0", "adapter-gguf"):
        export(folder, format, export_python)
    return folder


def export(folder: Path, format: str, python: str) -> None:
    to = f"{RUN}/exports/{format}"
    command = [python, "scripts/export_gguf.py", "--run", "demo", "--format", format, "--base", "config/demo/base"]
    command += ["--adapter", f"{RUN}/adapter", "--merged", f"{RUN}/merged", "--merge", f"{RUN}/merge.json"]
    command += ["--template", f"{RUN}/tokens/chat_template.jinja", "--report", f"{RUN}/tokens/report.json"]
    command += ["--model", f"{to}/model", "--made", f"{to}/made.json"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


@pytest.fixture
def changed(gguf, tmp_path) -> Path:
    """A copy of it, for a test that changes something."""
    return Path(shutil.copytree(gguf, tmp_path / "demo", copy_function=shutil.copy2))


@pytest.mark.slow
@pytest.mark.parametrize(("format", "bound"), [("gguf-bf16", 5e-5), ("gguf-q8_0", 5e-4)])
def test_a_gguf_of_the_demo_is_the_model_that_was_measured(format, bound, changed, export_python):  # noqa: F811
    code, result, said = evaluate(changed, format, export_python)
    assert code == 0, said
    told = {name for name, passed in result["checks"].items() if passed is None}
    assert told == {"likelihood", "wrong_model"}
    assert 0 < result["kl"]["mean_kl"] < bound <= FORMATS[format].kl_limit
    assert_as_tuned(changed, format, "likelihood.jsonl", "answers.jsonl", "general.jsonl")


@pytest.mark.slow
def test_an_adapter_is_applied_by_the_server_and_has_no_divergence(changed, export_python):  # noqa: F811
    code, result, said = evaluate(changed, "adapter-gguf", export_python)
    assert code == 0, said
    assert result["kl"] is result["kl_limit"] is None and "adapter" in result["why_no_kl"]
    assert_as_tuned(changed, "adapter-gguf", "answers.jsonl")
    for name in ("likelihood.jsonl", "general.jsonl"):
        assert (changed / RUN / "exports" / "adapter-gguf" / name).read_text() == ""


def another_run(folder: Path, python: str) -> None:
    kept = folder / RUN / "kept"
    shutil.copytree(folder / RUN / "merged", kept)
    half_trained(folder, folder / RUN / "merged")
    merge = read_json(folder / RUN / "merge.json")
    files = sha256_folder(folder / RUN / "merged", but=("metadata.json", "README.md"))
    write_json(folder / RUN / "merge.json", {**merge, "files": files})
    shutil.rmtree(folder / RUN / "exports" / "gguf-q8_0")
    export(folder, "gguf-q8_0", python)
    write_json(folder / RUN / "merge.json", merge)
    shutil.rmtree(folder / RUN / "merged")
    kept.rename(folder / RUN / "merged")


def rewrite(folder: Path, change) -> None:
    path = folder / RUN / "exports" / "gguf-q8_0" / "model" / "demo-Q8_0.gguf"
    path.write_bytes(change(path.read_bytes()))


def another_template(folder: Path, python: str) -> None:
    """One character of it."""

    def change(data: bytes) -> bytes:
        before, prompt, after = data.partition(b"<|im_start|>assistant")
        assert prompt
        return before + b"<|im_start|>assistent" + after

    rewrite(folder, change)


def no_stop_token(folder: Path, python: str) -> None:
    """The token that ends an answer has another name, and the header another one for it: llama.cpp would know this one by its
    name alone."""

    def change(data: bytes) -> bytes:
        data = data.replace(b"<|im_end|>", b"<|im_enx|>")
        key = b"tokenizer.ggml.eos_token_id"
        at = data.index(key) + len(key) + 4  # after its type
        assert struct.unpack_from("<I", data, at) == (2,)
        return data[:at] + struct.pack("<I", 0) + data[at + 4 :]

    rewrite(folder, change)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "check"),
    [(another_run, "divergence"), (another_template, "prompt_tokens"), (no_stop_token, "stop_reasons")],
)
def test_what_is_not_what_was_measured_is_caught(change, check, changed, export_python):  # noqa: F811
    change(changed, export_python)
    as_made(changed, "gguf-q8_0")  # its files are not the reason
    code, result, said = evaluate(changed, "gguf-q8_0", export_python)
    assert code == 1 and result["checks"]["files"] and check in failed(result), said
    if check != "divergence":
        assert result["checks"]["divergence"]  # the weights are the same


@pytest.mark.slow
def test_a_gguf_that_was_changed_after_it_was_made_is_not_even_read(changed, export_python):  # noqa: F811
    rewrite(changed, lambda data: data[: len(data) // 2])
    code, result, said = evaluate(changed, "gguf-q8_0", export_python)
    assert code == 1 and result["checks"] == {"files": False} and "demo-Q8_0.gguf differ" in said
