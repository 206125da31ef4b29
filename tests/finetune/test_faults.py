"""finetune, hit at chosen instants: by a signal, by a full disk, by a folder that cannot be written.

tests/torture/ does the same at random instants to the whole workflow.
"""

import functools
import json
import signal
import subprocess
from pathlib import Path

import pytest
from finetuning import Run, settings
from forked import send_at

from moult.files import read_jsonl
from moult.training.throughput import SPEED

pytestmark = pytest.mark.slow


def attempt(run: Run, fault: tuple | None = None, code: int = 0) -> str:
    """Run the stage, with `fault` (see `send_at`) in it; returns what it says."""
    return run.go(code=code, before=fault and functools.partial(send_at, *fault)).stderr


def log_of(run: Run) -> list[dict]:
    rows = read_jsonl(run.folder / "training_log.jsonl")
    return [{key: value for key, value in row.items() if key not in SPEED} for row in rows]


def check_same(run: Run, whole: Run) -> None:
    """The published files are those of the undisturbed run, and nothing half-written is left."""
    assert run.adapter() == whole.adapter()
    assert log_of(run) == log_of(whole)
    state = run.folder / "state"
    assert not list(run.folder.rglob("*.tmp-*"))
    assert {path.name for path in state.iterdir()} == {path.name for path in (whole.folder / "state").iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base, tokens):
    """Undisturbed runs, each made once."""
    made: dict[str, Run] = {}

    def make(config: dict) -> Run:
        key = json.dumps(config, sort_keys=True)
        if key not in made:
            made[key] = Run(tmp_path_factory.mktemp("whole") / "run", config, base, tokens)
            attempt(made[key])
        return made[key]

    return make


# --- a signal ---------------------------------------------------------------------------------------------------------

STOPS = {
    "while the model is loaded": ("moult.model.device:load_model",),
    "while a library is imported": ("transformers.utils.import_utils:_LazyModule._get_module",),
    "during validation": ("moult.training.trainer:likelihood", 2),
    "while a checkpoint is written": ("transformers:Trainer._save_rng_state", 2),
    "while a checkpoint is sealed": ("moult.training.trainer:seal", 2),
    "while the adapter is published": ("moult.model.export:copy_tokenizer",),
}


@pytest.mark.parametrize(
    ("instant", "number"),
    [
        *((instant, signal.SIGTERM) for instant in STOPS),
        ("while the model is loaded", signal.SIGINT),
        ("during validation", signal.SIGUSR2),
    ],
)
def test_a_signal_stops_it_unfinished_and_the_next_attempt_goes_on(instant, number, run, whole):
    target, call = (*STOPS[instant], 1)[:2]
    stopped = run()
    said = attempt(stopped, (target, number, call), code=75)
    assert f"stopped by {number.name}" in said or "finetune terminated" in said
    assert "run the same command again to go on" in said
    assert "Traceback" not in said and not (stopped.folder / "adapter.json").exists()
    attempt(stopped)
    check_same(stopped, whole(settings()))


KILLS = {
    "before the fingerprint is written": ("moult.training.checkpoints:write_json",),
    "between the files of a checkpoint": ("transformers:Trainer._save_optimizer_and_scheduler", 2),
    "before a checkpoint has its manifest": ("moult.training.checkpoints:sha256_folder", 2),
    "before a checkpoint has its name": ("moult.training.checkpoints:write_json", 3, True),
    "before old checkpoints are deleted": ("moult.training.trainer:prune", 4),
    "in the published folder": ("moult.model.export:copy_tokenizer",),
    "between the adapter and its summary": ("moult.model.device:hardware",),
}


@pytest.mark.parametrize("instant", KILLS)
def test_a_kill_at_the_worst_instant(instant, run, whole):
    target, *when = KILLS[instant]
    killed = run()
    attempt(killed, (target, signal.SIGKILL, *when), code=-signal.SIGKILL)
    attempt(killed)
    check_same(killed, whole(settings()))


# --- resume, with what changes the order of rows, the state, or when something is done ----------------------------------

EPOCHS = {"eval_strategy": "epoch", "save_strategy": "epoch"}
KILL, TERM = signal.SIGKILL, signal.SIGTERM

# An epoch has five steps. Name: (train section, signal, step at the end of which it comes)
VARIANTS = {
    "rows grouped by length": ({"train_sampling_strategy": "group_by_length"}, KILL, 8),
    "so, at the end of an epoch": ({"train_sampling_strategy": "group_by_length", "save_steps": 5}, KILL, 11),
    "workers that load rows": ({"dataloader_num_workers": 2}, KILL, 8),
    "packed": ({"packing": True}, KILL, 8),
    "by epoch, killed in one": (EPOCHS, KILL, 8),
    "by epoch, stopped in one": (EPOCHS, TERM, 8),
    "by epoch, stopped at the end of one": (EPOCHS, TERM, 10),
    "by epoch, logged so, too": ({"logging_strategy": "epoch", **EPOCHS}, TERM, 8),
    "validation by epoch, a checkpoint at its last step": ({"eval_strategy": "epoch", "save_steps": 5}, TERM, 10),
    "validation by epoch, killed at its end": ({"eval_strategy": "epoch", "save_steps": 5}, KILL, 11),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_resumes_to_the_same_bytes(variant, run, whole):
    train, number, step = VARIANTS[variant]
    check_resumed(run(settings(**train)), number, step, whole)


def test_dora_resumes_to_the_same_bytes(run, whole):
    config = settings()
    config["lora"] = {**config["lora"], "use_dora": True}
    check_resumed(run(config), KILL, 8, whole)


def check_resumed(stopped: Run, number: int, step: int, whole) -> None:
    fault = ("moult.training.watch:Watch.on_step_end", number, step)
    attempt(stopped, fault, code=75 if number == TERM else -number)
    assert "continuing from" in attempt(stopped)
    (resumed,) = [
        row["resumed_from"] for row in read_jsonl(stopped.folder / "training_log.jsonl") if "resumed_from" in row
    ]
    assert 0 < resumed <= step
    check_same(stopped, whole(stopped.config))


def test_a_training_log_that_was_cut_off_is_that_of_the_checkpoint_again(run, whole):
    killed = run()
    attempt(killed, ("moult.training.watch:Watch.on_step_end", KILL, 8), code=-KILL)
    log = killed.folder / "state" / "training_log.jsonl"
    log.write_text(log.read_text()[:-20])
    attempt(killed)
    check_same(killed, whole(settings()))


# --- a disk that is full, or cannot be written ---------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of its own: `small_disk(options)` mounts it, or mounts it anew."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a file system of its own needs root: {done.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", folder], capture_output=True)


def size_on_disk(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*"))


def test_a_full_disk_is_named_and_the_checkpoints_before_stay(run, whole, small_disk):
    from moult.files import read_json
    from moult.training.checkpoints import checkpoint_folders, fault_of

    full = run()
    one = max(size_on_disk(folder) for folder in checkpoint_folders(whole(settings()).folder / "state"))
    (full.folder / "state").symlink_to(small_disk(f"size={2.5 * one:.0f}"))
    said = attempt(full, code=1)
    assert "state: the checkpoint of step" in said and "bytes" in said and "are free" in said, said
    assert "free space" in said and "run the same command again" in said and "Traceback" not in said
    state = full.folder / "state"
    kept = checkpoint_folders(state)
    assert kept and fault_of(kept[-1], read_json(state / "fingerprint.json"), with_best=True) is None
    assert not (state / "staging").exists() and not (full.folder / "adapter").exists()
    small_disk("remount,size=10m")
    assert f"continuing from {kept[-1]}" in attempt(full)
    check_same(full, whole(settings()))


def test_a_read_only_folder_is_named(run, whole, small_disk):
    stopped = run()
    state = stopped.folder / "state"
    state.symlink_to(small_disk("size=10m"))
    small_disk("remount,ro")
    said = attempt(stopped, code=1)
    assert f"{state}/" in said and "the file system is read-only" in said and "fix the permissions" in said
    small_disk("remount,rw")
    attempt(stopped)
    check_same(stopped, whole(settings()))


def test_a_log_that_cannot_be_written_is_named(base, tokens, small_disk):
    folder = small_disk("size=10m")
    stopped = Run(folder / "run", settings(), base, tokens)
    small_disk("remount,ro")
    done = stopped.go(code=1)
    assert f"{stopped.folder}/finetune.log: the log cannot be written" in done.stderr
