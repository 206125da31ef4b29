"""fetch_dataset against a hub of our own on the loopback interface, and both stages through their rules."""

import sys

import pytest
import yaml
from fake_hub import TOKEN
from fetching import ROWS, assert_fails, assert_written_nowhere, dataset, jsonl, model
from workflow import ROOT

from moult.files import sha256_file

# --- datasets ---------------------------------------------------------------------------------------------------------


def test_dataset_becomes_parquet(hub, fetch):
    import pyarrow.parquet

    commit = hub.add("dataset", "org/math", dataset())
    result = fetch.dataset(settings={"split": "train"})
    assert result.returncode == 0, result.stderr
    out = fetch.folder / "results/math.parquet"
    assert pyarrow.parquet.read_table(out).to_pylist() == ROWS
    assert fetch.files("results") == {"math.parquet", "math.json"}
    assert fetch.json("math.json") == {
        "schema_version": 1,
        "id": "org/math",
        "subset": "main",
        "split": "train",
        "revision": None,
        "commit": commit,
        "rows": 20,
        "columns": ["question", "answer"],
        "sha256": sha256_file(out),
    }


def test_dataset_split_and_slice(hub, fetch):
    hub.add("dataset", "org/math", dataset())
    assert fetch.dataset(settings={"split": "train[:5]+test"}).returncode == 0
    assert fetch.json("math.json")["rows"] == 8


def test_dataset_fills_no_cache_in_the_home_unless_hf_home_says_so(hub, fetch):
    hub.add("dataset", "org/math", dataset())
    assert fetch.dataset(HF_TOKEN=TOKEN).returncode == 0
    assert any(file.endswith("main/train.jsonl") for file in fetch.files("home/hf/hub"))
    assert not any(file.endswith(".arrow") for file in fetch.files("home"))
    assert_written_nowhere(fetch.folder)
    del fetch.environment["HF_HOME"]
    assert fetch.dataset(XDG_CACHE_HOME=str(fetch.folder / "xdg")).returncode == 0
    assert fetch.files("xdg") == set()


@pytest.mark.parametrize(
    ("settings", "what", "fix"),
    [
        ({"subset": "mian"}, "org/math has no subset mian; there are: main, socratic", "set datasets.<name>.subset"),
        (
            {"subset": None},
            "org/math consists of subsets, and none is named; there are: main, socratic",
            "set datasets.<name>.subset",
        ),
        ({"split": "val"}, "org/math has no split val; there are: train, test", "set datasets.<name>.split"),
        ({"revision": "v9"}, "org/math has no revision v9; it has: main", "set datasets.<name>.revision to one"),
    ],
)
def test_dataset_settings_that_are_not_there(hub, fetch, settings, what, fix):
    hub.add("dataset", "org/math", dataset())
    assert_fails(fetch.dataset(settings=settings), what, fix)
    assert not [path for path in hub.paths("GET") if path.endswith(".jsonl")], "nothing is downloaded first"


def test_dataset_that_is_a_script(hub, fetch):
    hub.add("dataset", "org/math", {"math.py": b"import datasets", "README.md": b""})
    result = fetch.dataset()
    assert_fails(
        result, "org/math is a Python script (math.py), which datasets no longer runs", "take a copy in Parquet"
    )


def test_dataset_without_data(hub, fetch):
    hub.add("dataset", "org/math", {"README.md": b""})
    result = fetch.dataset(settings={"subset": None})
    assert_fails(result, "org/math holds no data files that can be read", "look at its page on the hub")


def test_dataset_of_files_with_different_columns(hub, fetch):
    hub.add("dataset", "org/math", {"a.jsonl": b'{"a": NaN}', "b.jsonl": jsonl([{"b": 1}])})  # NaN: datasets reads it
    result = fetch.dataset(settings={"subset": None})
    assert result.returncode == 1
    assert "org/math: its files do not make one table: Couldn't cast" in result.stderr
    assert "because column names don't match" in result.stderr


def test_gated_and_missing_datasets(hub, fetch):
    hub.add("dataset", "org/math", dataset(), gated=True)
    result = fetch.dataset()
    what = "org/math is gated: its owners decide who may download it"
    assert_fails(result, what, f"accept its terms on {hub.url}/datasets/org/math, and set HF_TOKEN")
    result = fetch.dataset("org/missing")
    what = "the hub has no dataset org/missing, or does not show it without a token"
    assert_fails(result, what, "check datasets.<name>.source; if it is private, set HF_TOKEN")


# --- the rules --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rules_fetch_once(hub, fetch):
    hub.add("model", "org/tiny", model(), private=True)
    hub.add("dataset", "org/math", dataset())
    math = {"source": "org/math", "subset": "main", "columns": {"prompt": "question", "completion": "answer"}}
    again = {"source": ["org/math"], "subset": "main"}
    config = {"model": {"name": "org/tiny"}, "datasets": {"math": math, "again": again}}
    targets = ["results/models/org--tiny.json", f"results/datasets/{dataset_slug()}.parquet"]

    def snakemake(*arguments: str) -> str:
        (fetch.folder / "config.yaml").write_text(yaml.safe_dump(config))
        where = ["--snakefile", str(ROOT / "Snakefile"), "--directory", str(fetch.folder), "--cores", "1"]
        command = [sys.executable, "-m", "snakemake", *targets, *arguments, *where, "--configfile", "config.yaml"]
        result = fetch.run(command, HF_TOKEN=TOKEN)
        assert result.returncode == 0, result.stderr
        return result.stdout + result.stderr

    snakemake("results/prepared/math/metadata.json")
    assert fetch.json("models/org--tiny.json")["commit"]
    assert fetch.json(f"datasets/{dataset_slug()}.json")["rows"] == 20
    assert fetch.json("prepared/math/metadata.json")["ledger"]["read"] == 20
    assert_written_nowhere(fetch.folder)
    seen = len(hub.requests)
    config["network"] = {"tls": "off"}
    config["model"]["trust_remote_code"] = True
    assert "Nothing to be done" in snakemake()
    assert len(hub.requests) == seen
    config["model"]["revision"] = "main"
    targets[0] = "results/models/org--tiny@main.json"
    assert "fetch_model" in snakemake("--dry-run")


def dataset_slug() -> str:
    from moult.workflow.config import dataset_slug

    return dataset_slug({"subset": "main", "split": "train", "revision": None}, "org/math")
