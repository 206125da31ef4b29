"""A base model by its manifest: which files it has, with their hashes, and where they lie."""

import re
from pathlib import Path

from moult.errors import MoultError, some
from moult.files import read_json, sha256_file
from moult.model.safetensors import AGAIN, FEW_BITS, INDEX, main_file, read_header, weight_files

# Other formats of the same weights, and repository files: never downloaded.
IGNORED = (
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.h5",
    "*.msgpack",
    "*.onnx*",
    "*.gguf",
    "*.tflite",
    "*.ot",
    "*.nemo",
    "*.md5",
    ".*",
    "*/.*",
    "original/*",
)


def open_model(path: str) -> tuple[Path, dict]:
    """(folder, manifest) of a model given by its manifest (`results/models/<name>.json`) or by its folder."""
    if Path(path).is_file():
        manifest = read_json(path)
        # A downloaded model lies beside its manifest; a local one where the config says.
        return Path(manifest["folder"] or Path(path).with_suffix("")), manifest
    return Path(path), describe(Path(path), name=path, trust_remote_code=True)


def describe(folder: Path, name: str, trust_remote_code: bool, commit: str | None = None, local: bool = True) -> dict:
    """The manifest of a model folder: the hash of each file, and which weight files are there and not part of the model.

    Raises MoultError if its weights are not whole safetensors files, if they are quantized, or if it brings code that may
    not run.
    """
    weights = weight_files(folder)
    check_unquantized(folder, name)
    for path in weights:
        check_dtypes(path, name)
    check_code(folder, name, trust_remote_code)
    ignored = [path.name for path in spare_weights(folder, weights)]
    files = {
        path.relative_to(folder).as_posix(): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".md" and not _ignored(path.relative_to(folder).as_posix())
    }
    return {
        "schema_version": 1,
        "name": public_name(name),
        "commit": commit,
        "folder": str(folder) if local else None,
        "files": {file: digest for file, digest in files.items() if file not in ignored},
        "ignored": ignored,
    }


def spare_weights(folder: Path, weights: list[Path]) -> list[Path]:
    """Weight files at the top of a model that are not part of it: transformers loads others (`weights`)."""
    spare = [path for path in sorted(folder.glob("*.safetensors")) if path not in weights]
    names = {path.name for path in folder.iterdir()}
    return spare + [folder / INDEX] * (INDEX in names and main_file(folder, names) != INDEX)


def check_unquantized(folder: Path, name: str) -> None:
    """Raises MoultError if config.json, or a part of it (the text model's), says that the weights are quantized."""
    config = read_json(folder / "config.json", AGAIN)
    parts = [config, *config.values()] if isinstance(config, dict) else []
    for part in parts:
        found = isinstance(part, dict) and (part.get("quantization_config") or part.get("compression_config"))
        if found:
            method = found.get("quant_method", "no quant_method given") if isinstance(found, dict) else str(found)
            raise _quantized(name, method)


def check_dtypes(path: Path, name: str) -> None:
    """Raises MoultError if a weight file is not whole, or holds weights in a dtype of few bits."""
    few = sorted({tensor.dtype for tensor in read_header(path)[1].values()} & set(FEW_BITS))
    if few:
        raise _quantized(name, ", ".join(few))


def _quantized(name: str, method: str) -> MoultError:
    return MoultError(f"{name}: the model is quantized ({method})", "tune the unquantized base: merge adds to it")


def check_code(folder: Path, name: str, trust_remote_code: bool) -> None:
    """Raises MoultError for a model that brings Python code, unless the config allows it."""
    classes = set()
    for file in (folder / "config.json", folder / "tokenizer_config.json"):
        config = read_json(file, AGAIN) if file.is_file() else {}
        if not isinstance(config, dict):
            raise MoultError(f"{file}: no object, so this is not a model folder", "check model.name")
        classes.update(re.findall(r"[\w.-]+\.\w+", str(config.get("auto_map") or "")))
    if classes and not trust_remote_code:
        raise MoultError(
            f"{name}: the model brings its own Python code ({some(sorted(classes))})",
            "read that code, then allow it with model.trust_remote_code: true",
        )


def _ignored(file: str) -> bool:
    return any(Path(file).match(pattern) for pattern in IGNORED) or file.startswith(".")


def public_name(name: str) -> str:
    """The name to publish: a hub id or a relative path as it is, of any other path the last part."""
    outside = name.startswith(("/", "~", "..")) or re.match(r"[A-Za-z]:", name)
    return Path(name).name if outside else name
