"""The same function over many items, in several processes."""

import os
import signal
import time

import psutil
import pytest
from running import begin, lay_out

from moult.errors import MoultError
from moult.parallel import ordered_stream

_offset = 0


def set_offset(value: int) -> None:
    global _offset
    _offset = value


def shifted(item: int) -> int:
    if item == 13 and _offset == 13:
        raise ValueError("unlucky")
    if item == 13 and _offset == 99:
        os.kill(os.getpid(), signal.SIGKILL)
    return item + _offset


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 5, 103])
def test_the_results_keep_the_order_with_any_number_of_processes(workers, count):
    results = ordered_stream(shifted, range(count), workers, "items", set_offset, (1000,))
    assert list(results) == list(range(1000, 1000 + count))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_a_worker_is_the_callers(workers):
    with pytest.raises(ValueError, match="unlucky"):
        list(ordered_stream(shifted, range(50), workers, "items", set_offset, (13,)))


def test_a_killed_worker_is_said_in_plain_words():
    with pytest.raises(MoultError, match=r"items: a worker process was killed \(usually out of memory\)"):
        list(ordered_stream(shifted, range(50), 2, "items", set_offset, (99,)))


@pytest.mark.slow
def test_sigterm_does_not_wait_for_all_the_work(tmp_path):
    head = "from moult.parallel import ordered_stream\ndef slow(item): time.sleep(0.01)\n"
    lay_out('log.info("working")\nlist(ordered_stream(slow, range(100_000), 2, "items"))', tmp_path, head=head)
    process = begin(tmp_path, start_new_session=True)
    assert "working" in process.stderr.readline()
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGTERM)  # Slurm and Snakemake signal the whole group
    assert process.wait(timeout=20) == 143
    assert "Traceback" not in process.stderr.read()


def test_the_workers_of_a_killed_stage_end(tmp_path):
    code = """
    from moult.parallel import ordered_stream
    list(ordered_stream(time.sleep, [60, 60], workers=2, what="naps", setup=log.info, setup_args=("at work",)))
    """
    lay_out(code, tmp_path)
    process = begin(tmp_path)
    assert "at work" in process.stderr.readline() and "at work" in process.stderr.readline()
    workers = psutil.Process(process.pid).children()
    process.kill()
    assert len(workers) == 2
    assert psutil.wait_procs(workers, timeout=20)[1] == []
    process.communicate()
