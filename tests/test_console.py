"""What a person sees of a run: few lines of Snakemake's, one for each stage with what it found, the results at the end."""

import logging
import re
import subprocess
import sys
import time

import pytest
from workflow import checkout, environment, set_key, snakemake, write_rows

from moult.run.attempt import Attempt
from moult.workflow.console import FewerLines

TARGET = "results/demo/metrics.json"


@pytest.fixture(scope="module")
def shown(watched_demo) -> str:
    """What the demo has printed, without a terminal."""
    return (watched_demo[1] / "console.txt").read_text()


@pytest.mark.slow
def test_the_demo_fits_a_screen(shown):
    """60 lines with those that say how far it is, which come by time: up to four."""
    told_in_time = re.findall(r"^.*\b\d+ of \d+(?:, .*| steps .*)?$|^Slurm does not answer.*$", shown, re.MULTILINE)
    assert len(shown.splitlines()) - len(told_in_time) <= 56, shown


@pytest.mark.slow
def test_what_will_run_is_one_table(shown):
    assert shown.count("Job stats:") == 1
    assert re.search(r"^finetune +1$", shown, re.MULTILINE)


@pytest.mark.slow
def test_each_stage_says_in_one_line_what_it_found(shown):
    for line in (
        r"inspect_model  config/demo/base: 6 files",
        r"prepare        demo: \d+ train, \d+ val, \d+ test rows; dropped: 8 duplicate, .*",
        r"encode         demo: train: \d+ sequences, .*; val: .*",
        r"plan           demo: 200 steps of 8 sequences; .*",
        r"finetune       demo: adapter of step \d+ of 200, validation loss 0\.\d+",
        r"merge          demo: .*28 tensors changed .*",
        r"evaluate_base  demo: 60 sequences measured, 105 questions answered on cpu",
        r"evaluate_tuned demo: 60 sequences measured, 105 questions answered on cpu; merged model against .*: mean KL .*",
        r"score          demo: helped\. .*",
    ):
        assert len(re.findall(rf"^\d\d:\d\d:\d\d {line}$", shown, re.MULTILINE)) == 1, line


@pytest.mark.slow
def test_no_settings_and_commands_and_the_results_at_the_end(shown):
    assert "--settings" not in shown and "python scripts" not in shown
    end = shown[shown.index("\ndemo: HELPED\n") :]
    assert "perplexity" in end and "Complete log(s)" in end


@pytest.mark.slow
def test_the_log_of_snakemake_has_what_the_console_leaves_out(demo):
    text = "".join(path.read_text() for path in (demo / ".snakemake" / "log").glob("*.log"))
    assert "localrule finetune:" in text and "reason: Missing output files: results/demo/" in text


@pytest.mark.slow
def test_a_dry_run_is_one_table_and_says_why(again):
    set_key("runs", "demo", "train", "learning_rate", value=1e-3)(again)
    output = snakemake(again, "-n", TARGET)
    assert output.count("Job stats:") == 1 and len(output.splitlines()) < 25
    assert re.search(r"params have changed since last execution:\n +finetune$", output, re.MULTILINE)
    assert "rule finetune" not in output and "rerun-triggers" not in output


@pytest.mark.slow
def test_commands_are_printed_on_request(again):
    for arguments in (("-n", "-p"), ("-p",)):
        output = snakemake(again, *arguments, "--forcerun", "score", "--", TARGET)
        assert re.search(r"^(local)?rule score:\n +input: .*", output, re.MULTILINE)
        assert "python scripts/score.py --settings '{" in output
        assert "reason: Forced execution" in output


@pytest.mark.slow
def test_it_says_when_there_is_nothing_to_do(again):
    assert len(snakemake(again, TARGET).splitlines()) < 6


@pytest.mark.slow
def test_errors_are_whole(tmp_path):
    """Of a stage: its message, Snakemake's own, and the table. Of what is not a stage, too: here Python does not start it."""
    folder = checkout(tmp_path)
    write_rows(folder, [])
    (folder / "mine.yaml").write_text(
        "model: {name: config/demo/base}\ndatasets: {d: {source: rows.jsonl}, demo: null}\n"
    )
    output = snakemake(folder, "results/d/plan.json", "--configfile", "mine.yaml", code=1)
    assert re.search(r"^\d\d:\d\d:\d\d prepare +d: prepare failed: rows\.jsonl: no rows$", output, re.MULTILINE)
    assert "Error in rule prepare:" in output and "log: logs/d/prepare.log (check log file(s)" in output
    assert "\n1 stage has failed:\n" in output
    (folder / "scripts" / "prepare.py").write_text("import nothing_of_that_name\n")
    output = snakemake(folder, "results/prepared/demo/val.jsonl", code=1)
    assert "No module named 'nothing_of_that_name'" in output and "Error in rule prepare:" in output


@pytest.mark.slow
def test_another_workflow_keeps_its_own_console(tmp_path):
    ours = checkout(tmp_path / "moult")
    (tmp_path / "Snakefile").write_text(
        f"""
module moult:
    snakefile: {str(ours / "Snakefile")!r}
    config: {{"model": {{"name": "config/demo/base"}}, "datasets": {{"d": {{"source": "rows.jsonl"}}}}}}

use rule * from moult as moult_*

rule other:
    output: "other.txt"
    shell: "touch {{output}}"
"""
    )
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "other.txt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment(tmp_path), check=True)
    assert "localrule other:" in done.stderr and "Finished jobid" in done.stderr


# --- the filter -------------------------------------------------------------------------------------------------------


@pytest.fixture
def said() -> list[str]:
    return []


def record(event: str | None = None, message: str | None = None, **fields) -> logging.LogRecord:
    made = logging.LogRecord("snakemake", logging.INFO, "", 0, message, None, None)
    made.__dict__.update(fields, **({"event": event} if event else {}))
    return made


def job(number: int, log: str, local: bool) -> logging.LogRecord:
    return record("job_info", jobid=number, log=[log], local=local)


def test_what_a_stage_found_elsewhere_is_said_when_its_job_is_done(tmp_path, said):
    """On Slurm. The last attempt counts, and of several processes the first."""
    lines = FewerLines(False, said.append)
    log = str(tmp_path / "logs/d/finetune.log")
    for number, rank in enumerate((0, 0, 1)):
        attempt = Attempt(stage="finetune", log=log, rank=rank, outcome="done", what=f"attempt {number}")
        (tmp_path / "logs/d/attempts").mkdir(parents=True, exist_ok=True)
        attempt.write(tmp_path / f"logs/d/attempts/finetune-{number}.json")
        time.sleep(0.01)
    assert not lines.filter(job(1, log, local=False)) and not lines.filter(job(2, log, local=True))
    assert not lines.filter(record("job_finished", "Finished jobid: 2", job_id=2)) and said == []
    assert not lines.filter(record("job_finished", "Finished jobid: 1", job_id=1))
    assert [line[9:] for line in said] == ["finetune       d: attempt 1"]


def test_a_job_without_a_record_says_nothing(tmp_path, said):
    lines = FewerLines(False, said.append)
    lines.filter(job(1, str(tmp_path / "logs/d/x.log"), local=False))
    assert not lines.filter(record("job_finished", job_id=1)) and said == []


def test_how_far_it_is_is_said_ever_more_rarely_and_at_the_end(monkeypatch, said):
    """A job ends every ten seconds."""
    now = 0.0
    monkeypatch.setattr("moult.workflow.console.time.monotonic", lambda: now)
    lines, shown = FewerLines(False, said.append), []
    for done in range(1, 301):
        now = 10.0 * done
        if lines.filter(record("progress", done=done, total=300)):
            shown.append(done)
    assert shown == [6, 18, 42, 90, 150, 210, 270, 300]


def test_errors_warnings_and_what_is_not_known_are_shown(said):
    lines = FewerLines(False, said.append)
    for event in ("job_error", "group_error", "error", "shellcmd", "new_in_snakemake_10"):
        assert lines.filter(record(event, "text"))
    for text in ("Job 1 has been submitted with SLURM jobid 7 (log: x).", "Nothing to be done", None):
        assert lines.filter(record(None, text))
