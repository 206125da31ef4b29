"""CONTRIBUTING.md: its worked example is built in a copy of the checkout, as a reader would, and runs."""

import json
import re
from pathlib import Path

import pytest
from rooms import MAY_IMPORT
from workflow import ROOT, snakemake

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCK = re.compile(
    r"^ *<!-- (?:new: (?P<new>\S+)|in (?P<old>\S+), after: (?P<after>.+?)) -->\n(?P<fence> *)```python\n(?P<text>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)


def steps() -> list[tuple[str, str | None, str]]:
    """(file, the line that the text goes behind or None for a new file, text)."""
    found = []
    for block in BLOCK.finditer(PAGE):
        lines = [line.removeprefix(block["fence"]) for line in block["text"].splitlines()]
        found.append((block["new"] or block["old"], block["after"], "\n".join(lines) + "\n"))
    return found


def follow(folder: Path, step: tuple[str, str | None, str]) -> None:
    path, after, text = step
    if after is None:
        (folder / path).write_text(text)
        return
    old = (folder / path).read_text()
    assert old.count(f"{after}\n") == 1, f"{path} has no line that ends with {after}"
    (folder / path).write_text(old.replace(f"{after}\n", f"{after}\n{text}"))


def test_a_stage_takes_at_most_four_files():
    assert 0 < len({path for path, *_ in steps()}) <= 4


@pytest.mark.slow
def test_the_worked_example_is_a_stage(again):
    for step in steps():
        follow(again, step)
    target = "results/demo/answer_lengths.json"
    output = snakemake(again, target)
    assert re.search(r"answer_lengths +.*the longest of \d+ answers has \d+ tokens, of at most 48", output)
    assert json.loads((again / target).read_text())["limit"] == 48
    assert "Nothing to be done" in snakemake(again, target, "results/demo/metrics.json")
    assert (again / "logs/demo/answer_lengths.log").exists() and (
        again / "benchmarks/demo/answer_lengths.jsonl"
    ).exists()


def test_a_stage_that_was_forgotten_in_stages_is_named(again):
    for step in steps():
        if step[0] != "scripts/moult/workflow/stages.py" or "Places" in step[2] or "str =" in step[2]:
            follow(again, step)
    output = snakemake(again, "-n", "results/demo/answer_lengths.json", code=1)
    assert "the stage answer_lengths is not in STAGES of scripts/moult/workflow/stages.py" in output


def test_the_map_names_what_is_there():
    for path in re.findall(r"`((?:rules|scripts|config|tests|profiles)/[\w./]*)`", PAGE):
        assert (ROOT / path).exists() or path in {step[0] for step in steps()}, path
    walls = dict(re.findall(r"^\| `(\w+)/` \|.*\| ([^|]*) \|$", PAGE, re.MULTILINE))
    assert {room: set(re.findall(r"\w+", names)) for room, names in walls.items()} == MAY_IMPORT
