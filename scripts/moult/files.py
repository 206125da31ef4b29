"""Write files so that they appear complete or not at all, and compute their hashes."""

import contextlib
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from moult.errors import MoultError

# json.dumps would make one for each value.
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical(value) -> str:
    """Canonical JSON: sorted keys, no spaces. NaN and infinity are refused."""
    return _CANONICAL.encode(value)


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: str | Path) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_folder(folder: str | Path, but: tuple[str, ...] = ()) -> dict[str, str]:
    """{relative path: sha256} of every file below `folder`, except the names in `but` and Snakemake's own file."""
    folder = Path(folder)
    but = (*but, ".snakemake_timestamp")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in but]
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}


def changed_files(folder: str | Path, wanted: dict[str, str], but: tuple[str, ...] = ()) -> list[str]:
    """The files below `folder` that do not have the wanted hashes (`sha256_folder`): changed, missing, or more."""
    found = sha256_folder(folder, but)
    return sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))


def glance(path: str | Path) -> str:
    """A hash of a file's size and of 16 blocks spread over it. It detects most changes without reading all of a large file.
    Returns "" for a missing file."""
    try:
        size = Path(path).stat().st_size
        seen = hashlib.sha256(str(size).encode())
        with Path(path).open("rb") as file:
            for place in range(16):
                file.seek(max(0, size - 4096) * place // 15)
                seen.update(file.read(4096))
    except OSError:
        return ""
    return seen.hexdigest()[:16]


def fsync(path: str | Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yields a path to write to. It is renamed to `path` when the block ends without an error."""
    path = Path(path)
    partial = _partial(path)
    try:
        with _named(path):
            yield partial
            fsync(partial)
            partial.replace(path)
            fsync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_files(folder: Path, *names: str) -> Iterator[dict[str, Path]]:
    """{name: path to write to}. The files are renamed to `folder` when the block ends; after an error no folder is left."""
    try:
        with contextlib.ExitStack() as stack:
            yield {name: stack.enter_context(atomic_file(folder / name)) for name in names}
    except BaseException:
        with contextlib.suppress(OSError):  # it is not empty
            folder.rmdir()
        raise


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Like `atomic_file`, for a folder. An older folder at `path` is deleted only when the new one is complete."""
    path = Path(path)
    partial = _partial(path)
    outgoing = partial.with_name(f"{partial.name}-old")
    partial.mkdir()
    try:
        with _named(path):
            yield partial
        for file in sorted(partial.rglob("*")):
            # safetensors writes its files with mode 0600, whatever the umask: others must be able to serve them.
            if file.is_file():
                file.chmod(0o666 & ~_umask())
            fsync(file)
        fsync(partial)
        if path.exists():
            # Renamed first: if the process is killed while it deletes, no part of the folder remains at `path`.
            path.rename(outgoing)
        partial.rename(path)
        fsync(path.parent)
    finally:
        for left in (partial, outgoing):
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def temporary_file(beside: str | Path) -> Iterator[BinaryIO]:
    """Yields a file without a name, on the disk of `beside`: whatever ends the process, nothing of it is left."""
    path = Path(beside)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _named(path), tempfile.TemporaryFile(dir=path.parent) as file:
        yield file


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Add the path to a disk error: Python names a file that it cannot open, but not one that it cannot extend."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def check_space(path: str | Path, needed: int) -> None:
    """Raises MoultError if the disk of `path` has less than `needed` bytes free."""
    folder = next(folder for folder in Path(path).absolute().parents if folder.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MoultError(
            f"{path}: not enough disk space: {needed:,} bytes are needed, {free:,} are free",
            "free space, or set paths.results to a folder on another disk, and run the same command again",
        )


def _partial(path: Path) -> Path:
    """A temporary path beside `path`. Removes what a killed process has left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f"{glob.escape(path.name)}.tmp-*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | Path, text: str) -> None:
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value) -> None:
    """Write indented JSON with sorted keys, so that equal values make equal files."""
    write_text(path, json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: str | Path, rows: Iterable) -> None:
    with atomic_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(canonical(row) + "\n")


def read_json(path: str | Path, fix: str = "delete it and run again"):
    """The JSON in a file. Raises MoultError, with `fix`, if the file is missing or malformed."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MoultError(f"{path} does not exist", "run the stage that writes it") from None
    except json.JSONDecodeError as error:
        raise MoultError(f"{path}:{error.lineno}: not JSON ({error.msg})", fix) from None
    except (ValueError, RecursionError) as error:  # not UTF-8, a number with thousands of digits, endless brackets
        raise MoultError(f"{path}: not JSON ({error})", fix) from None


def read_jsonl(path: str | Path) -> Iterator[dict]:
    """The rows of a JSON Lines file of ours."""
    with Path(path).open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
