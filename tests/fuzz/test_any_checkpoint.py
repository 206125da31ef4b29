"""Whatever lies in trainer_state/: the newest whole checkpoint is found, and no damaged one."""

import contextlib
import json
import shutil

import pytest
from examples import examples
from fuzz.anything import TEXTS, nested
from hypothesis import given
from hypothesis import strategies as st

from moult.errors import MoultError
from moult.training import checkpoints

FINGERPRINT = {"settings": {"lr": 1}}
STEPS = (2, 4, 6)

BYTES = st.binary(max_size=40) | nested().map(json.dumps).map(str.encode)
# Names that look like a checkpoint's, of which int() takes some and not others.
NAMES = st.sampled_from(
    [
        "checkpoint-",
        "checkpoint-x",
        "checkpoint-²",
        "checkpoint-٣",
        "checkpoint-007",
        "checkpoint-8",
        "staging",
        "old-1",
        "lock",
    ]
)
FILES = st.sampled_from(["manifest.json", "trainer_state.json", "weights", "new", "sub/file"])
CHANGES = st.none() | BYTES | st.sampled_from(["folder", "cut", "link"])
SIZES = nested() | st.dictionaries(TEXTS, nested(), max_size=3)
MANIFESTS = nested() | st.fixed_dictionaries({}, optional={"files": SIZES, "sizes": SIZES, "fingerprint": nested()})


def seal(state, step: int, best: int | None) -> None:
    staged = state / "staging" / f"checkpoint-{step}"
    staged.mkdir(parents=True)
    (staged / "weights").write_bytes(b"w" * step)
    (staged / "trainer_state.json").write_text(json.dumps({"best_global_step": best}))
    checkpoints.seal(staged, state, FINGERPRINT)


def contents(folder) -> dict:
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with contextlib.suppress(KeyError, ValueError, RecursionError):
        files["manifest.json"] = json.loads(files["manifest.json"])  # a space more or less is no damage
    return files


@pytest.mark.slow
@examples(150)
@given(
    best=st.sampled_from([None, 2, 4, 6]),
    with_best=st.booleans(),
    changes=st.lists(st.tuples(st.sampled_from(STEPS), FILES, CHANGES), max_size=3),
    manifest=st.none() | MANIFESTS,
    strays=st.lists(st.tuples(NAMES, st.booleans()), max_size=3),
)
def test_the_newest_whole_one_is_found(tmp_path, best, with_best, changes, manifest, strays):
    state = tmp_path / "trainer_state"
    shutil.rmtree(state, ignore_errors=True)
    for step in STEPS:
        seal(state, step, best if best is not None and best <= step else None)
    whole = {step: contents(state / f"checkpoint-{step}") for step in STEPS}
    for step, name, change in changes:
        alter(state / f"checkpoint-{step}" / name, change)
    if manifest is not None:
        alter(state / "checkpoint-6" / "manifest.json", json.dumps(manifest).encode())
    for name, is_folder in strays:
        path = state / name
        if not path.exists():
            path.mkdir() if is_folder else path.write_bytes(b"stray")
    intact = {step for step in STEPS if contents(state / f"checkpoint-{step}") == whole[step]}

    def usable(step: int) -> bool:
        needs = {step, best} if with_best and best is not None and best < step else {step}
        return needs <= intact

    expected = next((step for step in reversed(STEPS) if usable(step)), None)
    found = checkpoints.newest_whole(state, FINGERPRINT, with_best)
    assert (checkpoints.step_of(found) if found else None) == expected
    checkpoints.prune(state, 1, with_best)


def alter(path, change) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    if change is None:
        path.unlink(missing_ok=True)
    elif change == "folder":
        path.unlink(missing_ok=True)
        path.mkdir(parents=True)
    elif change == "cut":
        if path.exists():
            path.write_bytes(path.read_bytes()[:-1])
    elif change == "link":
        path.unlink(missing_ok=True)
        path.parent.mkdir(exist_ok=True)
        path.symlink_to("nowhere")
    else:
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(change)


@pytest.mark.slow
@examples(100)
@given(content=BYTES)
def test_any_fingerprint(tmp_path, content):
    """One that cannot be read belongs to another run: everything is moved aside, or it is said."""
    state = tmp_path / "trainer_state"
    shutil.rmtree(state, ignore_errors=True)
    seal(state, 2, None)
    (state / "fingerprint.json").write_bytes(content)
    try:
        checkpoints.claim(state, FINGERPRINT)
    except MoultError as error:
        assert "fingerprint.json" in error.what and error.fix
        return
    assert checkpoints.checkpoint_folders(state) == []
