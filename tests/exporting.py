"""What the tests of the exports share."""

import shutil
from argparse import Namespace
from pathlib import Path

import pytest
from planning import Log
from scoring import EVAL, make_sides, run

import score_export
from moult.files import read_json, read_jsonl, sha256_file, write_json, write_jsonl
from moult.workflow.exports import FORMATS, GGUF

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv-export" / "bin" / "python"


@pytest.fixture(scope="session")
def export_python() -> str:
    """The Python of the environment of the exports."""
    if not PYTHON.exists():
        pytest.skip("the environment of the exports is not there: make export-env")
    return str(PYTHON)


# --- made-up exports --------------------------------------------------------------------------------------------------

NO_KL = "this engine tells no probabilities"


def files_of(format: str) -> dict[str, str]:
    """{name: content}, as the stages name them."""
    if format == "adapter-gguf":
        modelfile = "FROM ./base-BF16.gguf\nADAPTER ./demo-adapter.gguf\n"
        return {"demo-adapter.gguf": "GGUF adapter", "base-BF16.gguf": "GGUF base", "Modelfile": modelfile}
    if format in GGUF:
        name = f"demo-{FORMATS[format].shown}.gguf"
        return {name: "GGUF weights", "Modelfile": f"FROM ./{name}\nPARAMETER num_ctx 512\n"}
    return {"model.safetensors": "weights", "config.json": "{}"}


def make_export(folder: Path, format: str = "gguf-q8_0", lost: float = 0.0, wrong: int = 0, **sides) -> Path:
    """A run (scoring.make_sides) with metrics.json, and an export of it that predicts the rows worse by `lost` nats per token,
    give or take, and fails the first `wrong` rows. Returns the folder of the export."""
    if not (folder / "metrics.json").exists():
        make_sides(folder, **sides)
        run(folder)
    write_json(folder / "merge.json", {**read_json(folder / "merge.json"), "files": {"model.safetensors": "m"}})
    (folder / "merged").mkdir(exist_ok=True)
    (folder / "merged" / "model.safetensors").write_bytes(b"x" * 1000)
    out = folder / "exports" / format
    shutil.copytree(folder / "tuned", out)
    rows = list(read_jsonl(out / "likelihood.jsonl"))
    for place, row in enumerate(rows):
        row["nll"] += row["tokens"] * lost * (0.8 + 0.1 * (place % 5))
    write_jsonl(out / "likelihood.jsonl", rows)
    answers = list(read_jsonl(out / "answers.jsonl"))
    for answer in [answer for answer in answers if answer["kind"] == "row"][:wrong]:
        answer["answer"] = "nothing"
    write_jsonl(out / "answers.jsonl", answers)
    (out / "model").mkdir()
    for name, content in files_of(format).items():
        (out / "model" / name).write_text(content)
    files = {path.name: sha256_file(path) for path in (out / "model").iterdir()}
    made = {"files": files, "bytes": 530, "tensors": {"Q8_0": 32, "F32": 13}}
    made |= {"fallback": 0, "calibration": None, "ollama": {"kept": True}, "versions": {"llama.cpp": "b1"}}
    write_json(out / "made.json", made)
    kl = {"mean_kl": 3.9e-5, "max_kl": 1e-3, "top1_agreement": 1.0, "rows": 8, "positions": 50}
    check = {"kl": kl, "kl_limit": 0.005, "why_no_kl": None, "speed": {"tokens_per_second": 120.0}, "device": "cpu"}
    check["engine"] = "llama.cpp"
    check |= {
        "checks": {"ready": {"passed": True, "why": ""}, "likelihood": {"passed": None, "why": ""}},
        "versions": {},
    }
    write_json(out / "check.json", check)
    return out


def without_likelihood(out: Path) -> None:
    """As an engine writes it that tells no probabilities."""
    for name in ("likelihood.jsonl", "general.jsonl"):
        (out / name).write_text("")
    write_json(out / "check.json", {**read_json(out / "check.json"), "kl": None, "kl_limit": None, "why_no_kl": NO_KL})


def judge(out: Path, log=None, **settings) -> dict:
    """export.json, as score_export writes it."""
    folder = out.parents[1]
    arguments = {name: str(folder / name) for name in ("base", "tuned", "merged")}
    arguments |= {name: str(folder / f"{name}.json") for name in ("merge", "metrics")}
    arguments |= {name: str(out / f"{name}.json") for name in ("made", "check")}
    arguments |= {"run": "demo", "format": out.name, "export": str(out), "out": str(out / "export.json")}
    score_export.score_export({"eval": {**EVAL, **settings}, "seed": 0}, Namespace(**arguments), log or Log())
    return read_json(out / "export.json")
