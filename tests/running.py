"""A stage named demo that holds a few lines of code, run in a process of its own."""

import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from workflow import ROOT

HEAD = """\
import logging, os, sys, time, warnings
from moult.errors import MoultError, UNFINISHED
from moult.files import atomic_file, atomic_folder
from moult.run.console import progress
from moult.run.stage import stage
"""


@dataclass
class Result:
    code: int
    stdout: str
    stderr: str
    log: str

    @property
    def console(self) -> str:
        return self.stdout + self.stderr


def lay_out(code: str, folder: Path, arguments: str = "", head: str = "", log: str = "logs/demo.log") -> None:
    """Write demo.py: `code` inside `with stage("demo", "<log>"<arguments>) as log:`, below `head`."""
    call = f'with stage("demo", "{log}"{arguments}) as log:\n'
    body = textwrap.indent(textwrap.dedent(code), "    ")
    (folder / "demo.py").write_text(HEAD + head + call + body)


def begin(folder: Path, environment=(), **options) -> subprocess.Popen:
    """demo.py, to be watched or disturbed while it runs; what it says on stderr can be read."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "scripts"), **dict(environment)}
    options = {"stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen([sys.executable, "demo.py"], cwd=folder, env=variables, **options)


def run_stage(
    code: str, arguments: str = "", head: str = "", *, folder: Path, log: str = "logs/demo.log", **environment: str
) -> Result:
    lay_out(code, folder, arguments, head, log)
    process = begin(folder, environment, stdout=subprocess.PIPE)
    stdout, stderr = process.communicate(timeout=60)
    text = (folder / log).read_text() if (folder / log).exists() else ""
    return Result(process.returncode, stdout, stderr, text)


def lines_said(result: Result) -> list[str]:
    """The console's lines without time and name."""
    assert result.stdout == ""
    return [line.split(maxsplit=2)[2] for line in result.stderr.splitlines()]
