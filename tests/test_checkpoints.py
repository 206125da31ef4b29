"""checkpoints: one that is not whole is never taken for one that is."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moult.errors import MoultError
from moult.training import checkpoints

FINGERPRINT = {"settings": {"lr": 1, "r": 2}, "tokens": {"train": "a"}}


def make(state: Path, step: int, best: int | None = None, fingerprint: dict = FINGERPRINT) -> Path:
    staged = state / "staging" / f"checkpoint-{step}"
    staged.mkdir(parents=True)
    (staged / "weights").write_bytes(bytes(range(100)))
    (staged / "optimizer").write_bytes(b"o" * 1000)
    (staged / "trainer_state.json").write_text(json.dumps({"best_global_step": best}))
    return checkpoints.seal(staged, state, fingerprint)


def cut_off(folder):
    (folder / "optimizer").write_bytes(b"o" * 900)


def corrupt(folder):
    (folder / "weights").write_bytes(bytes(range(1, 101)))


def lose_a_file(folder):
    (folder / "weights").unlink()


def lose_the_manifest(folder):
    (folder / "manifest.json").unlink()


def add_a_file(folder):
    (folder / "scaler.pt").write_bytes(b"of somebody else")


def empty_the_manifest(folder):
    (folder / "manifest.json").write_text("[]")


def fill_the_manifest_with_bytes(folder):
    (folder / "manifest.json").write_bytes(b"\xff\xfe")


def cut_the_manifest(folder):
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text[: len(text) // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_off, "optimizer has 900 of 1,000 bytes"),
        (corrupt, "weights changed since it was written"),
        (lose_a_file, "weights is missing"),
        (lose_the_manifest, "it has no manifest"),
        (cut_the_manifest, "not JSON"),
        (fill_the_manifest_with_bytes, "not JSON"),
        (empty_the_manifest, "its manifest is malformed"),
        (add_a_file, "scaler.pt changed since it was written"),
    ],
)
def test_damage_is_named_and_the_one_before_is_used(damage, message, tmp_path, caplog):
    for step in (3, 9, 12):
        make(tmp_path, step)
    damage(tmp_path / "checkpoint-12")
    assert checkpoints.newest_whole(tmp_path, FINGERPRINT, True) == tmp_path / "checkpoint-9"
    assert "checkpoint-12 cannot be resumed" in caplog.text and message in caplog.text
    assert (tmp_path / "broken-checkpoint-12").exists()


def test_a_checkpoint_whose_best_is_damaged_is_not_used_if_the_best_is_wanted(tmp_path, caplog):
    make(tmp_path, 3)
    make(tmp_path, 6, best=6)
    make(tmp_path, 9, best=6)
    corrupt(tmp_path / "checkpoint-6")
    assert checkpoints.fault_of(tmp_path / "checkpoint-9", FINGERPRINT, with_best=False) is None
    assert checkpoints.newest_whole(tmp_path, FINGERPRINT, with_best=True) == tmp_path / "checkpoint-3"
    assert "the best checkpoint before it, checkpoint-6, cannot be used: weights changed" in caplog.text


def test_none_is_whole(tmp_path):
    lose_a_file(make(tmp_path, 3))
    (tmp_path / "checkpoint-5").mkdir()
    assert checkpoints.newest_whole(tmp_path, FINGERPRINT, True) is None


def test_a_checkpoint_of_another_run_is_not_resumed(tmp_path):
    make(tmp_path, 3, fingerprint={**FINGERPRINT, "settings": {"lr": 2, "r": 2}})
    assert checkpoints.newest_whole(tmp_path, FINGERPRINT, True) is None


def test_another_fingerprint_moves_everything_aside(tmp_path, caplog):
    checkpoints.claim(tmp_path, FINGERPRINT)
    make(tmp_path, 3)
    (tmp_path / "training_log.jsonl").write_text("{}\n")
    checkpoints.claim(tmp_path, FINGERPRINT)
    assert (tmp_path / "checkpoint-3").exists()
    checkpoints.claim(tmp_path, {**FINGERPRINT, "settings": {"lr": 2, "r": 2}})
    assert "settings.lr" in caplog.text and "old-1" in caplog.text
    assert {path.name for path in (tmp_path / "old-1").iterdir()} == {
        "checkpoint-3",
        "fingerprint.json",
        "training_log.jsonl",
    }
    assert checkpoints.checkpoint_folders(tmp_path) == []


def test_names_that_are_no_checkpoints(tmp_path):
    for name in ("checkpoint-²", "checkpoint-٣", "checkpoint-007", "checkpoint-x"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-9").write_text("a file")
    assert checkpoints.checkpoint_folders(tmp_path) == []


def test_a_fingerprint_that_is_none(tmp_path):
    (tmp_path / "fingerprint.json").write_text("[]")
    with pytest.raises(MoultError, match=r"fingerprint\.json: not a fingerprint"):
        checkpoints.claim(tmp_path, FINGERPRINT)


def test_differences_are_named():
    assert checkpoints.differences(FINGERPRINT, FINGERPRINT) == []
    other = {"settings": {"lr": 2, "r": 2}, "tokens": {"train": "b"}, "more": 1}
    assert checkpoints.differences(FINGERPRINT, other) == ["more", "settings.lr", "tokens.train"]
    old, new = {"settings": {"train": {"lr": 1}}}, {"settings": {"train": {"lr": 2, "max_steps": None}}}
    assert checkpoints.differences(old, new) == ["settings.train.lr", "settings.train.max_steps"]


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    for step in (2, 4, 10, 12):
        make(tmp_path, step, best=min(step, 4))
    checkpoints.prune(tmp_path, keep=2, with_best=True)
    assert [checkpoints.step_of(folder) for folder in checkpoints.checkpoint_folders(tmp_path)] == [4, 10, 12]
    checkpoints.prune(tmp_path, keep=1, with_best=False)
    assert [checkpoints.step_of(folder) for folder in checkpoints.checkpoint_folders(tmp_path)] == [12]


def test_checkpoints_later_than_the_one_asked_for_go_aside(tmp_path):
    checkpoints.claim(tmp_path, FINGERPRINT)
    for step in (2, 4, 6):
        make(tmp_path, step)
    given = checkpoints.adopt(tmp_path / "checkpoint-2", tmp_path, with_best=False)
    make(tmp_path, 3)
    checkpoints.prune(tmp_path, keep=1, with_best=False)
    assert given == tmp_path / "checkpoint-2"
    assert checkpoints.newest_whole(tmp_path, FINGERPRINT, with_best=False) == tmp_path / "checkpoint-3"
    names = {path.name for path in (tmp_path / "old-1").iterdir()}
    assert names == {"fingerprint.json", "checkpoint-4", "checkpoint-6"}


def test_after_a_new_best_the_checkpoint_before_it_can_still_be_used(tmp_path):
    for step, best in ((2, 2), (4, 2), (6, 6)):
        make(tmp_path, step, best)
        checkpoints.prune(tmp_path, keep=2, with_best=True)
    corrupt(tmp_path / "checkpoint-6")
    assert checkpoints.newest_whole(tmp_path, FINGERPRINT, with_best=True) == tmp_path / "checkpoint-4"


def test_damage_to_an_older_checkpoint_does_not_cost_the_best(tmp_path):
    for step in (2, 4, 6):
        make(tmp_path, step, best=2)
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text("[")
    checkpoints.prune(tmp_path, keep=2, with_best=True)
    assert checkpoints.newest_whole(tmp_path, FINGERPRINT, with_best=True) == tmp_path / "checkpoint-6"


def hold(state: Path, seconds: float) -> subprocess.Popen:
    """Another process that holds the folder for so long."""
    code = "import sys, time; from pathlib import Path; from moult.training.checkpoints import locked\n"
    code += "with locked(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(float(sys.argv[2]))"
    environment = {**os.environ, "PYTHONPATH": str(Path(checkpoints.__file__).parents[2])}
    command = [sys.executable, "-c", code, str(state), str(seconds)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    assert holder.stdout.readline() == "held\n"
    return holder


def test_the_lock_is_free_when_its_holder_is_killed(tmp_path):
    holder = hold(tmp_path, seconds=60)
    with pytest.raises(MoultError, match=f"process {holder.pid}"), checkpoints.locked(tmp_path, patience=0):
        pass
    holder.kill()
    holder.wait()
    with checkpoints.locked(tmp_path, patience=0):
        pass


def test_a_file_system_without_locks_is_no_other_trainer(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(checkpoints.fcntl, "lockf", refuse)
    with pytest.raises(MoultError, match="has no locks"), checkpoints.locked(tmp_path):
        pass


def test_a_holder_that_is_about_to_end_is_waited_for(tmp_path, caplog):
    caplog.set_level("INFO")
    holder = hold(tmp_path, seconds=2)
    with checkpoints.locked(tmp_path, patience=20):
        assert holder.wait(timeout=5) == 0
    assert (
        f"another process is training this run ({os.uname().nodename}, process {holder.pid}): waiting up to 20 s"
        in caplog.text
    )
