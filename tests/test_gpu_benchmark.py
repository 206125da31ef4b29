"""tests/gpu: the one command for a machine with a GPU, tried out without one."""

import json
import subprocess
import sys
from argparse import Namespace

import pytest
from workflow import ROOT

sys.path.insert(0, str(ROOT / "tests" / "gpu"))

import benchmark
from gpu_figures import BEGIN, END, table, write_into

MACHINE = {
    "cards": ["NVIDIA H100 80GB HBM3, 81559 MiB, 580.65.06, 700.00 W"],
    "device": "cuda",
    "cuda": "13.0",
    "memory": 85_000_000_000,
    "versions": dict.fromkeys(("torch", "transformers", "trl", "peft", "moult"), "1.0"),
}


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Without a process: probes answer with MACHINE."""
    monkeypatch.setattr(benchmark.Bench, "probe", lambda self, *words: MACHINE)
    arguments = {"out": tmp_path / "out", "minutes": 25, "steps": 40, "vllm_python": None, "tiny": False}
    return benchmark.Bench(Namespace(**arguments))


def kept(bench) -> dict:
    return json.loads(bench.result_file.read_text())["cases"]


def test_what_was_found_is_kept_whatever_comes_after(bench):
    def fails():
        raise benchmark.Failed("exit code 1: out of memory\nmore")

    def unfit():
        raise benchmark.Skipped("does not fit: this run needs about 90.0 GB")

    bench.do("good", lambda: {"tokens_per_second": 12_345.6, "mfu": 0.41, "peak_used": 21e9, "predicted": 20e9})
    bench.do("bad", fails)
    bench.do("large", unfit)
    bench.started -= 26 * 60
    bench.do("late", lambda: pytest.fail("no case starts after the time is over"))
    assert {name: case["status"] for name, case in kept(bench).items()} == {
        "good": "done",
        "bad": "failed",
        "large": "skipped",
        "late": "no time",
    }
    text = (bench.out / "result.md").read_text()
    assert "| good | 12,346 | 41% | 20.0 | 21.0 | 1.05 |" in text
    assert "- bad: failed: exit code 1: out of memory\n" in text
    assert text.startswith("NVIDIA H100 80GB HBM3, 81559 MiB, 580.65.06, 700.00 W; CUDA 13.0; torch 1.0, ")


def test_a_case_whose_ground_is_missing_is_skipped(bench):
    for name, case in bench.cases():
        if name not in ("model, small", "model, large", "attention"):
            bench.do(name, case)
    skipped = {case["status"] for case in kept(bench).values()}
    assert skipped == {"skipped"}


def test_a_run_that_cannot_fit_is_skipped(bench, monkeypatch):
    said = "plan failed: this run needs about 90.0 GB on each GPU, and there are 24.0 GB: 16.2 GB for the weights"

    def refuse(self, *words, **more):
        raise benchmark.Failed(said)

    monkeypatch.setattr(benchmark.Bench, "stage", refuse)
    for name in ("model, large", "data"):
        bench.do(name, dict)
    bench.do("plans, large", lambda: bench.make_plans("large"))
    case = next(case for case in benchmark.TRAININGS if case.name == "8 B, packed")
    with pytest.raises(benchmark.Skipped, match=r"this run needs about 90\.0 GB on each GPU, and there are 24\.0 GB"):
        bench.train(case)


def test_every_case_of_the_issue_is_there(bench):
    names = [name for name, _ in bench.cases()]
    assert len(names) == len(set(names))
    assert {case.name for case in benchmark.TRAININGS} <= set(names)
    assert {"attention", "resume", "merge", "evaluate and merge check", "serve", "out of memory"} <= set(names)
    assert {"TRL's own script", "TRL's own script, 8 B"} <= set(names)
    assert {f"validation, {model}, {length}k" for model in ("small", "large") for length in (8, 32)} <= set(names)


def test_the_table_is_written_into_the_page(tmp_path):
    page = tmp_path / "BENCHMARKS.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    result = {"machine": MACHINE, "tiny": False, "cases": {}}
    write_into(page, table(result))
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text and "CUDA 13.0" in text
    own = (ROOT / "BENCHMARKS.md").read_text()
    assert own.count(BEGIN) == own.count(END) == 1


@pytest.mark.slow
def test_the_whole_script_on_a_cpu(tmp_path):
    command = [sys.executable, ROOT / "tests" / "gpu" / "benchmark.py", "--out", tmp_path, "--tiny", "--minutes", "60"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-2000:]
    cases = json.loads((tmp_path / "result.json").read_text())["cases"]
    # On a GPU only.
    assert {name for name, case in cases.items() if case["status"] != "done"} == {"attention", "out of memory"}
    assert cases["resume"]["same_bytes"] and cases["resume"]["exit_code"] == 75
    assert all(passed is not False for passed in cases["serve"]["checks"].values())
    assert cases["evaluate and merge check"]["merge_check"]["mean_kl"] < 0.01
    assert all(case["predicted"] > 0 for name, case in cases.items() if "plan" in case)
