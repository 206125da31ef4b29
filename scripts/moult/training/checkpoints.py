"""trainer_state/: checkpoints that are used only if they are complete and belong to the run.

    trainer_state/fingerprint.json      what the run depends on: settings, tokens, base model, versions
    trainer_state/lock                  held by the one process that may write here
    trainer_state/checkpoint-<step>/    with manifest.json: size and hash of every file
    trainer_state/training_log.jsonl    the log so far; each checkpoint contains the log up to its step
    trainer_state/staging/              a checkpoint that is being written
    trainer_state/old-<n>/              checkpoints of another fingerprint, or later than a --resume-from

The folder is not an output of a rule, so Snakemake never deletes it. transformers writes its checkpoints file by file, and uses
the one with the highest number, complete or not (huggingface/transformers#40691 and others). Here each checkpoint is
written to staging/, flushed to the disk, and renamed.
"""

import contextlib
import fcntl
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from moult.errors import MoultError, some
from moult.files import canonical, fsync, read_json, sha256_folder, sha256_text, write_json, write_text

log = logging.getLogger("moult")

FORMAT = 1  # version of the files in a checkpoint; other versions cannot be resumed
MANIFEST = "manifest.json"
STAGING = "staging"
UNPACKED = "tokens"  # while it trains
TRAINING_LOG = "training_log.jsonl"


@contextlib.contextmanager
def locked(state: Path, patience: float = 120) -> Iterator[None]:
    """Lock the folder for this process. The lock ends with the process, also if it is killed. Works over NFS.

    Waits up to `patience` seconds for another holder, which may be saving its last step after its Snakemake was killed.
    """
    state.mkdir(parents=True, exist_ok=True)
    with (state / "lock").open("a+") as lock:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):  # the two ways to say that it is held
                lock.seek(0)
                holder = lock.read().strip() or "unknown"
            except OSError as error:
                raise MoultError(
                    f"{state}: the folder cannot be locked: its file system has no locks ({error.strerror})",
                    "set paths.results to a folder on another file system (NFS must be mounted without nolock)",
                ) from error
            if time.monotonic() > deadline:
                raise MoultError(
                    f"{state}: another process is training this run ({holder})",
                    "wait for it, or stop it (squeue, ps)",
                )
            if deadline - time.monotonic() > patience - 1:
                log.info("another process is training this run (%s): waiting up to %.0f s", holder, patience)
            time.sleep(1)
        lock.truncate(0)
        lock.write(f"{os.uname().nodename}, process {os.getpid()}\n")
        lock.flush()
        yield


def claim(state: Path, fingerprint: dict) -> None:
    """Prepare `state` for `fingerprint`. Checkpoints of another fingerprint are moved aside and never resumed."""
    for left in (STAGING, UNPACKED):  # by a kill
        shutil.rmtree(state / left, ignore_errors=True)
    path = state / "fingerprint.json"
    if path.exists():
        old = read_json(path)
        if not isinstance(old, dict):
            raise MoultError(f"{path}: not a fingerprint file", "delete it and run again")
        differs = differences(old, fingerprint)
        if not differs:
            return
        aside = _new_aside(state)
        # The fingerprint is moved last: if the process is killed before, the next one still sees that the rest is not its own.
        for entry in [*checkpoint_folders(state), state / TRAINING_LOG, path]:
            if entry.exists():
                entry.rename(aside / entry.name)
        log.warning(
            "%s is from other settings (%s): moved to %s, training starts again", state, some(differs), aside.name
        )
    write_json(path, fingerprint)


def _new_aside(state: Path) -> Path:
    aside = next(folder for number in range(1, 10_000) if not (folder := state / f"old-{number}").exists())
    aside.mkdir()
    return aside


def differences(old: dict, new: dict) -> list[str]:
    """The names of the entries that differ between two fingerprints."""
    names = []
    for key in sorted(set(old) | set(new)):
        before, after = old.get(key, ...), new.get(key, ...)  # a missing key differs from null
        if isinstance(before, dict) and isinstance(after, dict):
            names += [f"{key}.{name}" for name in differences(before, after)]
        elif before != after:
            names.append(key)
    return names


def checkpoint_folders(state: Path) -> list[Path]:
    """The finished checkpoints, the oldest first."""
    named = [folder for folder in state.glob("checkpoint-*") if re.fullmatch(r"checkpoint-[1-9][0-9]*", folder.name)]
    return sorted((folder for folder in named if folder.is_dir()), key=step_of)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def seal(staged: Path, state: Path, fingerprint: dict) -> Path:
    """Complete a checkpoint: write its manifest, flush it to the disk, rename it."""
    files = sha256_folder(staged)
    sizes = {name: (staged / name).stat().st_size for name in files}
    manifest = {"files": files, "sizes": sizes, "fingerprint": sha256_text(canonical(fingerprint))}
    write_json(staged / MANIFEST, manifest)
    for file in staged.rglob("*"):
        fsync(file)
    fsync(staged)
    final = state / staged.name
    shutil.rmtree(final, ignore_errors=True)
    staged.rename(final)
    fsync(state)
    return final


def fault_of(folder: Path, fingerprint: dict, with_best: bool) -> str | None:
    """Why a checkpoint cannot be used, or None. `with_best`: the best checkpoint before it must be usable too."""
    fault = _own_fault(folder, fingerprint)
    best = best_before(folder) if with_best and fault is None else None
    if best is not None:
        theirs = _own_fault(best, fingerprint)
        return theirs and f"the best checkpoint before it, {best.name}, cannot be used: {theirs}"
    return fault


def best_before(folder: Path) -> Path | None:
    """The checkpoint with the lowest validation loss before `folder`, or None if `folder` itself is the best."""
    step = read_json(folder / "trainer_state.json")["best_global_step"]
    return folder.with_name(f"checkpoint-{step}") if step and step != step_of(folder) else None


def _own_fault(folder: Path, fingerprint: dict) -> str | None:
    if not (folder / MANIFEST).exists():
        return "it has no manifest"
    try:
        return _manifest_fault(folder, read_json(folder / MANIFEST), fingerprint)
    except MoultError as error:
        return error.what
    except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        return f"its manifest is malformed ({error})"


def _manifest_fault(folder: Path, manifest: dict, fingerprint: dict) -> str | None:
    for name, size in manifest["sizes"].items():
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} of {size:,} bytes"
    present = sha256_folder(folder)
    present.pop(MANIFEST)
    written = manifest["files"]
    # An added file counts too: transformers reads every file that it knows.
    changed = [name for name in sorted({*written, *present}) if written.get(name) != present.get(name)]
    if changed:
        return f"{some(changed)} changed since it was written"
    if manifest["fingerprint"] != sha256_text(canonical(fingerprint)):
        return "it belongs to another run"
    return None


def newest_whole(state: Path, fingerprint: dict, with_best: bool) -> Path | None:
    """The newest checkpoint that can be resumed. Newer ones are named in the log and moved aside."""
    for folder in reversed(checkpoint_folders(state)):
        fault = fault_of(folder, fingerprint, with_best)
        if fault is None:
            return folder
        log.warning("%s cannot be resumed: %s; trying the checkpoint before it", folder, fault)
        broken = folder.with_name(f"broken-{folder.name}")
        shutil.rmtree(broken, ignore_errors=True)
        folder.rename(broken)
    return None


def adopt(folder: Path, state: Path, with_best: bool) -> Path:
    """Copy a checkpoint and the best one before it into `state`, and move later ones aside. Returns the copy."""
    best = best_before(folder) if with_best else None
    for source in filter(None, (best, folder)):
        if source.parent.resolve() != state.resolve():
            staged = state / STAGING / source.name
            shutil.rmtree(staged, ignore_errors=True)
            shutil.copytree(source, staged)
            shutil.rmtree(state / source.name, ignore_errors=True)
            staged.rename(state / source.name)
    shutil.rmtree(state / STAGING, ignore_errors=True)
    later = [other for other in checkpoint_folders(state) if step_of(other) > step_of(folder)]
    if later:
        # If they stayed, they would be the newest, and new checkpoints would be pruned.
        aside = _new_aside(state)
        shutil.copyfile(state / "fingerprint.json", aside / "fingerprint.json")
        for other in later:
            other.rename(aside / other.name)
        log.warning("later checkpoints moved to %s: %s", aside.name, some(other.name for other in later))
    return state / folder.name


def restore_log(state: Path, checkpoint: Path | None) -> None:
    """Reset the training log to that of `checkpoint`, or to an empty one: later steps will be trained and logged again."""
    write_text(state / TRAINING_LOG, (checkpoint / TRAINING_LOG).read_text(encoding="utf-8") if checkpoint else "")


def prune(state: Path, keep: int, with_best: bool) -> None:
    """Delete all but the `keep` newest checkpoints, and those that could not be resumed.

    `with_best`: also keep the best one before each of them, which is needed to resume.
    """
    folders = checkpoint_folders(state)
    needed = set(folders[-keep:])
    for folder in folders[-keep:] if with_best else ():
        with contextlib.suppress(MoultError, LookupError, TypeError, ValueError):  # it has been damaged since
            if best := best_before(folder):
                needed.add(best)
    for folder in folders:
        if folder not in needed:
            shutil.rmtree(folder)
    for folder in state.glob("broken-*"):
        shutil.rmtree(folder)
