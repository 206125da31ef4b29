"""What a model folder holds, read from the headers of its safetensors files; no tensor is loaded."""

import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from moult.errors import MoultError, some
from moult.files import read_json

# Bits of an element of each dtype (safetensors 0.8). FEW_BITS are those that only quantized weights have.
FEW_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8}
FEW_BITS |= {"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64, "BOOL": 8} | FEW_BITS
BITS |= {f"{kind}{bits}": bits for kind in "IU" for bits in (8, 16, 32, 64)}

INDEX = "model.safetensors.index.json"

AGAIN = "download or copy the model again"


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file: `begin` and `end` are byte offsets from the start of the file."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path, fix: str = AGAIN) -> tuple[bytes, dict[str, Tensor]]:
    """The raw header of a safetensors file (with its length in front) and its tensors.

    Raises MoultError, with `fix`, if it is not whole.

    Format: 8 bytes with the header's length, the header as JSON, the tensors. github.com/huggingface/safetensors#format
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if prefix == b"version ":
            raise MoultError(
                f"{path}: a pointer of Git LFS, not the weights", "git lfs pull, or download the model again"
            )
        if len(prefix) < 8 or length > min(size - 8, 100_000_000):
            raise _not_whole(path, fix, "its header is longer than the file")
        raw = file.read(length)
    try:
        entries = json.loads(raw)
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, dict):
        raise _not_whole(path, fix, "its header is not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise _not_whole(path, fix, "its metadata is no object of texts")
    tensors = {}
    start = 8 + length
    for name, entry in entries.items():
        try:
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            dtype = str(entry["dtype"])
            plain = all(type(number) is int and number >= 0 for number in (begin, end, *shape))
        except (KeyError, TypeError, ValueError):
            plain = False
        if not plain:
            raise _not_whole(path, fix, f"the header's entry of {name} is not one")
        if dtype not in BITS:
            raise MoultError(
                f"{path}: {name} is {dtype}, a dtype that Moult does not know",
                "if the model is quantized, tune the unquantized base",
            )
        expected = math.ceil(BITS[dtype] * math.prod(shape) / 8)
        if end - begin != expected:
            raise _not_whole(
                path, fix, f"{name} is said to have {end - begin:,} bytes, and its shape needs {expected:,}"
            )
        tensors[name] = Tensor(name, path.name, dtype, shape, start + begin, start + end)
    last = start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin != last:
            raise _not_whole(path, fix, f"{tensor.name} does not begin where the tensor before it ends")
        last = tensor.end
    if size != last:
        raise _not_whole(path, fix, f"it has {size:,} bytes, and its header says {last:,}")
    return prefix + raw, tensors


def _not_whole(path: Path, fix: str, why: str) -> MoultError:
    return MoultError(f"{path}: not a whole safetensors file: {why}", fix)


def main_file(folder: Path, there: Collection[str]) -> str | None:
    """The file of weights, or the index of several, that transformers loads: what config.json names, else model.safetensors,
    else the index (5.23, modeling_utils._get_resolved_checkpoint_files). None if there is none.

    Args:
        folder: has config.json; a hub's weights need not be there yet.
        there: names of all files at the top of the model.
    """
    config = read_json(folder / "config.json", AGAIN)
    named = config.get("transformers_weights") if isinstance(config, dict) else None
    return next((name for name in ([str(named)] if named else ["model.safetensors", INDEX]) if name in there), None)


def weight_names(folder: Path, there: Collection[str]) -> list[str]:
    """Which of the files `there` hold the weights; see main_file."""
    name = main_file(folder, there)
    return indexed_files(folder / name) if name and name.endswith(".index.json") else [name] if name else []


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a model, in the order of their names. Raises MoultError where there are none, or not all."""
    folder = Path(folder)
    if not folder.is_dir():
        raise MoultError(
            f"{folder}: no such folder",
            "check model.name; a relative path is relative to the working directory",
        )
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise MoultError(
            f"{folder}: this is a LoRA adapter, not a model", "set model.name to the base model of this adapter"
        )
    if not (folder / "config.json").is_file():
        raise MoultError(f"{folder}: no config.json, so this is not a model folder", "check model.name")
    names = weight_names(folder, {path.name for path in folder.iterdir()})
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise MoultError(f"{folder}: files of the index are missing: {some(missing)}", AGAIN)
    if names:
        return [folder / name for name in names]
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        raise MoultError(
            f"{folder}: weights only as pickle ({some(pickled)}), which can run code when it is loaded",
            "convert it once where you trust it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)",
        )
    raise MoultError(f"{folder}: no model.safetensors", "check model.name")


def indexed_files(index: Path) -> list[str]:
    """The names of the files that an index lists. Raises MoultError if they are no safetensors files beside it."""
    content = read_json(index, AGAIN)
    places = content.get("weight_map") if isinstance(content, dict) else None
    names = sorted(set(map(str, places.values()))) if isinstance(places, dict) else []
    strange = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    if strange or not names:
        raise MoultError(
            f"{index}: lists {some(strange) or 'no files'}, where safetensors files beside it belong",
            AGAIN,
        )
    return names


def read_tensors(folder: str | Path) -> dict[str, Tensor]:
    """Every tensor of a model, by name."""
    return {name: tensor for path in weight_files(folder) for name, tensor in read_header(path)[1].items()}
