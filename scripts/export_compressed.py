"""Quantize the merged model for vLLM (compressed-tensors): FP8, or integers of 8 or 4 bits.

    .venv-export/bin/python scripts/export_compressed.py --run demo --format fp8 \\
        --settings '{"calibration_rows": 256, "trust_remote_code": false}' --merged results/demo/merged \\
        --merge results/demo/merge.json --model results/demo/exports/fp8/model --made results/demo/exports/fp8/made.json
    ... --format w4a16 --train results/demo/tokens/train.parquet

After merge; it runs in the environment of the exports (make export-env). llmcompressor does the work, with the recipes of its
examples:

fp8      FP8_DYNAMIC: weights rounded to the nearest, a scale for each output; activations when they are there. No rows needed.
w8a8     GPTQ (arXiv 2210.17323) to INT8, a scale for each output; activations when they are there. Some of the examples have
         SmoothQuant before it. It is not used: it changes norms, finds them by their names, and in Gemma 2 takes the wrong ones
         (llmcompressor 0.14; on random weights KL 0.016 with it, 0.000008 without).
w4a16    GPTQ to INT4, in groups of 128 inputs, or 64 or 32 where 128 does not divide the widths.

The linear layers of the text model are quantized. Output layer, routers of experts, linear attention, and towers for images
stay as they are, as in those examples. Then it is checked that nothing else has changed: every file beside the weights is
the merged model's, config.json has one more key, the other weights are the same; and the folder is loaded again.
"""

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moult.errors import MoultError, some
from moult.exporting.calibration import calibration_rows
from moult.files import atomic_folder, changed_files, check_space, read_json, sha256_folder, write_json
from moult.model.device import enough_memory, limit_threads, pick, read_model, versions
from moult.model.safetensors import INDEX, read_tensors, weight_files
from moult.model.tokenizer import load_tokenizer
from moult.run.cli import stage_parser
from moult.run.stage import stage

# What llmcompressor calls the formats.
SCHEMES = {"fp8": "FP8_DYNAMIC", "w8a8": "W8A8", "w4a16": "W4A16"}

# Inputs that share a scale with w4a16: the first that divides the widths. vLLM's kernels know these (Marlin).
GROUP_SIZES = (128, 64, 32)

# Layers in the text model that llmcompressor's examples leave as they are, by a part of their name: routers, and the linear
# attention of Qwen3-Next and Qwen3.5.
SENSITIVE = ("gate", "router", "shared_expert_gate", "linear_attn")

# What both models read in the end. Any text would do.
TRIAL = "A snake moults and comes out new. 17 + 25 = 42, and what was measured before is what is measured now."

PACKAGES = ("torch", "transformers", "llmcompressor", "compressed-tensors", "safetensors")

NOT_THIS = "export it as GGUF (gguf-q8_0), or serve the merged model"


@dataclass(frozen=True)
class Layers:
    """What is done with the linear layers of a model, by their names.

    taken: they are quantized. left: they stay as they are, {name: why}. narrow: those of them that the format cannot take.
    group_size: inputs that share a scale, for w4a16.
    """

    taken: list[str]
    left: dict[str, str]
    narrow: list[str]
    group_size: int


def main() -> None:
    parser = stage_parser(__doc__, "export_compressed", threads="CPU threads")
    parser.add_argument("--run", required=True, help="name of the run")
    parser.add_argument("--format", required=True, choices=SCHEMES)
    parser.add_argument("--merged", required=True, help="merged model's folder")
    parser.add_argument("--merge", required=True, help="merge.json: hashes of its files")
    parser.add_argument("--train", nargs="*", default=[], help="train.parquet, for w8a8 and w4a16")
    parser.add_argument("--model", required=True, help="model folder to write")
    parser.add_argument("--made", required=True, help="small JSON beside it to write: hashes, what is in it")
    args = parser.parse_args()

    with stage("export_compressed", args.log_file, args.settings) as log:
        export(args, log)


def export(args, log) -> None:
    limit_threads(args.threads)
    if pick() == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # llmcompressor takes a GPU that it sees
    merged, trusted = Path(args.merged), args.settings["trust_remote_code"]
    files = merged_files(merged, args.merge)
    check_space(args.model, sum(path.stat().st_size for path in weight_files(merged)))
    rows = calibration_rows(Path(*args.train), args.settings["calibration_rows"]) if args.train else []
    if not rows and args.format != "fp8":
        raise MoultError(f"{args.format} needs rows to calibrate on", "give --train, the train.parquet of the run")

    # In the machine's memory and its own dtype: llmcompressor takes one layer after the other to the GPU.
    model = read_model(merged, "auto", trusted)
    layers = choose(model, args.format)
    tell(layers, log)
    tokenizer = load_tokenizer(str(merged), trusted)
    ids, expected = trial(model, tokenizer)
    quantize(model, tokenizer, args.format, layers, rows)
    with atomic_folder(args.model) as folder:
        model.save_pretrained(folder, save_compressed=True)
        kind = model.config.model_type
        del model
        added = add_unloaded(merged, folder, log)
        write_beside(merged, folder, files, [*layers.left, *added])
        tensors = check_weights(merged, folder, layers)
        with refusing(kind, args.format):
            check_loads(folder, trusted, ids, expected, log)
        written = sha256_folder(folder)
        size = sum((folder / name).stat().st_size for name in written)
    write_json(
        args.made,
        {
            "schema_version": 1,
            "run": args.run,
            "format": args.format,
            "engine": "vllm",
            "files": written,
            "bytes": size,
            "made_from": files,
            "tensors": dict(tensors),
            "fallback": len(layers.narrow),
            "calibration": {"rows": len(rows), "tokens": sum(map(len, rows))} if rows else None,
            "ollama": None,
            "versions": versions(PACKAGES),
        },
    )
    log.info("%s: %d linear layers quantized, %s bytes", args.model, len(layers.taken), f"{size:,}")


def merged_files(merged: Path, merge: str) -> dict[str, str]:
    """The hashes of the merged model's files. Raises MoultError if they are not what merge wrote."""
    files = read_json(merge)["files"]
    if differ := changed_files(merged, files, but=("metadata.json", "README.md")):
        raise MoultError(f"{merged} is not what merge wrote: {some(differ)} differ", "run merge again")
    return files


# --- plan -------------------------------------------------------------------------------------------------------------


def choose(model, format: str) -> Layers:
    """Which layers are quantized. Raises MoultError where there are none, or where the result could not be checked."""
    import torch
    from llmcompressor.modeling.moe.linearize import get_non_linearized_moes

    kind = model.config.model_type
    if get_non_linearized_moes(model):
        # transformers 5.17 loads the experts of an FP8 export without their scales, and fails for the others.
        raise MoultError(
            f"{format} of a mixture of experts ({kind}) cannot be checked: transformers does not load what llmcompressor writes",
            NOT_THIS,
        )
    text = {id(module) for module in model.get_decoder().modules()}
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    left = {}
    for name, module in linear.items():
        if id(module) not in text:
            left[name] = "output" if module is model.get_output_embeddings() else "not of the text model"
        elif set(name.split(".")) & set(SENSITIVE):
            left[name] = "router or linear attention"
    widths = {name: module.in_features for name, module in linear.items() if name not in left}
    narrow = [name for name, width in widths.items() if format == "w4a16" and width % GROUP_SIZES[-1]]
    left |= {name: f"{widths[name]} inputs, not a multiple of {GROUP_SIZES[-1]}" for name in narrow}
    taken = [name for name in widths if name not in left]
    if not taken:
        why = f": their widths are not multiples of {GROUP_SIZES[-1]}" if narrow else ""
        raise MoultError(
            f"{format} quantizes linear layers, and a model of the type {kind} has none for it{why}", NOT_THIS
        )
    group_size = next(
        size for size in GROUP_SIZES if format != "w4a16" or not any(widths[name] % size for name in taken)
    )
    return Layers(taken, left, narrow, group_size)


def tell(layers: Layers, log) -> None:
    by_reason: dict[str, list[str]] = {}
    for name, why in layers.left.items():
        by_reason.setdefault(why, []).append(name)
    for why, names in by_reason.items():
        log.info("not quantized (%s): %s", why, some(names))
    if layers.group_size != GROUP_SIZES[0]:
        log.info("groups of %d inputs: %d does not divide all widths", layers.group_size, GROUP_SIZES[0])


# --- quantize ---------------------------------------------------------------------------------------------------------


def quantize(model, tokenizer, format: str, layers: Layers, rows: list[list[int]]) -> None:
    """Quantize the model in place."""
    import torch
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader

    recipe = recipe_of(format, layers)
    # Row by row: nothing is padded or cut.
    batches = DataLoader([{"input_ids": torch.tensor([ids])} for ids in rows], batch_size=None) if rows else None
    with (
        refusing(model.config.model_type, format),
        enough_memory("quantizing", "use a machine or a GPU with more memory"),
    ):
        # It needs no tokenizer for token ids, and of a model for images would look for more than that.
        oneshot(model=model, recipe=recipe, dataset=batches, processor=tokenizer)


@contextlib.contextmanager
def refusing(kind: str, format: str) -> Iterator[None]:
    """Whatever the libraries make of a model that they cannot do, as one MoultError."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, AttributeError, LookupError, NotImplementedError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MoultError(
            f"{format} of a model of the type {kind} cannot be made, or not be loaded: {said}",
            f"{NOT_THIS}; the log has the whole error",
        ) from error


def recipe_of(format: str, layers: Layers):
    """llmcompressor's modifier for the format."""
    from compressed_tensors.quantization import preset_name_to_scheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    own: dict = {"ignore": list(layers.left), "targets": "Linear", "scheme": SCHEMES[format]}
    if layers.group_size != GROUP_SIZES[0]:
        scheme = preset_name_to_scheme(own.pop("scheme"), [own.pop("targets")])
        scheme.weights.group_size = layers.group_size
        own["config_groups"] = {"group_0": scheme}
    return QuantizationModifier(**own) if format == "fp8" else GPTQModifier(**own)


# --- write and check --------------------------------------------------------------------------------------------------


def add_unloaded(merged: Path, folder: Path, log) -> list[str]:
    """Copy the tensors that transformers does not load (the towers of Qwen3.5, of which Moult tunes the text model), because
    vLLM does. Returns the layers that they are of."""
    from safetensors.torch import save_file

    written = read_tensors(folder)
    quantized = quantized_in(written)
    left = {
        name: read()
        for name, read in tensors_of(merged)
        if name not in written and name.rpartition(".")[0] not in quantized
    }
    if not left:
        return []
    log.info("%d tensors that transformers does not load are copied: %s", len(left), some(sorted(left)))
    files = {tensor.file for tensor in written.values()}
    # A file of the name that transformers looks for first would be taken for the whole model.
    renamed = {file: "model-quantized.safetensors" if len(files) == 1 else file for file in files}
    for file, name in renamed.items():
        (folder / file).rename(folder / name)
    save_file(left, folder / "model-copied.safetensors", metadata={"format": "pt"})
    places = {tensor.name: renamed[tensor.file] for tensor in written.values()}
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    places |= dict.fromkeys(left, "model-copied.safetensors")
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": places})
    return [name.removesuffix(".weight") for name, tensor in left.items() if tensor.dim() > 1]


def write_beside(merged: Path, folder: Path, files: dict[str, str], unquantized: list[str]) -> None:
    """All files but the weights, as the merged model has them: llmcompressor's own change tokenizer_config.json. config.json
    gains the key that says how the weights are quantized, and nothing else.

    vLLM and llmcompressor name the layers that are not quantized as the files of the weights do, transformers as its modules
    (Gemma 3, Qwen3.5: they differ): config.json has both.
    """
    quantization = read_json(folder / "config.json")["quantization_config"]
    quantization["ignore"] = sorted({*quantization["ignore"], *unquantized})
    weights = {path.name for path in weight_files(merged)} | {INDEX}
    for name in set(files) - weights:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(merged / name, folder / name)
    write_json(folder / "config.json", {**read_json(merged / "config.json"), "quantization_config": quantization})


def check_weights(merged: Path, folder: Path, layers: Layers) -> Counter:
    """How many tensors the export has of each dtype. Raises MoultError unless the layers that were chosen are quantized, and all
    other weights are the merged model's.

    Weights in another dtype than the model's (norms in float32) are rounded to the model's, as transformers loads them.
    """
    import torch

    quantized = quantized_in(read_tensors(folder))
    if len(quantized) != len(layers.taken):
        raise MoultError(f"{len(quantized)} of {len(layers.taken)} layers are quantized", "this is a bug: report it")
    originals = dict(tensors_of(merged))
    kinds: Counter[str] = Counter()
    for name, read in tensors_of(folder):
        tensor = read()
        kinds[str(tensor.dtype).removeprefix("torch.")] += 1
        module, _, part = name.rpartition(".")
        if module in quantized and part.startswith("weight"):
            continue
        if name not in originals or not torch.equal(originals[name]().to(tensor.dtype), tensor):
            raise MoultError(f"{name} should be the merged model's, and is not", "this is a bug: report it")
    return kinds


def quantized_in(tensors: Iterable[str]) -> set[str]:
    """The layers that have scales, of the names of tensors."""
    return {name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")}


def tensors_of(folder: Path) -> Iterator[tuple]:
    """(name, function that reads it) of each tensor of a model folder."""
    from safetensors import safe_open

    for path in weight_files(folder):
        file = safe_open(path, "pt")
        for name in file.keys():  # noqa: SIM118 (it is not a dict)
            yield name, lambda file=file, name=name: file.get_tensor(name)


def trial(model, tokenizer) -> tuple:
    """(token ids of a sentence: (1, tokens); what the model expects after each: log probabilities (tokens, vocabulary))."""
    import torch

    ids = torch.tensor([tokenizer(TRIAL)["input_ids"]])
    with torch.inference_mode():
        return ids, model(ids).logits[0].double().log_softmax(-1)


def check_loads(folder: Path, trusted: bool, ids, expected, log) -> None:
    """Load what was written, and let it read the sentence. Raises MoultError if weights are missing, or if it answers with no
    numbers. How far it is from the merged model is evaluate_export's to judge, on the rows."""
    import torch

    model = read_model(folder, "auto", trusted)
    with torch.inference_mode():
        found = model(ids.to(model.device)).logits[0].double().cpu().log_softmax(-1)
    if not found.isfinite().all():
        raise MoultError("the quantized model answers with NaN or infinity", NOT_THIS)
    divergence = (expected.exp() * (expected - found)).sum(-1).mean().item()
    log.info("it loads; KL to the merged model over %d tokens: %.2g nats per token", ids.numel(), divergence)


if __name__ == "__main__":
    main()
