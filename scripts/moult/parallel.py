"""The same function over many items, in several processes, with the results in order."""

import multiprocessing
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from moult.errors import MoultError


def ordered_stream(
    function: Callable, items: Iterable, workers: int, what: str, setup: Callable = int, setup_args: tuple = ()
) -> Iterator:
    """`function(item)` of each item, in order. Only a few items and results are in memory at a time.

    `function` and `setup` must be importable by name. `setup(*setup_args)` runs first, once in each process; what it makes goes
    into a global of its module. The results do not depend on `workers`. Each item goes to a process by itself: make them large.
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
