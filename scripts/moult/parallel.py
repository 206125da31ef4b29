"""The same function over many items, in several processes, with one progress bar and the results in order."""

import multiprocessing
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial

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
        workers = min(workers, len(chunks))
        for part in ordered_stream(partial(_apply, function), chunks, workers, what, setup, setup_args):
            results += part
            bar.update(len(part))
    return results


def ordered_stream(
    function: Callable, items: Iterable, workers: int, what: str, setup: Callable = int, setup_args: tuple = ()
) -> Iterator:
    """`function(item)` of each item, in order. Only a few items and results are in memory at a time.

    Otherwise as `ordered_map`, but without a progress bar. Each item goes to a process by itself: make them large.
    """
    if workers <= 1:
        setup(*setup_args)
        yield from map(function, items)
        return
    # fork shares what the parent has loaded; elsewhere than on Linux it is not safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (os.getpid(), setup, setup_args))
    waiting: deque = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:  # enough to keep all busy while the first is waited for
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise MoultError(
            f"{what}: a worker process was killed (usually out of memory)",
            "give the rule more memory (mem_mb) or fewer threads",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)  # `with` would do all the work before a SIGTERM gets through


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
