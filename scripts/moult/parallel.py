"""The same function over many items, in several processes, with one progress bar and the results in order."""

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from moult.errors import MoultError
from moult.run.console import progress


def ordered_map(
    function: Callable,
    items: Sequence,
    workers: int,
    what: str,
    setup: Callable = int,
    setup_args: tuple = (),
    chunk: int = 256,
) -> list:
    """`[function(item) for item in items]`. `setup(*setup_args)` runs first, once in each process.

    `function` and `setup` must be importable by name; what `setup` makes goes into a global of their module. The result
    does not depend on `workers`.
    """
    chunks = [items[start : start + chunk] for start in range(0, len(items), chunk)]
    results: list = []
    with progress(len(items), what) as bar:
        if workers <= 1 or len(chunks) <= 1:
            setup(*setup_args)
            for part in chunks:
                results += [function(item) for item in part]
                bar.update(len(part))
            return results
        # fork shares what the parent has loaded; elsewhere than on Linux it is not safe.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        start = (os.getpid(), setup, setup_args)
        pool = ProcessPoolExecutor(min(workers, len(chunks)), context, _start_worker, start)
        try:
            for part in pool.map(_apply, [function] * len(chunks), chunks):
                results += part
                bar.update(len(part))
        except BrokenProcessPool:
            raise MoultError(
                f"{what}: a worker process was killed (usually out of memory)",
                "give the rule more memory (mem_mb) or fewer threads",
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)  # `with` would do all the work before a SIGTERM gets through
    return results


def _start_worker(parent: int, setup: Callable, setup_args: tuple) -> None:
    def watch() -> None:
        # The queue that a worker waits at stays open without its other end: it would wait for ever.
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    setup(*setup_args)


def _apply(function: Callable, part: Sequence) -> list:
    return [function(item) for item in part]
