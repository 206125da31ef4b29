"""The demo on a base of 4 bits: from the plan to the verdict, also when it is killed on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from workflow import edit_config, environment, hear_sigint, snakemake

from moult.files import read_json

RUN = "results/demo-nf4"


def add_run(config: dict) -> None:
    demo = config["runs"]["demo"]
    config["runs"]["demo-nf4"] = {**demo, "dataset": "demo", "model": {**demo["model"], "quantization": "nf4"}}


@pytest.mark.slow
def test_qlora_teaches_the_demo_and_says_what_it_has_cost(again):
    edit_config(again, add_run)
    adapter = again / RUN / "adapter" / "adapter_model.safetensors"
    snakemake(again, f"{RUN}/metrics.json")
    metrics, undisturbed = read_json(again / RUN / "metrics.json"), adapter.read_bytes()
    assert metrics["verdict"]["verdict"] == "helped"
    assert metrics["answers"]["rows"]["passed"]["tuned"]["value"] >= 0.8
    assert metrics["merged_vs_adapter"]["mean_kl"] < 1e-4
    cost = metrics["quantization"]
    assert cost["kind"] == "nf4"
    assert metrics["merged_vs_adapter"]["mean_kl"] < cost["trained_vs_merged"]["mean_kl"] < 0.01
    assert cost["trained_vs_merged"]["mean_kl"] < cost["base_vs_quantized"]["mean_kl"] < 0.1
    assert cost["nll_per_token"] is None  # finetune has measured val, and score test
    assert metrics["provenance"]["training"]["quantization"] == "nf4"
    # The tokens and the base's measurement are those of the run that is not quantized.
    assert not (again / RUN / "base").exists()

    shutil.rmtree(again / RUN)
    kill_in_training(again)
    assert not adapter.exists()
    snakemake(again, f"{RUN}/adapter.json")
    assert "continuing from" in (again / "logs" / "demo-nf4" / "finetune.log").read_text()
    assert adapter.read_bytes() == undisturbed


def kill_in_training(folder) -> None:
    """Start the run, and end it and all its processes when half is trained."""
    command = [sys.executable, "-m", "snakemake", "--cores", "1", f"{RUN}/adapter.json"]
    how = {"cwd": folder, "env": environment(folder), "start_new_session": True, "preexec_fn": hear_sigint}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **how)
    log, deadline = folder / RUN / "trainer_state" / "training_log.jsonl", time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        lines = log.read_text().splitlines() if log.exists() else []
        if any(json.loads(line)["step"] >= 100 for line in lines if line.endswith("}")):
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
