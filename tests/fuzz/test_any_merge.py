"""Any adapter and any base: merged as plain arithmetic says, every tensor used once, or refused by name."""

import json
import logging

import pytest
import torch
from examples import examples
from fuzz.anything import TEXTS, dumped, nested, one_error
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import merge
from moult.errors import MoultError
from moult.model.safetensors import read_header, read_tensors, weight_files

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LAYERS = st.lists(
    st.fixed_dictionaries(
        {
            "shape": st.tuples(st.integers(1, 5), st.integers(1, 5)),
            "r": st.integers(1, 3),
            "dtype": st.sampled_from(sorted(DTYPES)),
            "adapter": st.sampled_from(sorted(DTYPES)),
            "scaling": st.sampled_from([1.0, 0.5, 2.0, -1.0, 0.0, 1 / 3]),
            "transposed": st.booleans(),
            "target": st.booleans(),
            "file": st.integers(0, 2),
        }
    ),
    min_size=1,
    max_size=5,
)
DAMAGE = st.sampled_from(
    [None, None, "lost", "added", "reshaped", "renamed", "base lost", "base reshaped", "plan twice", "int8"]
)


def parts_of(index: int) -> list[str]:
    return [f"base_model.model.l{index}.lora_{side}.weight" for side in "AB"]


def make(folder, layers: list[dict], seed: int) -> tuple[dict, dict, dict]:
    """Base, adapter and plan of these layers, in `folder`: (base tensors, adapter tensors, the plan's targets)."""
    generator = torch.Generator().manual_seed(seed)
    base, parts, targets = {}, {}, {}
    for index, layer in enumerate(layers):
        rows, columns = layer["shape"]
        stored = (columns, rows) if layer["transposed"] else (rows, columns)
        base[f"l{index}.weight"] = torch.randn(stored, generator=generator).to(DTYPES[layer["dtype"]])
        if layer["target"]:
            sizes = ((layer["r"], columns), (rows, layer["r"]))
            for name, size in zip(parts_of(index), sizes, strict=True):
                parts[name] = torch.randn(size, generator=generator).to(DTYPES[layer["adapter"]])
            keys = ("r", "scaling", "transposed")
            targets[f"l{index}"] = {
                **{key: layer[key] for key in keys},
                "shape": [rows, columns],
                "tensor": f"l{index}.weight",
            }
    return base, parts, targets


def save(folder, base: dict, parts: dict, layers: list[dict]) -> None:
    for name in ("base", "adapter", "merged"):
        (folder / name).mkdir(exist_ok=True)
        for path in (folder / name).iterdir():
            path.unlink()
    (folder / "base" / "config.json").write_text("{}")
    files: dict[str, dict] = {}
    for index, (name, tensor) in enumerate(base.items()):
        files.setdefault(f"model-{layers[index % len(layers)]['file']}.safetensors", {})[name] = tensor
    for file, tensors in files.items():
        save_file(tensors, folder / "base" / file, metadata={"format": "pt"})
    places = {name: file for file, tensors in files.items() for name in tensors}
    (folder / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    save_file(parts, folder / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})


def damage(how: str | None, base: dict, parts: dict, targets: dict) -> str | None:
    """Break something that fits; returns what the message must name, or None where nothing could be broken."""
    if not targets or how is None:
        return None
    name = sorted(parts)[0]
    module = name.removeprefix("base_model.model.").partition(".lora")[0]
    if how == "lost":
        del parts[name]
        return name
    if how in ("added", "renamed"):
        other = name.replace("base_model.model.l", "base_model.model.other")
        parts[other] = parts.pop(name) if how == "renamed" else parts[name].clone()
        return name if how == "renamed" else other
    if how == "reshaped":
        parts[name] = torch.zeros(parts[name].shape[0], parts[name].shape[1] + 1)
        return name
    tensor = targets[module]["tensor"]
    if how == "base lost":
        del base[tensor]
        base["something"] = torch.zeros(1)
        return module
    if how == "base reshaped":
        base[tensor] = torch.zeros(9, 9)
        return tensor
    if how == "int8":
        base[tensor] = torch.zeros(base[tensor].shape, dtype=torch.int8)
        return tensor
    targets["twice"] = dict(targets[module])
    for side in "AB":
        parts[f"base_model.model.twice.lora_{side}.weight"] = parts[
            f"base_model.model.{module}.lora_{side}.weight"
        ].clone()
    return tensor


@examples(150)
@given(layers=LAYERS, how=DAMAGE, seed=st.integers(0, 9))
def test_merged_is_base_plus_adapter_or_refused(tmp_path, layers, how, seed):
    base, parts, targets = make(tmp_path, layers, seed)
    named = damage(how, base, parts, targets)
    save(tmp_path, base, parts, layers)
    plan = {"targets": targets}
    if named:
        with pytest.raises(MoultError) as error:
            merge.lora_jobs(tmp_path / "base", tmp_path / "adapter", plan, False)
        assert named in error.value.what and error.value.fix
        return
    jobs = merge.lora_jobs(tmp_path / "base", tmp_path / "adapter", plan, False)
    assert sorted(jobs) == sorted(target["tensor"] for target in targets.values())
    merge.stream(tmp_path / "base", tmp_path / "merged", jobs, logging.getLogger("test"))
    after = {
        name: tensor for path in (tmp_path / "merged").glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    assert set(after) == set(base)
    for index, layer in enumerate(layers):
        name = f"l{index}.weight"
        expected = base[name]
        if layer["target"]:
            a, b = (parts[part].float() for part in parts_of(index))
            delta = (b @ a).T if layer["transposed"] else b @ a
            expected = (base[name].float() + delta * layer["scaling"]).to(base[name].dtype)
        assert after[name].dtype == base[name].dtype
        assert torch.equal(after[name], expected)


# --- headers ----------------------------------------------------------------------------------------------------------

ENTRY = nested() | st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I8", "Q4", 5]),
        "shape": st.lists(st.integers(-1, 3), max_size=3) | nested(),
    },
    optional={"data_offsets": st.lists(st.integers(-1, 40) | st.floats(0, 9), max_size=3) | nested()},
)
HEADERS = st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), ENTRY, max_size=3)
INDEXES = st.fixed_dictionaries({"weight_map": nested() | st.dictionaries(TEXTS, TEXTS | st.just("x.pt"), max_size=2)})


@examples(200)
@given(
    header=st.binary(max_size=60) | (HEADERS | nested()).map(dumped).map(str.encode),
    length=st.none() | st.integers(0, 2**64 - 1),
    body=st.integers(0, 60),
)
def test_any_header(tmp_path, header, length, body):
    """What is taken for whole is what safetensors' own reader takes for whole, to the byte."""
    path = tmp_path / "model.safetensors"
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + bytes(body))
    try:
        raw, tensors = read_header(path)
    except MoultError as error:
        assert str(path) in one_error(error)
        return
    assert sum(tensor.end - tensor.begin for tensor in tensors.values()) + len(raw) == path.stat().st_size
    assert set(load_file(path)) == set(tensors)


@examples(100)
@given(
    index=st.none() | st.binary(max_size=30) | (nested() | INDEXES).map(dumped).map(str.encode),
    names=st.lists(st.sampled_from(["model.safetensors", "pytorch_model.bin", "x.pt"]), unique=True),
)
def test_any_index(tmp_path, index, names):
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    (folder / "config.json").write_text("{}")
    for name in names:
        save_file({"a": torch.zeros(2)}, folder / name)
    if index is not None:
        (folder / "model.safetensors.index.json").write_bytes(index)
    try:
        files = weight_files(folder)
        assert files or index is not None
        assert all(file.parent == folder and file.suffix == ".safetensors" for file in files)
        read_tensors(folder)
    except MoultError as error:
        assert str(folder) in one_error(error)
