"""merge: bit for bit what peft merges, in little memory, and never half a model."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmark_merge import WATCH
from merging import make_large_adapter, make_large_model, make_plan, run_merge
from planning import LORA
from safetensors.torch import load_file
from tiny import change_tensors, copy, make_adapter, make_model

import merge
from moult.errors import MoultError
from moult.files import read_json, sha256_folder
from moult.model import safetensors as weights
from moult.model.safetensors import read_header, read_tensors


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


CASES = {
    "llama fp32": ({}, {}),
    "llama bf16 in shards": ({"dtype": torch.bfloat16, "shard": "30KB"}, {}),
    "llama fp16": ({"dtype": torch.float16}, {}),
    "tied embeddings": ({"kind": "qwen3", "tie_word_embeddings": True, "dtype": torch.bfloat16}, {}),
    "Conv1D, square ones too": ({"kind": "gpt2", "dtype": torch.bfloat16}, {}),
    "rsLoRA": ({}, {"use_rslora": True}),
    "rank and alpha patterns": (
        {},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"v_proj": 32, "q_proj": 3}},
    ),
    "two layers only": ({}, {"target_modules": ["q_proj", "down_proj"]}),
    "gaussian start": ({}, {"init_lora_weights": "gaussian"}),
}


@pytest.mark.parametrize("case", CASES)
def test_streamed_merge_gives_the_bits_of_peft(case, tmp_path):
    model, lora = CASES[case]
    base = make_model(tmp_path / "base", **model)
    adapter = make_adapter(base, tmp_path / "adapter", {**LORA, **lora})
    targets = read_json(make_plan(base, tmp_path, {**LORA, **lora}))["targets"]
    merged, _ = run_merge(base, adapter, tmp_path)
    assert read_json(tmp_path / "merge.json")["how"] == "streamed"
    expected, before, after = merged_by_peft(base, adapter), all_tensors(base), all_tensors(merged)
    assert set(after) == set(before)
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor.view(torch.uint8), expected[name].contiguous().view(torch.uint8)), name
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {target["tensor"] for target in targets.values()}
    assert {path.name for path in merged.glob("*.safetensors")} == {path.name for path in base.glob("*.safetensors")}


def test_a_tied_base_that_stores_only_the_head(tmp_path):
    base = make_model(tmp_path / "base", kind="qwen3", tie_word_embeddings=True)
    change_tensors(
        base,
        lambda tensors: {"lm_head.weight" if "embed_tokens" in name else name: t for name, t in tensors.items()},
    )
    adapter = make_adapter(base, tmp_path / "adapter", LORA)
    make_plan(base, tmp_path, LORA)
    merged, _ = run_merge(base, adapter, tmp_path)
    expected = merged_by_peft(base, adapter)
    assert "lm_head.weight" in all_tensors(merged) and "model.embed_tokens.weight" not in all_tensors(merged)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in all_tensors(merged).items())


def test_a_base_that_stores_its_weights_without_the_prefix(tmp_path):
    base = make_model(tmp_path / "base", kind="gpt2")
    change_tensors(
        base, lambda tensors: {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    )
    adapter = make_adapter(base, tmp_path / "adapter", LORA)
    make_plan(base, tmp_path, LORA)
    merged, _ = run_merge(base, adapter, tmp_path)
    expected = merged_by_peft(base, adapter)
    after = all_tensors(merged)
    assert "h.0.attn.c_attn.weight" in after
    assert all(torch.equal(tensor, expected[f"transformer.{name}"]) for name, tensor in after.items())


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"trainable_token_indices": [5, 6]}, "trainable_token_indices"),
    ],
)
def test_what_cannot_be_streamed_goes_through_peft_and_says_so(lora, reason, tmp_path):
    kind = "gpt2" if reason == "bias" else "llama"
    base = make_model(tmp_path / "base", kind=kind)
    lora = {**LORA, **lora, "target_modules": ["c_attn"] if kind == "gpt2" else ["q_proj"]}
    adapter = make_adapter(base, tmp_path / "adapter", lora)
    make_plan(base, tmp_path, lora)
    merged, log = run_merge(base, adapter, tmp_path)
    assert any("with peft" in line and reason in line for line in log.lines)
    assert read_json(merged / "metadata.json")["how"] == "peft"
    expected = merged_by_peft(base, adapter)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in all_tensors(merged).items())
    # config.json is the base's: what peft wrote may be of another version of transformers.
    assert (merged / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_transformers_loads_the_result_and_it_answers_as_the_adapter_does(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = make_model(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", LORA, scale=0.3)
    make_plan(base, tmp_path, LORA)
    merged, _ = run_merge(base, adapter, tmp_path)
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base)(ids).logits.log_softmax(-1)
        tuned = AutoModelForCausalLM.from_pretrained(merged)(ids).logits.log_softmax(-1)
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)(
            ids
        ).logits.log_softmax(-1)
    divergence = (adapted.exp() * (adapted - tuned)).sum(-1).mean()
    assert divergence < 1e-6
    assert (plain.exp() * (plain - tuned)).sum(-1).mean() > 1e-3


def test_the_folder_holds_what_a_server_needs(tmp_path):
    base = make_model(tmp_path / "base", dtype=torch.bfloat16, shard="30KB")
    for name, text in {
        "tokenizer.json": "{}",
        "tokenizer_config.json": '{ "odd":   "spacing"}',
        "merges.txt": "a b",
        "LICENSE": "as is",
        "README.md": "the base's card",
        "pytorch_model.bin": "pickle",
    }.items():
        (base / name).write_text(text)
    adapter = make_adapter(base, tmp_path / "adapter", LORA)
    make_plan(base, tmp_path, LORA)
    merged, _ = run_merge(base, adapter, tmp_path)
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "merges.txt",
        "LICENSE",
        "config.json",
        "generation_config.json",
    ):
        assert (merged / name).read_bytes() == (base / name).read_bytes(), name
    assert (merged / "chat_template.jinja").read_text() == (tmp_path / "tokens" / "chat_template.jinja").read_text()
    assert not (merged / "pytorch_model.bin").exists() and not (merged / "README.md").exists()
    metadata = read_json(merged / "metadata.json")
    assert set(metadata["files"]) == {path.name for path in merged.iterdir()} - {"metadata.json"}
    assert str(tmp_path) not in json.dumps({key: value for key, value in metadata.items() if key != "base"})
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in merged.iterdir())


def test_stop_tokens_that_the_base_does_not_know_are_added(tmp_path):
    base = make_model(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", LORA)
    make_plan(base, tmp_path, LORA)
    report = tmp_path / "tokens" / "report.json"
    content = read_json(report)
    content["stop"] = {"added": [7], "generation_stop_ids": [2, 7], "token_ids": [7]}
    report.write_text(json.dumps(content))
    merged, _ = run_merge(base, adapter, tmp_path)
    assert read_json(merged / "generation_config.json")["eos_token_id"] == [2, 7]


def drop_one(tensors):
    tensors.pop(next(name for name in tensors if "layers.0" in name and "q_proj.lora_A" in name))


def add_one(tensors):
    tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 64)


def reshape_one(tensors):
    name = next(name for name in tensors if "q_proj.lora_B" in name)
    tensors[name] = torch.zeros(65, 4)


def overflow(tensors):
    name = next(name for name in tensors if "q_proj.lora_B" in name)
    tensors[name] = torch.full_like(tensors[name], 3e38)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_one, "the adapter lacks base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"),
        (add_one, "1 tensors match no layer of the base: base_model.model.model.layers.9"),
        (reshape_one, "is (65, 4), the base needs (64, 4)"),
        (overflow, "not finite after the merge"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_and_nothing_is_left(change, message, tmp_path):
    base = make_model(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", LORA)
    make_plan(base, tmp_path, LORA)
    change_tensors(adapter, change, "adapter_model.safetensors")
    with pytest.raises(MoultError) as error:
        run_merge(base, adapter, tmp_path)
    assert message in error.value.what
    assert not list(tmp_path.glob("merged*")) and not (tmp_path / "merge.json").exists()


def test_a_base_that_has_changed_since_the_plan_is_refused(tmp_path):
    base = make_model(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", LORA)
    make_plan(base, tmp_path, LORA)
    other = make_model(tmp_path / "other", intermediate_size=128)
    with pytest.raises(MoultError, match=r"run plan again|of another base"):
        run_merge(other, adapter, tmp_path)


def test_an_older_merged_folder_stays_until_the_new_one_is_whole(tmp_path):
    base = make_model(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", LORA)
    make_plan(base, tmp_path, LORA)
    merged, _ = run_merge(base, adapter, tmp_path)
    before = (merged / "model.safetensors").read_bytes()
    broken = copy(adapter, tmp_path / "broken")
    change_tensors(broken, overflow, "adapter_model.safetensors")
    with pytest.raises(MoultError):
        run_merge(base, broken, tmp_path)
    assert (merged / "model.safetensors").read_bytes() == before


def header(entries) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(4)


@pytest.mark.parametrize(
    "places", [["a"], {}, {"a": "../other/model.safetensors"}, {"a": "/model.safetensors"}, {"a": "pytorch_model.bin"}]
)
def test_an_index_lists_safetensors_files_beside_it(places, tmp_path):
    folder = make_model(tmp_path / "base")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(MoultError, match=r"index\.json: lists .* where safetensors files beside it belong"):
        read_tensors(folder)


def test_a_kill_between_shards_leaves_nothing_that_passes_for_whole(tmp_path, monkeypatch):
    base = make_model(tmp_path / "base", shard="30KB")
    adapter = make_adapter(base, tmp_path / "adapter", LORA)
    make_plan(base, tmp_path, LORA)
    merged, _ = run_merge(base, adapter, tmp_path)
    whole = sha256_folder(merged)
    merged.rename(tmp_path / "old")
    (tmp_path / "merge.json").unlink()
    second, child = sorted(base.glob("*.safetensors"))[1], os.fork()
    if child == 0:
        header = weights.read_header

        def read_header_or_die(path, *fix):
            if path == second and list(tmp_path.glob("merged.tmp-*/*.safetensors")):
                os.kill(os.getpid(), signal.SIGKILL)
            return header(path, *fix)

        weights.read_header = read_header_or_die
        try:
            run_merge(base, adapter, tmp_path)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not merged.exists() and not (tmp_path / "merge.json").exists() and list(tmp_path.glob("merged.tmp-*"))
    run_merge(base, adapter, tmp_path)
    assert sha256_folder(merged) == whole and not list(tmp_path.glob("merged.tmp-*"))


def test_a_disk_that_is_too_small_is_named_before_the_first_byte(tmp_path, monkeypatch):
    base = make_model(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", LORA)
    make_plan(base, tmp_path, LORA)
    size = (base / "model.safetensors").stat().st_size
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size - 1))
    with pytest.raises(
        MoultError, match=rf"merged: not enough disk space: {size:,} bytes are needed, {size - 1:,} are free"
    ):
        run_merge(base, adapter, tmp_path)
    assert not list(tmp_path.glob("merged*"))


def test_headers_that_lie_are_named(tmp_path):
    base = make_model(tmp_path / "base")
    file = base / "model.safetensors"
    whole = file.read_bytes()
    for data, message in [
        (whole[:-100], "its header says"),
        (whole[:4], "its header is longer than the file"),
        ((10**9).to_bytes(8, "little") + whole[8:], "its header is longer than the file"),
        (whole[:8] + b"x" + whole[9:], "its header is not a JSON object"),
        (whole + b"more", "its header says"),
        (header([]), "its header is not a JSON object"),
        (header({"__metadata__": [1]}), "its metadata is no object of texts"),
        (
            header({"a": {"dtype": "U8", "shape": [-1, -4], "data_offsets": [0, 4]}}),
            "the header's entry of a is not one",
        ),
        (header({"a": {"dtype": "U8", "shape": [4], "data_offsets": [1, 5]}}), "a does not begin where"),
        (
            header({name: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} for name in "ab"}),
            "b does not begin where",
        ),
    ]:
        file.write_bytes(data)
        with pytest.raises(MoultError, match="not a whole safetensors file") as error:
            read_header(file)
        assert message in str(error.value) and str(file) in str(error.value)


@pytest.mark.slow
def test_two_gigabytes_in_shards_within_one_gigabyte_of_memory(tmp_path):
    """Peak memory of the whole process, and the bytes are peft's."""
    from transformers import AutoConfig

    sizes = {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 20,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    }
    base = make_large_model(tmp_path / "base", AutoConfig.for_model("llama", **sizes))
    assert sum(path.stat().st_size for path in base.glob("*.safetensors")) > 2e9
    lora = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    make_plan(base, tmp_path, lora)
    adapter = make_large_adapter(read_json(tmp_path / "plan.json")["targets"], tmp_path / "adapter", lora)
    script = Path(merge.__file__)
    command = [
        sys.executable,
        script,
        "--model",
        base,
        "--plan",
        tmp_path / "plan.json",
        "--tokens",
        tmp_path / "tokens",
    ]
    command += ["--adapter", adapter, "--merged", tmp_path / "merged", "--summary", tmp_path / "merge.json"]
    watched = [sys.executable, "-c", WATCH, *map(str, command), "--log-file", str(tmp_path / "merge.log")]
    done = subprocess.run(watched, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 1024 * 1024, "KiB of peak memory"
    expected = merged_by_peft(base, adapter)
    for name, tensor in all_tensors(tmp_path / "merged").items():
        assert torch.equal(tensor.view(torch.int16), expected[name].view(torch.int16)), name
    assert set(read_tensors(tmp_path / "merged")) == set(read_tensors(base))
