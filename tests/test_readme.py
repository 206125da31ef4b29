"""The README says what is so: its commands run, its tables and its picture are those of the code."""

import json
import re
import shlex
import subprocess
import sys
import textwrap

import pytest
import yaml
from workflow import ROOT, checkout, snakemake, write_rows

README = (ROOT / "README.md").read_text()


def block(name: str) -> str:
    """The code block behind `<!-- name -->`."""
    return re.search(rf"<!-- {re.escape(name)} -->\n```\w*\n(.*?)```", README, re.DOTALL)[1]


def test_the_picture_is_the_dag(demo):
    drawn = set(re.findall(r"^ +(\w+) --> (\w+)$", README, re.MULTILINE))
    command = [sys.executable, "-m", "snakemake", "results/demo/metrics.json", "--rulegraph", "mermaid-js"]
    graph = subprocess.run(command, cwd=demo, capture_output=True, text=True, check=True).stdout
    names = dict(re.findall(r"(id\d+)\[(\w+)\]", graph))
    edges = {(names[a], names[b]) for a, b in re.findall(r"(id\d+) --> (id\d+)", graph)}
    reach = {name: reachable(name, edges) for name in names.values()}
    # The README leaves out an edge where a longer way leads to the same stage.
    direct = {(a, b) for a, b in edges if not any(b in reach[c] for a2, c in edges if a2 == a and c != b)}
    assert drawn == direct


def reachable(name: str, edges: set) -> set[str]:
    found, todo = set(), [name]
    while todo:
        here = todo.pop()
        for a, b in edges:
            if a == here and b not in found:
                found.add(b)
                todo.append(b)
    return found


def test_the_demo_prints_such_a_table(demo):
    """The same rows; the figures depend on the machine's arithmetic."""
    command = [sys.executable, ROOT / "scripts" / "tools" / "show_metrics.py", "results/demo/metrics.json"]
    shown = subprocess.run(command, cwd=demo, capture_output=True, text=True, check=True).stdout

    def labels(text: str) -> list[str]:
        return [re.split(r" {2,}| \d", line.strip())[0] for line in text.strip().splitlines() if line.strip()]

    assert labels(shown) == labels(block("demo"))


def test_the_example_config_is_valid_and_its_commands_run(tmp_path):
    """Every snakemake line of the README, with the example's model and dataset replaced by local ones."""
    folder = checkout(tmp_path)
    config = yaml.safe_load(block("mine.yaml"))
    from moult.workflow.config import load_schema, resolve

    assert set(resolve(config, load_schema(str(ROOT / "config")))["runs"]) == {"gsm8k", "gsm8k-r64"}
    config["model"] = {"name": "config/demo/base"}
    config["datasets"]["gsm8k"]["source"] = "rows.jsonl"
    write_rows(
        folder, [{"question": f"What is {n} plus {n}, my friend?", "answer": f"#### {2 * n}"} for n in range(60)]
    )
    (folder / "mine.yaml").write_text(yaml.safe_dump({**config, "override": {"train": {"max_steps": 2}}}))
    commands = re.findall(r"^    snakemake (.*?)(?: +#.*)?$", README, re.MULTILINE)
    assert len(commands) == 11
    for command in commands:
        arguments = shlex.split(command.split(" | ")[0])
        if "check_connectivity" in arguments:
            continue  # test_connectivity.py runs it
        if "--cores" in arguments or "--profile" in arguments:  # tests/integration runs the latter on a Slurm
            arguments.append("-n")
        output = snakemake(folder, *arguments)
        assert any(
            word in output
            for word in (
                "results/gsm8k/metrics.json",
                "results/gsm8k/plan.json",
                "digraph",
                "results/gsm8k/smoke_test.json",
            )
        )


def test_metrics_table(tmp_path):
    schema = json.loads((ROOT / "scripts" / "moult" / "measuring" / "metrics.schema.json").read_text())
    table = re.search(r"<!-- metrics -->\n(.*?)<!-- end of metrics -->", README, re.DOTALL)[1]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.MULTILINE))
    expected = {name: field["description"] for name, field in schema["properties"].items() if "description" in field}
    assert rows == expected


def test_the_failure_that_the_readme_shows(tmp_path):
    folder = checkout(tmp_path)
    write_rows(folder, ['{"prompt": "a", "completion": "b"}', '{"prompt": "c", "completion": "d"}', '{"prompt": "a", '])
    config = {"model": {"name": "config/demo/base"}, "datasets": {"mine": {"source": "rows.jsonl"}}}
    (folder / "mine.yaml").write_text(yaml.safe_dump(config))
    output = snakemake(folder, "results/mine/metrics.json", "--configfile", "mine.yaml", code=1)
    shown = re.search(r"^    runs +stage .*?prepare\.log$", README, re.MULTILINE | re.DOTALL)
    assert f"\n{textwrap.dedent(shown[0])}\n" in output
    assert len(list((folder / "logs" / "mine" / "attempts").iterdir())) == 1


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:scripts|config|envs)/[\w./]*)`|\]\(([\w./]+)\)", README)))
)
def test_files_that_the_readme_names_exist(path):
    assert (ROOT / "".join(path)).exists()


def test_nothing_of_the_makers_is_in_the_repository():
    """No home or work folder, no registry, no secret."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"/(?:root|home/\w+)/|hf_[A-Za-z0-9]{30,}|BEGIN [A-Z ]*PRIVATE KEY")
    for name in listed.stdout.split():
        path = ROOT / name
        if path.suffix not in (".safetensors", ".parquet") and path.is_file():
            assert not pattern.search(path.read_text(errors="replace")), name
