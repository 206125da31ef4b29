"""Model cards that tell what is so, and an upload of what was measured and nothing else."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fake_hub import TOKEN, FakeHub, environment
from workflow import ROOT, snakemake

from model_card import card, front_matter, provenance, with_vllm


@pytest.fixture(scope="module")
def carded(demo, tmp_path_factory):
    """The demo with its cards."""
    folder = tmp_path_factory.mktemp("cards") / "demo"
    shutil.copytree(demo, folder, copy_function=shutil.copy2)
    snakemake(folder, "results/demo/cards/merged.md")
    return folder


def read_card(path: Path) -> tuple[dict, str]:
    _, header, text = path.read_text().split("---\n", 2)
    return yaml.safe_load(header), text


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "library"), [("adapter", "peft"), ("merged", "transformers")])
def test_a_card_has_what_the_hub_and_a_reader_need(carded, kind, library):
    folder = carded / "results/demo" / kind
    header, text = read_card(folder / "README.md")
    metrics = json.loads((carded / "results/demo/metrics.json").read_text())
    assert header["library_name"] == library and header["license"] == "apache-2.0" and header["language"] == ["en"]
    assert "base_model" not in header and "datasets" not in header  # neither is on the hub
    perplexity = header["model-index"][0]["results"][0]["metrics"][0]
    assert perplexity["value"] == round(metrics["likelihood"]["tuned"]["perplexity"]["value"], 4)
    assert "difference [95 %]" in text and re.search(r"nats per token +\S+ +\S+ +-\S+ \[-\S+, -\S+\]", text)
    assert metrics["provenance"]["adapter_sha256"] in text and "**helped**" in text
    assert str(carded) not in (folder / "README.md").read_text() and "results/" not in text
    assert (carded / f"results/demo/cards/{kind}.md").read_text() == (folder / "README.md").read_text()
    for file in ("chat_template.jinja", "generation_config.json", "tokenizer.json"):
        assert (folder / file).exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_a_card_s_example_runs(carded, kind):
    _, text = read_card(carded / f"results/demo/{kind}/README.md")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].replace("path/to/this/folder", f"results/demo/{kind}")
    code = code.replace("Hello", "What is the capital of Japan?")
    done = subprocess.run([sys.executable, "-c", code], cwd=carded, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and '"answer"' in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("kind", "reasons", "kwargs", "command"),
    [
        ("merged", [], {}, "vllm serve path/to/this/folder --served-model-name demo\n"),
        ("merged", [], {"a": "x y"}, '--served-model-name demo --default-chat-template-kwargs \'{"a": "x y"}\'\n'),
        ("adapter", [], {}, "vllm serve org/base --enable-lora --max-lora-rank 64 --lora-modules demo=adapter \\\n"),
        ("adapter", [], {}, "--chat-template adapter/chat_template.jinja --generation-config adapter\n"),
        ("adapter", ["use_dora"], {}, "vLLM cannot serve this adapter (use_dora): serve the merged model."),
    ],
)
def test_the_command_for_vllm_is_the_one_that_was_tested(kind, reasons, kwargs, command, tmp_path):
    """The flags of launch.vllm_arguments; without them vLLM refuses the rank, or answers with the base's template."""
    serve = {"reasons": reasons, "max_lora_rank": 64}
    for name in ("chat_template.jinja", "generation_config.json"):
        (tmp_path / name).touch()
    text = with_vllm(kind, "demo", str(tmp_path), "org/base", serve, {"chat_template_kwargs": kwargs})
    assert command in text and ("```" in text) == (not reasons)


@pytest.mark.parametrize(("quantization", "told"), [("nf4", True), (None, False)])
def test_a_base_that_was_quantized_in_training_is_told(quantization, told):
    training = {"lora": {"r": 4}, "train": {}, "quantization": quantization}
    made = {
        "training": training,
        "step": 1,
        "steps": 2,
        "ended": {"step": 2},
        "seed": 0,
        "template_sha256": "t",
        "adapter_sha256": "a",
    }
    made["versions"] = dict.fromkeys(("torch", "transformers", "trl", "peft"), "1")
    assert ("| base, in training | quantized to nf4 |" in provenance({"provenance": made})) == told


def test_an_adapter_without_a_template_names_none(tmp_path):
    """Of a run on plain text; vLLM would refuse to start."""
    (tmp_path / "generation_config.json").touch()
    serve = {"reasons": [], "max_lora_rank": 8}
    text = with_vllm("adapter", "demo", str(tmp_path), "org/base", serve, {"chat_template_kwargs": {}})
    assert "    --generation-config adapter\n" in text and "--chat-template" not in text


@pytest.mark.slow
def test_a_card_makes_nothing_stale(carded):
    assert "Nothing to be done" in snakemake(carded, "results/demo/metrics.json", "results/demo/cards/merged.md")
    merge = json.loads((carded / "results/demo/merge.json").read_text())
    snakemake(carded, "results/demo/cards/merged.md", "--forcerun", "merge")
    assert json.loads((carded / "results/demo/merge.json").read_text()) == merge
    assert (carded / "results/demo/merged/README.md").exists()


@pytest.mark.slow
def test_of_the_hub_is_named_what_came_from_it(carded):
    metrics = json.loads((carded / "results/demo/metrics.json").read_text())
    metrics["provenance"]["base"] |= {"name": "Qwen/Qwen3-0.6B", "commit": "c" * 40}
    metrics["provenance"]["data"][0] |= {"name": "openai/gsm8k", "commit": "d" * 40}
    settings = {"languages": [], "chat_template_kwargs": {"enable_thinking": False}}
    plan = {"serve": {"reasons": [], "max_lora_rank": 16}, "auto_class": "AutoModelForCausalLM"}
    text = card("merged", "gsm8k", "merged", metrics, plan, {}, settings)
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["base_model"] == "Qwen/Qwen3-0.6B" and header["base_model_relation"] == "finetune"
    assert header["datasets"] == ["openai/gsm8k"] and "license" not in header and "language" not in header
    assert "(commit `cccccccccccc`)" in text and "enable_thinking=False" in text


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: mit\n---\n# a", {"license": "mit"}),
        ("# no metadata", {}),
        ("---\n- a list\n---\n", {}),
        ("---\na: [\n---\n", {}),
        (None, {}),
    ],
)
def test_the_metadata_of_the_base_s_card(text, found, tmp_path):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert front_matter(tmp_path / "README.md") == found


# --- publish ---


def publish(folder: Path, hub: FakeHub, home: Path, *arguments: str, token: str = TOKEN) -> subprocess.CompletedProcess:
    command = [sys.executable, "scripts/tools/publish.py", "--run", "demo", "--repo", "tester/demo", *arguments]
    variables = environment(home, HF_ENDPOINT=hub.url, HF_TOKEN=token, HF_HUB_DISABLE_XET="1")
    return subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=variables,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("what", ["merged", "adapter"])
def test_what_was_measured_goes_up_whole(carded, what, tmp_path):
    (carded / "results/demo" / what / "left-over.bin").write_bytes(b"not of this model")
    with FakeHub() as hub:
        done = publish(carded, hub, tmp_path, "--what", what, "--yes")
        assert done.returncode == 0, done.stderr
        repository = hub.repositories["model", "tester/demo"]
        there = repository.commits[repository.refs["main"]]
    (carded / "results/demo" / what / "left-over.bin").unlink()
    here = {path.name: path.read_bytes() for path in (carded / "results/demo" / what).iterdir() if path.name[0] != "."}
    uploaded_card = there.pop("README.md").decode()
    assert "tester/demo" in uploaded_card and "path/to/this/folder" not in uploaded_card
    assert there == {name: data for name, data in here.items() if name != "README.md"}
    assert repository.private and TOKEN not in done.stderr
    for name in there:
        assert f"{name} " in done.stderr  # shown before


@pytest.mark.slow
def test_what_another_model_left_there_is_removed_and_nothing_else(carded, tmp_path):
    with FakeHub() as hub:
        old = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "vocab.json", "adapter_config.json")
        old += ("additional_chat_templates/tool_use.jinja",)
        own = ("LICENSE", "NOTICE.md", "figure.png", "gguf/model.gguf")
        hub.add("model", "tester/demo", dict.fromkeys((*old, *own, "config.json"), b"{}"))
        done = publish(carded, hub, tmp_path, "--yes")
        assert done.returncode == 0, done.stderr
        assert "tester/demo (existing repository, PUBLIC):" in done.stderr
        assert set(re.findall(r"(\S+) +will be deleted$", done.stderr, re.MULTILINE)) == set(old)
        repository = hub.repositories["model", "tester/demo"]
        there = repository.commits[repository.refs["main"]]
        assert not set(old) & set(there) and set(own) <= set(there)


@pytest.mark.slow
def test_the_question_is_seen_on_a_terminal(carded, tmp_path):
    with FakeHub() as hub:
        ours, theirs = os.openpty()
        command = [sys.executable, "scripts/tools/publish.py", "--run", "demo", "--repo", "tester/demo"]
        variables = environment(tmp_path, HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1")
        process = subprocess.Popen(command, cwd=carded, stdin=theirs, stdout=theirs, stderr=theirs, env=variables)
        os.close(theirs)
        seen = b""
        while b"[y/N]" not in seen:
            seen += os.read(ours, 4096)
        os.write(ours, b"n\n")
        assert process.wait(60) == 1 and not hub.repositories
        assert b"nothing was uploaded" in os.read(ours, 65536)
        os.close(ours)


@pytest.mark.slow
def test_nothing_goes_up_unasked_or_changed(carded, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(carded, changed, copy_function=shutil.copy2)
    with FakeHub() as hub:
        done = publish(carded, hub, tmp_path)
        assert (
            done.returncode == 1 and "cannot ask for confirmation" in done.stderr and "model.safetensors" in done.stderr
        )
        (changed / "results/demo/merged/chat_template.jinja").write_text("another")
        done = publish(changed, hub, tmp_path, "--yes")
        assert done.returncode == 1 and "chat_template.jinja was changed after it was measured" in done.stderr
        (changed / "results/demo/adapter/README.md").unlink()
        done = publish(changed, hub, tmp_path, "--yes", "--what", "adapter")
        assert done.returncode == 1 and "README.md does not exist" in done.stderr
        done = publish(carded, hub, tmp_path, "--yes", token="hf_" + "z" * 34)
        assert done.returncode == 1 and "the hub does not accept the token from HF_TOKEN" in done.stderr
        done = publish(carded, hub, tmp_path, "--yes", token="")
        assert (
            done.returncode == 1
            and "there is no token for the upload" in done.stderr
            and "hf auth login" in done.stderr
        )
        assert not hub.repositories


def test_make_names_what_is_missing():
    for arguments, words in ((["serve"], "which run?"), (["publish", "RUN=demo"], "to where?")):
        done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode != 0 and words in done.stderr
