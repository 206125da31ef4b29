"""The whole DAG on the demo: what it makes, what an edit reruns, and what it costs to look at."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from configs import MEASURED
from workflow import ROOT, checkout, hear_sigint, measured, snakemake, write_rows

HEAVY = {"torch", "transformers", "datasets", "pandas", "numpy", "pyarrow", "tqdm", "jsonschema", "yaml"}


TARGET = "results/demo/metrics.json"


# --- the demo ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_demo_teaches_something(demo):
    metrics = json.loads((demo / TARGET).read_text())
    assert metrics["verdict"]["verdict"] == "helped"
    rows = metrics["answers"]["rows"]
    assert rows["checks"]["json"]["base"]["value"] == 0.0 and rows["checks"]["json"]["tuned"]["value"] >= 0.95
    assert rows["passed"]["tuned"]["value"] >= 0.8
    assert metrics["answers"]["prompts"]["passed"]["base"]["value"] == 0.0
    assert metrics["answers"]["prompts"]["passed"]["tuned"]["value"] >= 0.7
    likelihood = metrics["likelihood"]
    assert likelihood["base"]["perplexity"]["value"] > 100 * likelihood["tuned"]["perplexity"]["value"]
    assert metrics["merged_vs_adapter"]["mean_kl"] < 1e-4


@pytest.mark.slow
def test_everything_that_the_design_promises_is_there(demo):
    results = demo / "results"
    for path in (
        *(
            "prepared/demo/train.jsonl",
            "prepared/demo/val.jsonl",
            "prepared/demo/test.jsonl",
            "prepared/demo/metadata.json",
        ),
        *(
            "demo/tokens/report.json",
            "demo/tokens/preview.html",
            "demo/tokens/preview.json",
            "demo/plan.json",
            "demo/adapter/adapter_model.safetensors",
        ),
        *("demo/trainer_state/fingerprint.json", "demo/training_log.jsonl", "demo/merged/model.safetensors"),
        *("demo/merged/metadata.json", "demo/samples.jsonl", "demo/base/answers.jsonl", "demo/tuned/likelihood.jsonl"),
    ):
        assert (results / path).stat().st_size > 0, path
    logs = {path.stem for path in (demo / "logs" / "demo").glob("*.log")}
    assert logs == MEASURED - {"inspect_model"}
    for stage in logs:
        assert json.loads((demo / "benchmarks" / "demo" / f"{stage}.jsonl").read_text())["s"] > 0
    ledger = json.loads((results / "prepared/demo/metadata.json").read_text())["ledger"]
    assert ledger["read"] == ledger["kept"] + sum(ledger["dropped"].values()) == 815
    assert ledger["dropped"]["duplicate"] == 8 and ledger["dropped"]["empty"] == 3
    assert sum(count for reason, count in ledger["dropped"].items() if reason.startswith("language_")) == 84


@pytest.mark.slow
def test_no_path_of_this_machine_in_what_is_published(demo):
    for folder in ("adapter", "merged"):
        for path in (demo / "results" / "demo" / folder).rglob("*"):
            if path.suffix in (".json", ".jinja", ".txt"):
                assert str(demo) not in path.read_text(), path
    assert str(demo) not in (demo / TARGET).read_text()


@pytest.mark.slow
def test_the_result_is_a_model_that_transformers_loads_and_that_answers(demo):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = demo / "results" / "demo" / "merged"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    messages = [{"role": "user", "content": "What is the capital of Japan?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = tokenizer.decode(
        model.generate(**prompt, max_new_tokens=30)[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert json.loads(answer) == {"answer": "Tokyo"}


# --- killed -----------------------------------------------------------------------------------------------------------


def processes_in(folder: Path) -> list[int]:
    """Processes whose working directory is `folder`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve() == folder.resolve() and (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="needs /proc")
@pytest.mark.parametrize("how", ["killed", "Ctrl-C"])
def test_an_ended_snakemake_leaves_no_trainer_and_the_same_command_goes_on(how, demo, tmp_path):
    folder = checkout(tmp_path)
    command = [sys.executable, "-m", "snakemake", "--cores", "1", TARGET]
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=hear_sigint,
    )
    log = folder / "results" / "demo" / "trainer_state" / "training_log.jsonl"
    while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < 4):
        time.sleep(0.1)
    if how == "killed":
        process.kill()
    else:  # a terminal sends it to the whole group
        os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=120) != 0
    assert bool(list((folder / ".snakemake" / "locks").glob("*"))) == (how == "killed")
    deadline = time.monotonic() + 30
    while processes_in(folder) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes_in(folder) == []
    output = snakemake(folder, TARGET)
    assert "continuing from" in output
    assert measured(folder) == measured(demo)
    for path in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        assert (folder / "results" / "demo" / path).read_bytes() == (demo / "results" / "demo" / path).read_bytes(), (
            path
        )


@pytest.mark.slow
def test_a_lock_of_a_snakemake_that_is_alive_stays(tmp_path):
    """Another one in the folder keeps its lock: ours is shared, and taken off only when it can be had alone."""
    import fcntl

    folder = checkout(tmp_path)
    (folder / ".snakemake" / "locks").mkdir(parents=True)
    (folder / ".snakemake" / "locks" / "0.output.lock").write_text("results/demo/metrics.json\n")
    with (folder / ".snakemake" / "moult.lock").open("a") as alive:
        fcntl.flock(alive, fcntl.LOCK_SH)
        assert "Directory cannot be locked" in snakemake(folder, TARGET, code=1)
    (folder / ".snakemake" / "moult.lock").write_text("another machine")
    assert "Directory cannot be locked" in snakemake(folder, TARGET, code=1)
    (folder / ".snakemake" / "moult.lock").write_text(os.uname().nodename)
    shutil.rmtree(folder / "config" / "demo" / "data")  # it gets past the lock, and stops at the missing file
    assert "Directory cannot be locked" not in snakemake(folder, TARGET, code=1)


# --- looking at it ----------------------------------------------------------------------------------------------------


def test_a_printed_command_runs_by_hand(again):
    output = snakemake(again, "-n", "-p", "--forcerun", "score", "--", TARGET)
    command = output[output.index("python scripts/score.py") :].split("\n\n")[0]
    command = re.split(r"\n(?=\S)", command)[0]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    before = (again / TARGET).read_bytes()
    done = subprocess.run(["bash", "-c", command], cwd=again, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert (again / TARGET).read_bytes() == before


def test_graphs_are_clean_on_standard_output(again):
    for flag in ("--dag", "--rulegraph"):
        command = [sys.executable, "-m", "snakemake", TARGET, flag]
        done = subprocess.run(command, cwd=again, capture_output=True, text=True, check=True)
        assert done.stdout.startswith("digraph") and done.stdout.rstrip().endswith("}")


@pytest.mark.slow
def test_a_thousand_datasets_are_planned_in_seconds_and_import_nothing_heavy(tmp_path):
    folder = checkout(tmp_path)
    many = {f"d{index}": {"source": "config/demo/data/house_format.jsonl"} for index in range(1000)}
    (folder / "many.yaml").write_text(
        yaml.safe_dump({"model": {"name": "config/demo/base"}, "datasets": {**many, "demo": None}})
    )
    # pandas (with pyarrow) is the Slurm plugin's, for its report, which Snakemake imports at each start.
    ours = HEAVY - {"numpy", "jsonschema", "yaml", "tqdm", "pandas", "pyarrow"}
    spy = "import sys, runpy\nsys.argv[0] = 'snakemake'\ntry:\n    runpy.run_module('snakemake', run_name='__main__')\n"
    spy += f"finally:\n    print('HEAVY', sorted({ours!r} & set(sys.modules)))"
    command = [sys.executable, "-c", spy, "-n", "--cores", "1", "--configfile", "many.yaml"]
    started = time.monotonic()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stderr[-3000:]
    assert "HEAVY []" in done.stdout
    # No timed assertion: the figure is printed (pytest -s), and the job table says that all were planned.
    print(f"dry run over 1,000 datasets: {seconds:.1f} s")
    assert re.search(r"^finetune +1000$", done.stdout + done.stderr, re.MULTILINE)


@pytest.mark.parametrize("script", sorted(path.stem for path in (ROOT / "scripts").glob("*.py")))
def test_help_answers_without_heavy_imports(script):
    command = [sys.executable, "-X", "importtime", str(ROOT / "scripts" / f"{script}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {script}.py"), done.stdout + done.stderr
    imported = set(re.findall(r"\| +(\w+)$", done.stderr, re.MULTILINE))
    assert "argparse" in imported and not imported & HEAVY


# --- elsewhere --------------------------------------------------------------------------------------------------------


def test_as_a_module_all_stages_agree_on_where_the_results_are(tmp_path):
    ours = checkout(tmp_path / "moult")
    (tmp_path / "Snakefile").write_text(
        f"""
module moult:
    snakefile: {str(ours / "Snakefile")!r}
    config: {{"model": {{"name": "a/model"}}, "datasets": {{"d": {{"source": "a/dataset"}}}}}}
    pathvars:
        results="out/tuned",
        logs="out/logs",

use rule * from moult as moult_*
"""
    )
    output = snakemake(tmp_path, "-n", "-p", "out/tuned/d/metrics.json")
    assert re.search(r"^moult_finetune +1$", output, re.MULTILINE)
    assert '"path":"out/tuned/datasets/a--dataset--train' in output
    assert "results/" not in output.replace("out/tuned/", "")


@pytest.mark.slow
def test_as_a_module_in_another_folder_it_gives_a_verdict(tmp_path):
    """tests/module, as it stands there."""
    ours, theirs = checkout(tmp_path / "moult"), tmp_path / "theirs"
    shutil.copytree(ROOT / "tests/module", theirs)
    snakemake(theirs)
    assert (theirs / "verdict.txt").read_text() in ("helped\n", "hurt\n", "inconclusive\n")
    assert "verdict" in json.loads((theirs / "tuned/capitals/metrics.json").read_text())
    assert not (ours / "results").exists() and not (ours / "logs").exists()
    assert "Nothing to be done" in snakemake(theirs)
    write_rows(theirs, [])
    broken = yaml.safe_load((theirs / "config.yaml").read_text())
    broken["moult"]["datasets"]["empty"] = {"source": "rows.jsonl"}
    (theirs / "config.yaml").write_text(yaml.safe_dump(broken))
    assert re.search(
        r"^empty +prepare +rows\.jsonl: no rows$", snakemake(theirs, "tuned/empty/plan.json", code=1), re.MULTILINE
    )


def test_as_a_module_a_new_run_changes_no_old_one(tmp_path):
    ours = checkout(tmp_path / "moult")
    runs = {name: {"dataset": "d", "model": {"name": "a/model", "revision": "v2"}} for name in ("new", "old")}
    config = {"model": {"name": "a/model"}, "datasets": {"d": {"source": "a/dataset"}}, "runs": runs}
    (tmp_path / "Snakefile").write_text(
        f"""
module moult:
    snakefile: {str(ours / "Snakefile")!r}
    config: {config!r}
    pathvars:
        results="out/tuned",

use rule * from moult as moult_*
"""
    )
    made = tmp_path / "out/tuned/old/tokens/report.json"
    made.parent.mkdir(parents=True)
    made.touch()
    output = snakemake(tmp_path, "-n", "-p", "out/tuned/new/plan.json")
    assert "--tokens out/tuned/old/tokens" in output
    (made.parent.parent / "adapter").symlink_to(ours)
    assert "outside of out/tuned" in snakemake(tmp_path, "-n", "out/tuned/new/plan.json", code=1)


def test_failures_are_told_again_wherever_the_logs_are(tmp_path):
    folder = checkout(tmp_path)
    write_rows(folder, [])
    config = {"model": {"name": "config/demo/base"}, "datasets": {"d": {"source": "rows.jsonl"}}}
    (folder / "mine.yaml").write_text(yaml.safe_dump({**config, "pathvars": {"logs": "elsewhere"}}))
    output = snakemake(folder, "results/d/plan.json", "--configfile", "mine.yaml", code=1)
    assert re.search(r"^d +prepare +rows\.jsonl: no rows$", output, re.MULTILINE)
    assert "log: elsewhere/d/prepare.log" in output


@pytest.mark.slow
def test_no_two_stages_use_the_one_gpu_at_a_time(again):
    """The README's --resources gpu=1, and that of profiles/local. Without it evaluate_base and finetune run side by side."""
    output = snakemake(
        again,
        TARGET,
        "-p",
        "--resources",
        "gpu=1",
        "--forcerun",
        "evaluate_base",
        "finetune",
        "--until",
        "finetune",
        "evaluate_base",
        cores=8,
    )
    events = re.findall(
        r"^(?:local)?rule (evaluate_base|finetune):|^Finished jobid: \d+ \(Rule: (evaluate_base|finetune)\)",
        output,
        re.MULTILINE,
    )
    order = [begun or f"/{ended}" for begun, ended in events]
    assert order in (
        ["finetune", "/finetune", "evaluate_base", "/evaluate_base"],
        ["evaluate_base", "/evaluate_base", "finetune", "/finetune"],
    )


# --- bad input, as a user meets it ------------------------------------------------------------------------------------


def test_several_gpus_are_a_process_each_which_get_the_time_to_save(tmp_path):
    """torchrun kills 30 s after a signal, if nothing else is said."""
    folder = checkout(tmp_path)
    (folder / "two.yaml").write_text("runs: {demo: {train: {gpu: 2}}}")
    command = snakemake(folder, "-n", "-p", "results/demo/adapter.json", "--configfile", "two.yaml")
    patience = "--shutdown-timeout ${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}"
    assert f"torchrun --standalone --nproc-per-node 2 {patience} scripts/finetune.py" in command


GOOD = [{"prompt": f"How many is {n} and {n}, please tell me?", "completion": f"It is {2 * n}."} for n in range(40)]


@pytest.mark.slow
def test_plan_tells_the_problems_of_all_runs_in_one_table(tmp_path):
    folder = checkout(tmp_path)
    write_rows(folder, GOOD)
    write_rows(folder, [*GOOD, '{"prompt": '], "cut.jsonl")
    config = {
        "model": {"name": "config/demo/base"},
        "datasets": {
            "demo": None,
            "d": {"source": "rows.jsonl"},
            "cut": {"source": "cut.jsonl"},
            "short": {"source": "rows.jsonl", "max_length": 8},
            "gone": {"source": "gone.jsonl"},
        },
        "runs": {
            "cut-r64": {"dataset": "cut", "lora": {"r": 64}},
            "bad": {"dataset": "d", "lora": {"target_modules": ["nope"]}, "train": {"warmup_steps": 99}},
        },
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(config))
    output = snakemake(folder, "plans", "--configfile", "mine.yaml", code=1)
    table = output[output.index("4 stages have failed:") :]
    for row in (
        r"^bad +plan +2 problems:\n",
        r"^cut, cut-r64 +prepare +cut.jsonl:41: not JSON: .*\n(.*\n)? +-> fix that line\n +log: logs/cut/prepare.log",
        r"^gone +prepare +gone.jsonl: no such file or folder\n",
        r"^short +encode +all 33 train sequences are longer than max_length 8\n",
    ):
        assert re.search(row, table, re.MULTILINE), table
    assert (folder / "results/d/plan.json").exists()
    for name in ("cut", "short", "gone"):
        del config["datasets"][name]
    config["runs"] = {"d-r4": {"dataset": "d", "lora": {"r": 4}}}
    (folder / "mine.yaml").write_text(yaml.safe_dump(config))
    output = snakemake(folder, "plans", "--configfile", "mine.yaml")
    assert re.search(r"^run +steps.*serve\nd +\d.*merged\nd-r4 +\d.*merged$", output, re.MULTILINE), output
    assert re.search(r"^disk: [\d.]+ GB for all runs, and [\d.]+ GB are free$", output, re.MULTILINE), output


@pytest.mark.slow
def test_a_source_that_has_gone_costs_no_rows(again):
    (again / "config/demo/data/house_format.jsonl").unlink()
    output = snakemake(again, TARGET, code=1)
    assert "datasets.demo.source: config/demo/data/house_format.jsonl: no such file or folder" in output
    assert (again / "results/prepared/demo/train.jsonl").exists()


@pytest.mark.slow
def test_a_base_without_a_template_needs_one_named(tmp_path):
    folder = checkout(tmp_path)
    shutil.copytree(folder / "config/demo/base", folder / "plain")
    (folder / "plain" / "chat_template.jinja").unlink()
    write_rows(folder, GOOD)
    config = {"model": {"name": "plain"}, "datasets": {"d": {"source": "rows.jsonl"}}}
    (folder / "mine.yaml").write_text(yaml.safe_dump(config))
    output = snakemake(folder, "results/d/plan.json", "--configfile", "mine.yaml", code=1)
    assert "the tokenizer has no chat template" in output and "model.chat_template: chatml" in output
    config["model"]["chat_template"] = "chatml"
    (folder / "mine.yaml").write_text(yaml.safe_dump(config))
    snakemake(folder, "results/d/tokens/report.json", "--configfile", "mine.yaml")


def test_a_typo_in_a_target_fails_at_once(tmp_path):
    output = snakemake(checkout(tmp_path), "-n", "results/dmeo/metrics.json", code=1)
    assert "No rule to produce results/dmeo/metrics.json" in output
