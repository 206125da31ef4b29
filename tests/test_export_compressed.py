"""The exports of few bits for vLLM: which rows they are calibrated on, what of the merged model must stay, what is refused."""

import json
import logging
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from exporting import export_python  # noqa: F401 (a fixture)
from layouts import KINDS, make_any
from safetensors.torch import load_file, save_file
from tiny import change_tensors, copy, make_model, make_tokens
from workflow import ROOT

import export_compressed
from moult.errors import MoultError
from moult.exporting.calibration import calibration_rows
from moult.files import read_json, sha256_folder, write_json
from moult.model.safetensors import read_tensors

DEMO_BASE = ROOT / "config" / "demo" / "base"
LOG = logging.getLogger("test")


# --- rows to calibrate on ---


def test_the_rows_are_a_fixed_sample_that_barely_changes_when_the_dataset_grows(tmp_path):
    small, large = (make_tokens(tmp_path / str(rows), rows=rows) / "train.parquet" for rows in (60, 66))
    chosen = calibration_rows(small, 20)
    assert chosen == calibration_rows(small, 20) and len(chosen) == 20
    grown = calibration_rows(large, 20)
    assert sum(row in chosen for row in grown) >= 15
    assert calibration_rows(small, 21)[:20] == chosen
    assert len(calibration_rows(small, 1000)) == 60


def test_the_rows_are_whole_and_of_the_whole_file(tmp_path):
    train = make_tokens(tmp_path, rows=40) / "train.parquet"
    everything = calibration_rows(train, 40)
    assert {len(row) for row in everything} == {20, 21, 22, 23, 24}
    assert calibration_rows(train, 10) != everything[-10:]
    assert [child.name for child in tmp_path.glob("*.tmp*")] == []


# --- gates, without llmcompressor ---


def make_merged(folder: Path, base: Path = DEMO_BASE) -> Path:
    """results/<run> with merged/ and merge.json."""
    copy(base, folder / "merged")
    (folder / "merged" / "README.md").unlink(missing_ok=True)
    write_json(folder / "merge.json", {"files": sha256_folder(folder / "merged")})
    return folder


def test_a_merged_model_that_merge_did_not_write_is_refused(tmp_path):
    run = make_merged(tmp_path / "demo")
    (run / "merged" / "README.md").write_text("a card, which comes later")
    assert export_compressed.merged_files(run / "merged", str(run / "merge.json"))
    change_tensors(run / "merged", lambda tensors: tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1})
    with pytest.raises(
        MoultError, match=r"merged is not what merge wrote: model\.safetensors differ\n  -> run merge again"
    ):
        export_compressed.merged_files(run / "merged", str(run / "merge.json"))


LAYERS = export_compressed.Layers(["a"], {"lm_head": "output"}, [], 128)


def folders(tmp_path: Path, **changes) -> tuple[Path, Path]:
    """A merged model of three tensors, and what an FP8 export of it is; `changes` are made to the export."""
    torch.manual_seed(0)
    weights = {"a.weight": torch.randn(4, 4), "norm.weight": torch.randn(4), "embed.weight": torch.randn(6, 4)}
    merged, export = tmp_path / "merged", tmp_path / "export"
    for folder in (merged, export):
        write_json(folder / "config.json", {})
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    quantized = {"a.weight": weights["a.weight"].to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(4, 1)}
    save_file({**weights, **quantized, **changes}, export / "model.safetensors", metadata={"format": "pt"})
    return merged, export


def test_the_weights_that_stay_are_compared_and_counted(tmp_path):
    merged, export = folders(tmp_path)
    kinds = export_compressed.check_weights(merged, export, LAYERS)
    assert kinds == Counter({"float32": 3, "float8_e4m3fn": 1})


@pytest.mark.parametrize("name", ["norm.weight", "embed.weight", "made.up"])
def test_a_weight_that_is_another_one_is_seen(name, tmp_path):
    merged, export = folders(tmp_path, **{name: torch.ones(4)})
    with pytest.raises(MoultError, match=f"{name} should be the merged model's, and is not"):
        export_compressed.check_weights(merged, export, LAYERS)


def test_a_layer_that_was_not_quantized_is_seen(tmp_path):
    merged, export = folders(tmp_path)
    two = export_compressed.Layers(["a", "b"], {}, [], 128)
    with pytest.raises(MoultError, match="1 of 2 layers are quantized"):
        export_compressed.check_weights(merged, export, two)


def test_norms_in_another_dtype_are_compared_in_the_models(tmp_path):
    merged, export = folders(tmp_path)
    change_tensors(export, lambda tensors: tensors | {"norm.weight": tensors["norm.weight"].bfloat16()})
    export_compressed.check_weights(merged, export, LAYERS)


def test_tensors_that_transformers_does_not_load_are_copied(tmp_path):
    """And vLLM is told that their layers are not quantized."""
    merged, export = folders(tmp_path)
    change_tensors(
        merged, lambda tensors: tensors | {"tower.b.weight": torch.ones(2, 2), "tower.b.bias": torch.ones(2)}
    )
    assert export_compressed.add_unloaded(merged, export, LOG) == ["tower.b"]
    index = read_json(export / "model.safetensors.index.json")["weight_map"]
    assert index["tower.b.bias"] == "model-copied.safetensors" and index["a.weight"] == "model-quantized.safetensors"
    assert not (export / "model.safetensors").exists()
    export_compressed.check_weights(merged, export, LAYERS)
    assert export_compressed.add_unloaded(merged, export, LOG) == []


@pytest.mark.parametrize("error", [AttributeError("'Linear' has no weight\nand more"), NotImplementedError()])
def test_what_a_library_says_of_a_model_that_it_cannot_do_is_one_message(error):
    with pytest.raises(MoultError) as caught, export_compressed.refusing("mamba2", "w4a16"):
        raise error
    said = str(error).split("\n")[0] or "NotImplementedError"
    assert caught.value.what == f"w4a16 of a model of the type mamba2 cannot be made, or not be loaded: {said}"
    assert caught.value.fix.startswith("export it as GGUF (gguf-q8_0)") and caught.value.__cause__ is error


def test_a_message_of_our_own_stays_as_it_is():
    own = MoultError("out of memory while quantizing", "use a GPU with more memory", 78)
    with pytest.raises(MoultError) as caught, export_compressed.refusing("llama", "fp8"):
        raise own
    assert caught.value is own


# --- the stage ---


def run_export(python: str, run: Path, format: str, out: Path, train: Path | None = None, rows: int = 8):
    """Run the stage. Returns (exit code, what it said)."""
    settings = json.dumps({"calibration_rows": rows, "trust_remote_code": False})
    command = [python, "scripts/export_compressed.py", "--run", "demo", "--format", format, "--settings", settings]
    command += ["--merged", str(run / "merged"), "--merge", str(run / "merge.json"), "--log-file", str(out / "log")]
    command += [
        "--model",
        str(out / "model"),
        "--made",
        str(out / "made.json"),
        "--train",
        *([str(train)] if train else []),
    ]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stderr


def check_export(run: Path, out: Path, kinds: dict) -> dict:
    """What holds of every format. Returns made.json."""
    model, merged, made = out / "model", run / "merged", read_json(out / "made.json")
    assert made["files"] == sha256_folder(model)
    assert made["bytes"] == sum(path.stat().st_size for path in model.rglob("*")) and made["tensors"] == kinds
    assert made["made_from"] == sha256_folder(merged)
    for name in set(made["made_from"]) - {"config.json", "model.safetensors"}:
        assert (model / name).read_bytes() == (merged / name).read_bytes(), name
    config = read_json(model / "config.json")
    assert config.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert config == read_json(merged / "config.json")
    before, after = load_file(merged / "model.safetensors"), load_file(model / "model.safetensors")
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_norm.weight"):
        assert torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype
    assert {oct(path.stat().st_mode & 0o777) for path in model.iterdir()} == {"0o644"}
    recipe = (model / "recipe.yaml").read_text()
    assert yaml.safe_load(recipe) and "/" not in recipe
    return made


@pytest.mark.slow
def test_fp8_of_the_demo(export_python, tmp_path):  # noqa: F811
    run = make_merged(tmp_path / "demo")
    code, said = run_export(export_python, run, "fp8", tmp_path / "fp8")
    assert code == 0, said
    assert "not quantized (output): lm_head" in said and "it loads; KL to the merged model" in said
    made = check_export(run, tmp_path / "fp8", {"bfloat16": 46, "float8_e4m3fn": 28})
    assert made["calibration"] is None and made["fallback"] == 0
    assert {"llmcompressor", "compressed-tensors", "transformers"} < set(made["versions"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "kinds"),
    [("w8a8", {"bfloat16": 46, "int8": 28}), ("w4a16", {"bfloat16": 46, "int32": 28, "int64": 28})],
)
def test_calibrated_formats_open_train_only_and_give_the_same_bytes_twice(export_python, format, kinds, tmp_path):  # noqa: F811
    """Beside train.parquet lie pipes in place of val and test: who opens one waits for ever."""
    run = make_merged(tmp_path / "demo")
    tokens = make_tokens(tmp_path / "tokens", rows=12)
    for part in ("val", "test"):
        (tokens / f"{part}.parquet").unlink()
        os.mkfifo(tokens / f"{part}.parquet")
    outs = [tmp_path / name for name in ("first", "second")]
    for out in outs:
        code, said = run_export(export_python, run, format, out, tokens / "train.parquet")
        assert code == 0, said
    made = check_export(run, outs[0], kinds)
    wanted = calibration_rows(tokens / "train.parquet", 8)
    assert made["calibration"] == {"rows": 8, "tokens": sum(map(len, wanted))}
    assert (outs[0] / "made.json").read_bytes() == (outs[1] / "made.json").read_bytes()


@pytest.mark.slow
def test_other_rows_make_other_weights(export_python, tmp_path):  # noqa: F811
    run, train = make_merged(tmp_path / "demo"), make_tokens(tmp_path / "tokens") / "train.parquet"
    for rows in (1, 8):
        code, said = run_export(export_python, run, "w4a16", tmp_path / str(rows), train, rows)
        assert code == 0, said
    one, eight = (read_json(tmp_path / str(rows) / "made.json")["files"] for rows in (1, 8))
    assert {name for name in one if one[name] != eight[name]} == {"model.safetensors"}


@pytest.mark.slow
def test_towers_and_linear_attention_stay(export_python, tmp_path):  # noqa: F811
    """Qwen3.5: Moult tunes the text model, vLLM loads the towers too, and the two name the layers differently."""
    text, tower = KINDS["qwen3_5"]["towers"]
    base = make_any(tmp_path / "base", "qwen3_5", torch.bfloat16, towers=({**text, "vocab_size": 768}, tower))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_BASE / name, base)
    run, out = make_merged(tmp_path / "run", base), tmp_path / "out"
    code, said = run_export(export_python, run, "fp8", out)
    assert code == 0, said
    before, after = read_tensors(run / "merged"), read_tensors(out / "model")
    quantized = {name.removesuffix("_scale") for name in after if name.endswith("_scale")}
    assert quantized == {
        name for name in before if re.search(r"language_model.*(mlp|self_attn)\.\w+_proj\.weight", name)
    }
    assert set(before) | {f"{name}_scale" for name in quantized} == set(after)
    ignored = set(read_json(out / "model/config.json")["quantization_config"]["ignore"])
    for name in (
        "layers.0.linear_attn.out_proj",
        "language_model.layers.0.linear_attn.out_proj",
        "visual.blocks.0.attn.qkv",
    ):
        assert f"model.{name}" in ignored


@pytest.mark.slow
def test_groups_and_layers_that_do_not_fit(export_python, tmp_path):  # noqa: F811
    """Widths of 64 and 96 take groups of 32; a width of 40 stays as it is."""
    tokens = make_tokens(tmp_path / "tokens") / "train.parquet"
    for width, group, left in ((96, 32, 0), (40, 64, 2)):
        base = make_model(tmp_path / f"base{width}", "llama", torch.bfloat16, intermediate_size=width)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(DEMO_BASE / name, base)
        grow_vocabulary(base)
        run, out = make_merged(tmp_path / str(width), base), tmp_path / f"out{width}"
        code, said = run_export(export_python, run, "w4a16", out, tokens)
        assert code == 0, said
        assert f"groups of {group} inputs: 128 does not divide all widths" in said
        assert read_json(out / "made.json")["fallback"] == left
        assert ("(40 inputs, not a multiple of 32): model.layers.0.mlp.down_proj" in said) == (left > 0)
        groups = read_json(out / "model/config.json")["quantization_config"]["config_groups"]
        assert groups["group_0"]["weights"]["group_size"] == group


def grow_vocabulary(folder: Path, size: int = 768) -> None:
    """As large as the demo's tokenizer needs."""
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "vocab_size": size})

    def longer(tensors):
        names = [name for name, tensor in tensors.items() if len(tensor) == config["vocab_size"]]
        return tensors | {name: torch.randn(size, tensors[name].shape[1]).bfloat16() for name in names}

    change_tensors(folder, longer)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "format", "what"),
    [
        ("gpt2", "fp8", "fp8 quantizes linear layers, and a model of the type gpt2 has none for it"),
        (
            "llama",
            "w4a16",
            "w4a16 quantizes linear layers, and a model of the type llama has none for it: their widths are not ",
        ),
        (
            "qwen3_moe",
            "fp8",
            "fp8 of a mixture of experts (qwen3_moe) cannot be checked: transformers does not load what ",
        ),
        ("llama", "w8a8", "w8a8 needs rows to calibrate on"),
    ],
)
def test_what_cannot_be_made_is_said_in_one_message(export_python, kind, format, what, tmp_path):  # noqa: F811
    sizes = {"hidden_size": 40, "intermediate_size": 40, "head_dim": 10} if kind == "llama" else {}
    make = make_any if kind == "qwen3_moe" else make_model
    run = make_merged(tmp_path / "run", make(tmp_path / "base", kind, torch.bfloat16, **sizes))
    train = make_tokens(tmp_path / "tokens") / "train.parquet" if format == "w4a16" else None
    code, said = run_export(export_python, run, format, tmp_path / "out", train)
    assert code == 1 and f"failed: {what}" in said, said
    assert said.count("what to do: ") == 1 and "Traceback" not in said
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {"log", "log.json", "attempts"}
