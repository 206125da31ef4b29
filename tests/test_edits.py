"""An edit reruns the stages that it can change, and no others."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import yaml
from configs import MEASURED
from workflow import FOLDERS, edit_config, planned, set_key, snakemake

TARGET = "results/demo/metrics.json"
# What it takes to get there with a local model and local rows.


def reorder(folder: Path) -> None:
    path = folder / "config" / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()), sort_keys=True))


def touch_everything(folder: Path) -> None:
    for path in [folder / "Snakefile", *(file for name in FOLDERS for file in (folder / name).rglob("*"))]:
        os.utime(path)


def append(name: str, text: str = "\n# an edit\n"):
    def change(folder: Path) -> None:
        with (folder / name).open("a") as file:
            file.write(text)

    return change


def checkout_back_and_forth(folder: Path) -> None:
    """What `git checkout` of another branch and back does: the same contents, new times."""
    for name in FOLDERS:
        shutil.copytree(folder / name, folder / f"{name}.other", copy_function=shutil.copy)
        shutil.rmtree(folder / name)
        (folder / f"{name}.other").rename(folder / name)


PROMPT = {"id": "more", "prompt": "What is the capital of Italy?", "expect": {"contains": "Rome"}}
OF_ROWS = {"prepare", "contamination"}
AFTER_FINETUNE = {"finetune", "merge", "evaluate_tuned", "score"}


def put_older(name):
    """Another file of the same size, with a time of long ago, as cp -p and rsync -a leave it."""

    def edit(folder):
        path = folder / name
        content = path.read_bytes()
        path.write_bytes(content[:-2000] + content[-2000:].swapcase())
        os.utime(path, (0, 0))

    return edit


EDITS = {
    "nothing": (lambda folder: None, set()),
    "touch everything": (touch_everything, set()),
    "reorder the config's keys": (reorder, set()),
    "git checkout back and forth": (checkout_back_and_forth, set()),
    "a comment in the config": (append("config/config.yaml"), set()),
    "a setting of another run": (set_key("lora", "r", value=64), set()),
    "another dataset": (set_key("datasets", "other", value={"source": "other.jsonl"}), set()),
    "the learning rate": (set_key("runs", "demo", "train", "learning_rate", value=1e-3), AFTER_FINETUNE),
    "how often it logs": (set_key("runs", "demo", "train", "logging_steps", value=5), AFTER_FINETUNE),
    "the rank": (set_key("runs", "demo", "lora", "r", value=16), {"plan", *AFTER_FINETUNE}),
    "an eval prompt": (
        set_key("runs", "demo", "eval", "prompts", value=[PROMPT]),
        {"contamination", "evaluate_base", "evaluate_tuned", "score"},
    ),
    "what becomes of rows with questions": (
        set_key("runs", "demo", "eval", "contamination", value="drop"),
        {"encode", "plan", "evaluate_base", *AFTER_FINETUNE},
    ),
    "the rank and an eval prompt": (
        lambda folder: (
            set_key("runs", "demo", "lora", "r", value=16)(folder),
            set_key("runs", "demo", "eval", "prompts", value=[PROMPT])(folder),
        ),
        {"contamination", "plan", "evaluate_base", *AFTER_FINETUNE},
    ),
    "the dtype": (
        set_key("runs", "demo", "model", "dtype", value="float16"),
        {"plan", "evaluate_base", *AFTER_FINETUNE},
    ),
    "what an answer is checked for": (set_key("runs", "demo", "eval", "row_expect", value={"json": True}), {"score"}),
    "the level of the intervals": (set_key("eval", "confidence", value=0.9), {"score"}),
    "the languages": (set_key("datasets", "demo", "languages", value=["en", "fr"]), MEASURED - {"inspect_model"}),
    "the longest sequence": (
        set_key("datasets", "demo", "max_length", value=200),
        MEASURED - {"inspect_model", *OF_ROWS},
    ),
    "a row of the data": (
        append("config/demo/data/house_format.jsonl", '{"question": "What?", "answer": "That."}\n'),
        MEASURED - {"inspect_model"},
    ),
    "a file of the base": (append("config/demo/base/generation_config.json", "\n"), MEASURED - OF_ROWS),
    "other weights, older ones": (put_older("config/demo/base/model.safetensors"), MEASURED - OF_ROWS),
    "other rows, older ones": (
        put_older("config/demo/data/house_format.jsonl"),
        MEASURED - {"inspect_model"},
    ),
    "the base's card": (append("config/demo/base/README.md"), set()),
    "the script of a stage": (append("scripts/merge.py"), {"merge", "evaluate_tuned", "score"}),
    "the last script": (append("scripts/score.py"), {"score"}),
    "a module that one stage imports": (append("scripts/moult/measuring/seeds.py"), {"score"}),
    "a module that others import": (append("scripts/moult/model/lora.py"), {"plan", *AFTER_FINETUNE}),
    "a command for people": (append("scripts/tools/print_runtime.py"), set()),
    "training code": (append("scripts/moult/training/trainer.py"), AFTER_FINETUNE),
    "checkpoint code": (append("scripts/moult/training/checkpoints.py"), AFTER_FINETUNE),
    "console code": (append("scripts/moult/run/stage.py"), set()),
    "the code that reads the config": (append("scripts/moult/workflow/config.py"), set()),
    "label code": (append("scripts/moult/data/labels.py"), MEASURED - {"inspect_model", *OF_ROWS}),
    "chat code": (append("scripts/moult/model/chat.py"), MEASURED - {"inspect_model", *OF_ROWS}),
    "the shipped template": (append("config/chat_templates/chatml.jinja"), MEASURED - {"inspect_model", *OF_ROWS}),
    "the base's template": (append("config/demo/base/chat_template.jinja"), MEASURED - OF_ROWS),
    "a new image": (set_key("container", value="containers/moult-train-9.9.9.sif"), MEASURED),
    "the same image elsewhere": (set_key("container", value="/images/moult-train-0.1.0.sif"), set()),
}


@pytest.mark.slow
@pytest.mark.parametrize("edit", EDITS)
def test_what_an_edit_reruns(edit, again):
    change, expected = EDITS[edit]
    time.sleep(0.01)
    change(again)
    found = planned(again, TARGET)
    assert found == expected


@pytest.mark.slow
def test_nothing_runs_twice(again):
    assert "Nothing to be done" in snakemake(again, TARGET)


@pytest.mark.slow
def test_a_variant_shares_tokens_and_the_base_measurement(again):
    set_key("runs", "small", value={"dataset": "demo", "model": {"name": "config/demo/base"}, "lora": {"r": 2}})(again)
    edit_config(again, lambda config: config["runs"]["small"].update(eval=config["runs"]["demo"]["eval"]))
    found = planned(again, "results/small/metrics.json")
    assert found == {"plan", *AFTER_FINETUNE}


# --- an edit reaches the weights --------------------------------------------------------------------------------------

SHORT = "runs: {demo: {train: {max_steps: 10, warmup_steps: 0}}}"


@pytest.mark.slow
def test_an_edit_of_the_training_code_reaches_the_adapter(again):
    """A finished training keeps its checkpoints; those of other code are not taken for the result (of the same steps)."""
    (again / "short.yaml").write_text(SHORT)
    adapter = again / "results/demo/adapter/adapter_model.safetensors"

    def train() -> bytes:
        snakemake(again, "results/demo/adapter.json", "--configfile", "short.yaml")
        return adapter.read_bytes()

    first = train()
    code = again / "scripts/moult/training/arguments.py"
    text = code.read_text()
    edited = text.replace(
        "return SFTConfig(**(train | own))", "return SFTConfig(**(train | own | {'learning_rate': 1e-9}))"
    )
    assert edited != text
    code.write_text(edited)
    second = train()
    assert second != first
    code.write_text(text)
    assert train() == first
    with (again / "scripts/moult/run/stage.py").open("a") as file:
        file.write("\n# an edit that changes no result\n")
    assert "Nothing to be done" in snakemake(again, "results/demo/adapter.json", "--configfile", "short.yaml")


@pytest.mark.slow
def test_rows_with_a_question_of_the_evaluation_leave_a_training_that_is_finished(again):
    """With eval.contamination: drop. Another question that is in no row then trains nothing again."""
    (again / "short.yaml").write_text(SHORT)

    def run(policy: str, *prompts: str) -> tuple[dict, int, bytes]:
        """(what metrics.json says of it, how many sequences train, the adapter)."""
        asked = [{"id": f"p{n}", "prompt": prompt, "expect": {"json": True}} for n, prompt in enumerate(prompts)]
        set_key("runs", "demo", "eval", "prompts", value=asked)(again)
        set_key("runs", "demo", "eval", "contamination", value=policy)(again)
        snakemake(again, TARGET, "--configfile", "short.yaml")
        report = json.loads((again / "results/demo/tokens/report.json").read_text())
        found = json.loads((again / TARGET).read_text())["contamination"]
        adapter = (again / "results/demo/adapter/adapter_model.safetensors").read_bytes()
        return found, report["train"]["sequences"], adapter

    row = json.loads((again / "results/prepared/demo/train.jsonl").read_text().splitlines()[0])
    planted = row["messages"][0]["content"]
    found, whole, _ = run("exclude", planted, "Is it late?")
    assert (found["prompts"], found["training_rows"]) == (["p0"], 1)
    found, left, adapter = run("drop", planted, "Is it late?")
    assert (found["policy"], left) == ("drop", whole - 1)
    log = again / "logs/demo/finetune.log"
    assert "nothing to train" not in log.read_text()
    assert run("drop", planted, "Is it early?")[1:] == (left, adapter)
    assert "nothing to train" in log.read_text()
