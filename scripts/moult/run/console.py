"""What a person sees of a stage while it runs: a line for each thing worth knowing, and one progress bar.

    17:03:12 prepare        demo: 568 train, 77 val, 72 test rows; dropped: 8 duplicate
    finetune demo: steps:  41%|████      | 82/200 [00:11<00:15,  7.6it/s, loss 0.022]

`demo` is the run or dataset. On a terminal the bar stands below the lines; elsewhere (a file, Slurm, CI) it is a line now and
then.
"""

import contextlib
import logging
import os
import time
from collections.abc import Collection, Iterator
from typing import TextIO

from moult.run.attempt import prefix
from moult.run.redact import RedactingFormatter, redact

log = logging.getLogger("moult")


class Console(logging.Handler):
    """Lines of level INFO and above on `stream`, above the progress bar if there is one.

    `about` is the run or dataset, "" if that is not known. `quiet` shows nothing: another process of the stage has the console.
    """

    current: "Console | None" = None

    def __init__(self, stream: TextIO, name: str, about: str, quiet: bool):
        super().__init__(logging.CRITICAL + 1 if quiet else logging.INFO)
        self.stream = stream
        self.label = f"{name} {about}" if about else name
        self.found = ""  # the last line of level INFO: what a stage that is done has found
        # A terminal that does not tell its width gets lines: tqdm shows nothing on it.
        self.shows_bars = not quiet and stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
        start = prefix(name, about).replace("%", "%%")
        self.setFormatter(RedactingFormatter(f"%(asctime)s {start}%(message)s", "%H:%M:%S"))
        Console.current = self
        log.handlers = [self]

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        if record.levelno == logging.INFO:
            self.found = redact(record.getMessage())
        # If the terminal went away, the work goes on, and the log has the line.
        with contextlib.suppress(OSError, ValueError):
            tqdm.write(self.format(record), file=self.stream)


class progress:
    """The one progress bar: `with progress(total, "rows") as bar: bar.update(n)`, or `for x in progress.over(xs, "rows")`.

    Without a terminal it is a line after ten seconds, and after that at ever longer intervals.
    """

    first_line_after = 10.0  # seconds
    longest_interval = 300.0
    outermost: "progress | None" = None

    def __init__(self, total: int, what: str, initial: int = 0):
        self.total, self.what, self.done = total, what, initial
        self.told, self.interval = time.monotonic(), self.first_line_after
        self.bar = None
        if progress.outermost is not None:  # one bar at a time: what runs inside another is silent
            return
        progress.outermost = self
        console = Console.current
        if console is not None and console.shows_bars:
            from tqdm import tqdm

            what = f"{console.label}: {what}"
            self.bar = tqdm(
                total=total, initial=initial, desc=what, file=console.stream, leave=False, dynamic_ncols=True
            )

    @classmethod
    def over(cls, items: Collection, what: str) -> Iterator:
        with cls(len(items), what) as bar:
            for item in items:
                yield item
                bar.update()

    def update(self, count: int = 1, note: str = "") -> None:
        self.done += count
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(count)
        elif progress.outermost is self and time.monotonic() - self.told > self.interval:
            self.told = time.monotonic()
            self.interval = min(2 * self.interval, self.longest_interval)
            log.info("%s: %s of %s%s", self.what, f"{self.done:,}", f"{self.total:,}", f", {note}" if note else "")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if progress.outermost is self:
            progress.outermost = None

    def __enter__(self) -> "progress":
        return self

    def __exit__(self, *error) -> None:
        self.close()
