"""Run a command of ours in a fork of a process that has imported the libraries: importing torch and trl takes seconds."""

import functools
import importlib
import io
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path

# Not ours: a fork shall read what is in the folder that it runs in.
PRELOADED = [
    *("snakemake.cli", "snakemake.workflow", "snakemake.report", "smart_open", "yte", "jsonschema"),
    *("peft", "trl.trainer.sft_trainer", "pyarrow.parquet"),
]
# What the libraries read when they are imported.
IMPORTED_WITH = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@functools.cache
def forks() -> multiprocessing.context.BaseContext:
    """Starts the process that the others are forked from; it ends with this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    before = dict(os.environ)
    os.environ.update(IMPORTED_WITH)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def run(
    command: list[str],
    folder: Path | None = None,
    variables: dict[str, str] | None = None,
    before: Callable[[], None] | None = None,
    timeout: float = 120,
) -> tuple[int, str]:
    """Exit code and console (both streams) of `python <command>`, or of `snakemake <arguments>`, in `folder`.

    variables: laid over the environment.
    before: called in the fork before the command, as a function of a module that can be imported (or a partial of one).
    """
    with tempfile.TemporaryDirectory() as scratch:
        console = Path(scratch) / "console.txt"
        environment = {**os.environ, **IMPORTED_WITH, **(variables or {})}
        process = forks().Process(target=_become, args=(command, folder, environment, before, console))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise TimeoutError(f"{command}: {console.read_text()}")
        return process.exitcode, console.read_text()


def _become(command: list[str], folder: Path | None, environment: dict, before, console: Path) -> None:
    if folder:
        os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    with console.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(number, "wb", 0), write_through=True) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Otherwise DataLoader's workers would be children of a server of their own, which outlives a killed trainer.
    multiprocessing.set_start_method("fork", force=True)
    sys.argv = [str(word) for word in command]
    if command[0] != "snakemake":
        sys.path.insert(0, str(Path(command[0]).absolute().parent))
    if before:
        before()
    if command[0] == "snakemake":
        from snakemake.cli import main

        main()
    else:
        runpy.run_path(command[0], run_name="__main__")


def send_at(target: str, number: int, call: int = 1, after: bool = False) -> None:
    """Let this process get the signal `number` before or after the `call`-th call of `target`, `module:name`."""
    module, _, name = target.partition(":")
    holder = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        holder = getattr(holder, part)
    original, calls = getattr(holder, last), 0

    def hooked(*args, **kwargs):
        nonlocal calls
        calls += 1
        mine = calls
        if mine == call and not after:
            os.kill(os.getpid(), number)
        result = original(*args, **kwargs)
        if mine == call and after:
            os.kill(os.getpid(), number)
        return result

    setattr(holder, last, hooked)
