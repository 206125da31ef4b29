"""Any rows through prepare, encode and plan: all accounted for, whatever the number of processes, and nothing else touched."""

import json
import logging
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from examples import examples
from fuzz.anything import ANY_ROW, TEXTS, dumped, one_error
from hypothesis import given
from hypothesis import strategies as st
from tokenizers_for_tests import DEMO
from workflow import ROOT

import encode
import plan
import prepare
from moult.data import portions, readers
from moult.errors import MoultError
from moult.files import sha256_folder
from moult.pages.page import render
from moult.workflow.config import load_schema, resolve
from moult.workflow.stages import stage_settings

LOG = logging.getLogger("test")
SCHEMA = load_schema(str(ROOT / "config"))
GOOD = [{"prompt": f"How many is {n} and {n}, please tell me?", "completion": f"It is {n}."} for n in range(6)]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder to run in: a base model, rows, and results/."""
    folder = tmp_path_factory.mktemp("any")
    shutil.copytree(DEMO, folder / "base")
    return folder


def stages(config: dict, threads: int) -> None:
    """prepare, encode and plan, as their rules call them, in results/."""
    folder = "results/odd"
    files = {
        name: f"{folder}/{name}{suffix}"
        for name, suffix in (("train", ".jsonl"), ("val", ".jsonl"), ("test", ".jsonl"), ("metadata", ".json"))
    }
    prepare.prepare(stage_settings(config, "prepare", "odd"), SimpleNamespace(**files, threads=threads), LOG)
    given_rows = {name: files[name] for name in ("train", "val", "test")}
    templates = str(ROOT / "config" / "chat_templates")
    tokens = f"{folder}/tokens"
    options = {"model": "base", "templates": templates, "without": [], "out": tokens, "threads": threads}
    arguments = SimpleNamespace(**given_rows, **options)
    encode.encode(stage_settings(config, "encode", "odd"), arguments, LOG)
    plan.plan(
        stage_settings(config, "plan", "odd"),
        SimpleNamespace(model="base", tokens=tokens, eval={}, out=f"{folder}/plan.json"),
        LOG,
    )


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def handle_starttag(self, tag, attributes):
        self.seen.add((tag, *(name for name, _ in attributes)))


@pytest.mark.slow
@examples(25)
@given(
    rows=st.lists(
        ANY_ROW | TEXTS.map(lambda text: {"prompt": f"Say {text}.", "completion": text}), min_size=1, max_size=8
    ),
    max_length=st.sampled_from([16, 40, 512]),
    languages=st.sampled_from([[], ["en"]]),
    overlength=st.sampled_from(["drop", "truncate"]),
)
def test_any_rows_through_the_stages(checkout, monkeypatch, rows, **dataset):
    monkeypatch.chdir(checkout)
    monkeypatch.setattr(portions, "PORTION_ROWS", 2)  # so that all processes get some
    monkeypatch.setattr(readers, "SIZE", 100)
    (checkout / "rows.jsonl").write_text("".join(dumped(row) + "\n" for row in [*GOOD, *rows]))
    dataset |= {
        "source": "rows.jsonl",
        "val_size": 0.3,
        "broken": "drop",
        "unrenderable": "drop",
        "max_token_loss": 1.0,
    }
    config = resolve({"model": {"name": "./base"}, "datasets": {"odd": dataset}}, SCHEMA)
    shutil.rmtree("results", ignore_errors=True)
    before = sha256_folder(checkout)
    outcomes = []
    for threads in (1, 2):
        shutil.rmtree("results", ignore_errors=True)
        try:
            stages(config, threads)
            outcomes.append(sha256_folder("results"))
        except MoultError as error:
            outcomes.append(one_error(error))
    results = sha256_folder("results") if (checkout / "results").exists() else {}
    assert sha256_folder(checkout) == before | {f"results/{name}": digest for name, digest in results.items()}
    assert outcomes[0] == outcomes[1]
    if isinstance(outcomes[0], dict):
        check_accounts(checkout / "results" / "odd")
    shutil.rmtree("results", ignore_errors=True)


def check_accounts(folder) -> None:
    ledger = json.loads((folder / "metadata.json").read_text())["ledger"]
    report = json.loads((folder / "tokens" / "report.json").read_text())
    assert ledger["read"] == sum(report[part]["rows"] for part in ("train", "val")) + sum(ledger["dropped"].values())
    for part in ("train", "val"):
        account, length = report[part], report[part]["length"]
        table = pq.read_table(folder / "tokens" / f"{part}.parquet").to_pylist()
        trained = sum(label != -100 for row in table for label in row["labels"])
        shown = {row["id"] for row in table}
        assert account["rows"] >= len(shown) + sum(account["unrenderable"].values())
        assert len(table) == account["sequences"]
        assert trained == account["trained_tokens"] == length["trained_tokens_made"] - length["trained_tokens_lost"]
    page, empty = Tags(), Tags()
    page.feed((folder / "tokens" / "preview.html").read_text(encoding="utf-8"))
    empty.feed(render("preview.html", examples=[], origin=""))
    assert page.seen - empty.seen <= {("h2",), ("pre", "dir"), ("span", "class", "title")}
