"""What tests/gpu/benchmark.py sees of other processes: the memory of the GPU, and when they print a line."""

import subprocess
import threading
import time
from pathlib import Path


class Watch:
    """Bytes of the GPU's memory that are used at the most, as nvidia-smi sees it; None without one.

    It looks twenty times a second: the trial of the longest batch takes a few tenths, and gives its memory back.
    """

    COMMAND = ("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0", "--loop-ms=50")

    def __init__(self):
        self.peak: int | None = None
        self.process: subprocess.Popen | None = None
        self.thread = threading.Thread(target=self.look, daemon=True)

    def look(self) -> None:
        assert self.process and self.process.stdout
        for line in self.process.stdout:
            if line.strip().isdigit():
                self.peak = max(self.peak or 0, int(line) * 2**20)

    def __enter__(self) -> "Watch":
        try:
            self.process = subprocess.Popen(self.COMMAND, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError:
            return self
        self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        if self.process:
            self.process.terminate()
            self.thread.join()
            self.process.wait()


def timed_lines(words: list[str], log: Path, folder: Path, timeout: float) -> tuple[int, list[tuple[float, str]]]:
    """The exit code of a command, and the lines that it prints, each with the second at which it came. Errors go to `log`."""
    lines = []
    with log.open("w") as file:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=file, text=True, cwd=folder)
        killer = threading.Timer(timeout, process.kill)
        killer.start()
        assert process.stdout
        for line in process.stdout:
            lines.append((time.monotonic(), line))
        killer.cancel()
    return process.wait(), lines
