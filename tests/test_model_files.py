"""Which files of a folder are the model: those that transformers loads, whole, and not quantized."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import change_tensors, make_model

from moult.errors import MoultError
from moult.model.manifest import describe
from moult.model.safetensors import INDEX, read_header, weight_files


def both_ways(folder):
    """A model in shards, and beside them a model.safetensors of other weights."""
    base = make_model(folder, shard="30KB")
    shards = sorted(base.glob("model-*.safetensors"))
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, base / "model.safetensors", {"format": "pt"})
    return base, shards


def loaded(folder) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).state_dict()


def test_a_single_file_beside_shards_is_the_model_as_transformers_has_it(tmp_path):
    base, shards = both_ways(tmp_path / "base")
    assert weight_files(base) == [base / "model.safetensors"]
    mine, theirs = load_file(base / "model.safetensors"), loaded(base)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    manifest = describe(base, "base", trust_remote_code=False)
    assert manifest["ignored"] == [*(path.name for path in shards), INDEX]
    assert "model.safetensors" in manifest["files"] and not set(manifest["ignored"]) & set(manifest["files"])


def test_the_file_that_config_json_names_is_the_model_as_transformers_has_it(tmp_path):
    base, shards = both_ways(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "transformers_weights": INDEX}))
    assert weight_files(base) == shards
    theirs = loaded(base)
    assert all(torch.equal(tensor, theirs[name]) for shard in shards for name, tensor in load_file(shard).items())
    assert describe(base, "base", trust_remote_code=False)["ignored"] == ["model.safetensors"]


def test_nothing_is_ignored_in_a_folder_of_shards(tmp_path):
    base = make_model(tmp_path / "base", shard="30KB")
    manifest = describe(base, "base", trust_remote_code=False)
    assert manifest["ignored"] == [] and INDEX in manifest["files"]


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"text_config": {"quantization_config": {"quant_method": "mxfp4"}}}, "mxfp4"),
    ],
)
def test_a_quantized_model_is_called_that(config, method, tmp_path):
    base = make_model(tmp_path / "base")
    content = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**content, **config}))
    (base / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(MoultError, match=rf"base: the model is quantized \({method}\)") as error:
        describe(base, "base", trust_remote_code=False)
    assert "tune the unquantized base" in error.value.fix


def test_weights_of_few_bits_are_quantized_whatever_the_config_says(tmp_path):
    base = make_model(tmp_path / "base")

    def quantize(tensors):
        name = "model.layers.0.self_attn.q_proj.weight"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(1, 1).to(torch.float8_e8m0fnu)

    change_tensors(base, quantize)
    with pytest.raises(MoultError, match=r"base: the model is quantized \(F8_E4M3, F8_E8M0\)"):
        describe(base, "base", trust_remote_code=False)


def test_a_dtype_that_nobody_here_knows_is_not_a_damaged_file(tmp_path):
    header = json.dumps({"a": {"dtype": "F2_E1M0", "shape": [8], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    with pytest.raises(MoultError, match="a is F2_E1M0, a dtype that Moult does not know"):
        read_header(tmp_path / "x.safetensors")


def test_four_bits_are_half_a_byte(tmp_path):
    header = json.dumps({"a": {"dtype": "F4", "shape": [3, 2], "data_offsets": [0, 3]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    assert read_header(tmp_path / "x.safetensors")[1]["a"].shape == (3, 2)
