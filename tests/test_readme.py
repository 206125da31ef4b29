"""The documentation says what is so: every command works, and tables, examples and the picture are those of the code."""

import json
import re
import shlex
import subprocess
import sys
from functools import reduce
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from workflow import ROOT, checkout, snakemake, write_rows

from moult import __version__
from moult.data.conversation import FORMATS, find_format, normalise
from moult.workflow.config import load_schema, merged, resolve

PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in (
        "README.md",
        "config/README.md",
        "config/recipes/README.md",
        "containers/README.md",
        "profiles/README.md",
        "scripts/moult/measuring/README.md",
        "BENCHMARKS.md",
        "SECURITY.md",
    )
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SCHEMA = load_schema(str(ROOT / "config"))


def block(page: str, name: str) -> str:
    """The code block below `<!-- name -->`."""
    return re.search(rf"<!-- {re.escape(name)} -->\n```\w*\n(.*?)```", PAGES[page], re.DOTALL)[1]


def table(page: str, name: str) -> list[list[str]]:
    """The cells of the table below `<!-- name -->`, without its head."""
    text = re.search(rf"<!-- {name} -->\n((?:\|.*\n)+)", PAGES[page])[1]
    return [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]


# --- commands ---------------------------------------------------------------------------------------------------------


def commands() -> list[str]:
    """Every command of every page: the indented lines, and what is set as code and begins with a program of ours."""
    found = []
    for text in PAGES.values():
        text = FENCE.sub("", text)
        indented = re.findall(r"^ {4,}(\S.*)$", text, re.MULTILINE)
        found += [re.sub(r"(^| {2,})#.*", "", line) for line in indented]
        found += re.findall(r"`((?:make |docker |python scripts/)[^`]*)`", text)
    return [command for command in dict.fromkeys(found) if command]


@pytest.fixture(scope="module")
def users_folder(tmp_path_factory) -> Path:
    """A checkout with the README's mine.yaml."""
    folder = checkout(tmp_path_factory.mktemp("docs"))
    (folder / "mine.yaml").write_text(block("README.md", "mine.yaml"))
    return folder


def check_snakemake(words: list[str], folder: Path) -> None:
    """A dry run finds the target, the options and the config. (test_workflow.py and tests/integration run the stages.)"""
    if "--dag" not in words:
        words = [*words, "-n"]
    assert re.search(r"^plans?\b|score|smoke_test|check_connectivity|digraph", snakemake(folder, *words), re.MULTILINE)


def check_make(words: list[str], folder: Path) -> None:
    # What the text calls `make serve` says in full in an example.
    subprocess.run(
        ["make", "--dry-run", "RUN=run", "REPO=name/model", *words], cwd=ROOT, capture_output=True, check=True
    )


def check_python(words: list[str], folder: Path) -> None:
    """The script is there and knows the options."""
    if words[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
    elif words[0] != "-m":
        command = [sys.executable, words[0], "--help"]
        known = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert all(re.search(rf"{word}\b", known) for word in words[1:] if word.startswith("-"))


def check_docker(words: list[str], folder: Path) -> None:
    file = Path(words[words.index("-f") + 1])
    assert (ROOT / file).is_file()
    if words[0] == "build":
        assert words[words.index("-t") + 1] == f"moult-train:{__version__}"
    elif "run" in words:
        service = words[words.index("--rm") + 1]
        assert service in yaml.safe_load((ROOT / file).read_text())["services"]
        check(shlex.join(words[words.index(service) + 1 :]), folder)


def check_nothing(words: list[str], folder: Path) -> None:
    """Sets up the shell or an environment: only the files that it names can be looked at."""
    assert all((ROOT / word).exists() for word in words if word.startswith("envs/"))


CHECKS = {
    "snakemake": check_snakemake,
    "make": check_make,
    "python": check_python,
    "docker": check_docker,
    **dict.fromkeys(("source", "export", "git", "python3", "/opt/vllm/bin/pip"), check_nothing),
}


def check(command: str, folder: Path) -> None:
    for part in command.split(" && "):
        words = shlex.split(part.split(" | ")[0].split(" > ")[0])
        if words[0] in CHECKS:
            CHECKS[words[0]](words[1:], folder)
        else:
            assert part == "cat benchmarks/demo/*.jsonl", f"no check for: {part}"


@pytest.mark.parametrize("command", commands())
def test_every_command_works(command, users_folder):
    check(command, users_folder)


def test_the_commands_are_found():
    text = "\n".join(commands())
    for command in ("make demo", "make test", "--profile slurm", "--use-singularity", "compose.yaml up"):
        assert command in text
    assert len(commands()) > 30


# --- files and links --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", PAGES[page]):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in headings], (
            link
        )


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    for path in re.findall(r"`((?:scripts|config|envs|rules|profiles|containers|tests)/[\w./-]*)`", PAGES[page]):
        assert (ROOT / path).exists() or path.endswith((".sif", ".env")), path


# --- the README -------------------------------------------------------------------------------------------------------


def test_the_picture_is_the_dag(users_folder):
    chains = [line.split() for line in block("README.md", "dag").splitlines() if " --> " in line]
    drawn = {edge for chain in chains for edge in pairwise(chain[::2])}
    command = [sys.executable, "-m", "snakemake", "results/demo/metrics.json", "--rulegraph", "mermaid-js"]
    graph = subprocess.run(command, cwd=users_folder, capture_output=True, text=True, check=True).stdout
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


def test_a_partition_of_their_own_is_given_to_all_stages_of_a_job():
    """Snakemake refuses a job whose stages want different ones."""
    profile = (ROOT / "profiles" / "slurm" / "profile.yaml").read_text()
    groups = yaml.safe_load(profile)["groups"]
    example = re.search(r"has separate partitions.*\| `(set-resources: .*?)`,", PAGES["profiles/README.md"])[1]
    commented = re.findall(r"^#   (\w+): \{slurm_partition", profile, re.MULTILINE)
    for stages in (yaml.safe_load(example)["set-resources"], commented):
        shared = {groups[stage] for stage in stages}
        assert set(stages) == {stage for stage, group in groups.items() if group in shared}


def test_the_demo_prints_such_a_table(demo):
    """The same rows; the figures depend on the machine's arithmetic."""
    command = [sys.executable, ROOT / "scripts" / "tools" / "show_metrics.py", "results/demo/metrics.json"]
    shown = subprocess.run(command, cwd=demo, capture_output=True, text=True, check=True).stdout

    def labels(text: str) -> list[str]:
        return [re.split(r" {2,}| \d", line.strip())[0] for line in text.strip().splitlines() if line.strip()]

    assert labels(shown) == labels(block("README.md", "demo"))


@pytest.mark.slow
def test_every_result_that_is_listed_is_made(pages):
    listed = re.findall(r"^\| `results/(\S+)` \|", PAGES["README.md"], re.MULTILINE)
    assert len(listed) > 5
    for path in listed:
        assert (pages / "results" / re.sub(r"<\w+>", "demo", path)).exists(), path


def test_the_example_config_is_valid():
    config = yaml.safe_load(block("README.md", "mine.yaml"))
    assert set(resolve(config, SCHEMA)["runs"]) == {"gsm8k", "gsm8k-r64"}


def test_the_failure_that_the_readme_shows(tmp_path):
    folder = checkout(tmp_path)
    write_rows(folder, ['{"prompt": "a", "completion": "b"}', '{"prompt": "c", "completion": "d"}', '{"prompt": "a", '])
    config = {"model": {"name": "config/demo/base"}, "datasets": {"mine": {"source": "rows.jsonl"}}}
    (folder / "mine.yaml").write_text(yaml.safe_dump(config))
    output = snakemake(folder, "results/mine/metrics.json", "--configfile", "mine.yaml", code=1)
    assert f"\n{block('README.md', 'failure')}" in output
    assert len(list((folder / "logs" / "mine" / "attempts").glob("*.log"))) == 1


# --- the other pages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["metrics", "export"])
def test_the_table_of_metrics_is_the_schema(name):
    schema = json.loads((ROOT / "scripts" / "moult" / "measuring" / f"{name}.schema.json").read_text())
    expected = [
        [f"`{name}`", field["description"]] for name, field in schema["properties"].items() if "description" in field
    ]
    assert table("scripts/moult/measuring/README.md", name) == expected


def test_every_format_is_shown():
    shown = {name.strip("`"): json.loads(row.strip("`")) for name, row in table("config/recipes/README.md", "formats")}
    assert set(shown) == set(FORMATS)
    for name, row in shown.items():
        assert find_format(row, {}, "auto") == name
        normalise(row, {}, name)


@pytest.mark.parametrize("page", ["README.md", "config/README.md"])
def test_settings_in_a_text_are_valid(page, tmp_path, monkeypatch):
    """`eval.benchmarks: [...]` in a sentence, and the blocks of YAML, beside the config that the README begins with."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "questions.jsonl").write_text("")
    task = {"task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "questions.jsonl"}}}
    (tmp_path / "my_task.yaml").write_text(yaml.safe_dump(task))
    found = [yaml.safe_load(text) for kind, text in FENCE.findall(PAGES[page]) if kind == "yaml"]
    for keys, value in re.findall(r"`((?:eval|runs|train|model|serve|lora)(?:\.\w+)*): ([^`]+)`", PAGES[page]):
        found.append(reduce(lambda inner, key: {key: inner}, reversed(keys.split(".")), yaml.safe_load(value)))
    assert found
    for settings in found:
        resolve(merged(yaml.safe_load(block("README.md", "mine.yaml")), settings), SCHEMA)


def test_all_recipes_are_valid_and_go_together(users_folder):
    """Each for itself, and the workflow with all of them: some have no model or dataset, which the others bring."""
    recipes = [
        yaml.safe_load(text) for kind, text in FENCE.findall(PAGES["config/recipes/README.md"]) if kind == "yaml"
    ]
    assert len(recipes) > 10
    least = {"model": {"name": "org/model"}}
    files = []
    for number, recipe in enumerate(recipes):
        resolve({**least, **recipe}, SCHEMA)
        for dataset in recipe.get("datasets", {}).values():
            entries = dataset["source"] if isinstance(dataset["source"], list) else [dataset["source"]]
            named = [entry["path"] if isinstance(entry, dict) else entry for entry in entries]
            for path in [*named, *filter(None, (dataset.get("val_source"), dataset.get("test_source")))]:
                file = users_folder / path.replace("*", "any")
                file.parent.mkdir(exist_ok=True)
                file.touch()
        files.append(f"recipe-{number}.yaml")
        (users_folder / files[-1]).write_text(yaml.safe_dump(recipe))
    output = snakemake(users_folder, "plans", "-n", "-p", "--configfile", *files, "--config", "paths={models: null}")
    for run in ("mixture", "faq-slow", "scraped"):
        assert f"results/{run}/plan.json" in output


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
