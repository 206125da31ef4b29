"""Add the adapter to the base's weights: a plain model folder, in the base's own files, dtype and names.

    python scripts/merge.py --model results/models/config--demo--base.json --plan results/demo/plan.json \\
        --tokens results/demo/tokens --adapter results/demo/adapter --merged results/demo/merged --summary results/demo/merge.json

After finetune, before evaluate. The model is never loaded. First everything is worked out from the headers of the
files, then checked (every adapter tensor used exactly once, names and shapes those of the base), only then written:
tensor by tensor, the sum in float32, rounded once, which gives the bits of peft's merge_and_unload. Peak memory is a few
times the largest tensor. What cannot be streamed (DoRA, modules_to_save, ...) goes through peft, and the log says so.
"""

import shutil
from collections import Counter
from pathlib import Path

from moult.errors import MoultError, some
from moult.files import atomic_folder, check_space, read_json, sha256_folder, write_json
from moult.model.device import limit_threads, versions
from moult.model.export import copy_tokenizer, write_generation_config
from moult.model.manifest import open_model
from moult.model.safetensors import read_header, read_tensors, weight_files
from moult.run.cli import stage_parser
from moult.run.console import progress
from moult.run.stage import stage

# Bytes copied at a time where a tensor stays as it is.
CHUNK = 16 * 1024 * 1024

# Files of a model folder that are not copied: other weight formats, repository files, and what is written anew.
LEFT_OUT = (
    ".bin",
    ".pt",
    ".pth",
    ".safetensors",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".md",
    ".gitattributes",
    ".lock",
    ".metadata",
)
WRITTEN_ANEW = ("generation_config.json", "chat_template.jinja", "chat_template.json", "model.safetensors.index.json")


def main() -> None:
    parser = stage_parser(__doc__, "merge", optional=True, threads="CPU threads")
    parser.add_argument("--model", required=True, help="manifest or folder of the base model")
    parser.add_argument("--plan", required=True, help="plan.json: which layers have LoRA, and where their weights are")
    parser.add_argument("--tokens", required=True, help="folder that encode wrote (template, stop tokens)")
    parser.add_argument("--adapter", required=True, help="adapter folder")
    parser.add_argument("--merged", required=True, help="model folder to write")
    parser.add_argument("--summary", required=True, help="small JSON beside it to write: hashes, how it was merged")
    args = parser.parse_args()

    with stage("merge", args.log_file, args.settings) as log:
        merge(args.settings, args, log)


def merge(settings: dict, args, log) -> None:
    limit_threads(args.threads)
    base, manifest = open_model(args.model)
    adapter = Path(args.adapter)
    plan = read_json(args.plan)
    report = read_json(Path(args.tokens) / "report.json")
    template = (Path(args.tokens) / "chat_template.jinja").read_text(encoding="utf-8")
    streamed = plan["merge"]["how"] == "streamed"
    # First all that can be wrong, then the first byte.
    jobs = plan_jobs(base, adapter, plan["targets"]) if streamed else {}
    check_space(args.merged, sum(path.stat().st_size for path in weight_files(base)))
    with atomic_folder(args.merged) as folder:
        if streamed:
            stream(base, adapter, folder, jobs, log)
        else:
            log.info("merging with peft, the whole model in memory, because of: %s", some(plan["merge"]["reasons"]))
            merge_with_peft(base, adapter, folder, settings.get("trust_remote_code", False))
        copy_files(base, folder)
        copy_tokenizer(base, folder, template, report["template"].get("named", {}))
        write_generation_config(base, folder, report["stop"])
        check_layout(base, folder, streamed)
        metadata = {
            "schema_version": 1,
            "how": plan["merge"]["how"],
            "reasons": plan["merge"]["reasons"],
            "base": {key: manifest[key] for key in ("name", "commit", "files")},
            "adapter": sha256_folder(adapter, but=("README.md",)),  # its card comes later
            "merged_tensors": len(jobs) or len(plan["targets"]),
            "template_sha256": report["template"]["sha256"],
            "files": sha256_folder(folder),
            "versions": versions(),
        }
        write_json(folder / "metadata.json", metadata)
    write_json(args.summary, metadata)
    log.info("%s: %s layers merged (%s)", args.merged, f"{metadata['merged_tensors']:,}", plan["merge"]["how"])


# --- plan and validate ------------------------------------------------------------------------------------------------


def plan_jobs(base: Path, adapter: Path, targets: dict[str, dict]) -> dict[str, dict]:
    """{base tensor: how it changes}. Raises MoultError unless plan, adapter and base fit together without a remainder."""
    tensors = read_tensors(base)
    parts = read_header(adapter / "adapter_model.safetensors", "run finetune again")[1]
    jobs: dict[str, dict] = {}
    unused = set(parts)
    for module, target in targets.items():
        names = {side: f"base_model.model.{module}.lora_{side}.weight" for side in "AB"}
        missing = [name for name in names.values() if name not in parts]
        if missing:
            raise MoultError(
                f"{adapter}: the plan has LoRA on {module}, the adapter lacks {some(missing)}",
                "run finetune again",
            )
        unused -= set(names.values())
        tensor = tensors.get(target["tensor"] or "")
        if tensor is None:
            raise MoultError(f"{base}: no tensor for {module}", "run plan again: the base has changed")
        rows, columns = target["shape"]
        shapes = {"A": (target["r"], columns), "B": (rows, target["r"])}
        for side, name in names.items():
            if parts[name].shape != shapes[side]:
                raise MoultError(
                    f"{adapter}: {name} is {parts[name].shape}, the base needs {shapes[side]}",
                    "the adapter is of another base",
                )
        if tensor.shape != ((columns, rows) if target["transposed"] else (rows, columns)):
            raise MoultError(
                f"{base}: {tensor.name} is {tensor.shape}, the plan says {target['shape']}",
                "run plan again: the base has changed",
            )
        if tensor.dtype not in ("F32", "F16", "BF16"):
            raise MoultError(
                f"{base}: {tensor.name} is {tensor.dtype}; LoRA is merged into F32, F16 or BF16",
                "merge into the unquantized base",
            )
        if tensor.name in jobs:
            raise MoultError(f"{base}: {tensor.name} would be merged into twice", "this is a bug in plan")
        jobs[tensor.name] = {**names, "scaling": target["scaling"], "transposed": target["transposed"]}
    if unused:
        raise MoultError(
            f"{adapter}: {len(unused):,} tensors match no layer of the base: {some(sorted(unused))}",
            "the adapter is of another base",
        )
    return jobs


# --- apply ------------------------------------------------------------------------------------------------------------


def stream(base: Path, adapter: Path, folder: Path, jobs: dict[str, dict], log) -> None:
    """Write the base's weight files anew: the same headers, each tensor copied or changed."""
    from safetensors import safe_open

    files = weight_files(base)
    if (base / "model.safetensors.index.json").exists():
        shutil.copyfile(base / "model.safetensors.index.json", folder / "model.safetensors.index.json")
    total = sum(path.stat().st_size for path in files)
    with safe_open(adapter / "adapter_model.safetensors", "pt") as parts, progress(total, "bytes") as bar:
        for path in files:
            raw, tensors = read_header(path)
            with path.open("rb") as source, (folder / path.name).open("wb") as target:
                target.write(raw)
                bar.update(len(raw))
                for tensor in sorted(tensors.values(), key=lambda tensor: tensor.begin):
                    source.seek(tensor.begin)
                    if tensor.name in jobs:
                        data = bytearray(tensor.end - tensor.begin)
                        source.readinto(data)
                        target.write(changed(data, tensor, jobs[tensor.name], parts))
                    else:
                        copy_bytes(source, target, tensor.end - tensor.begin)
                    bar.update(tensor.end - tensor.begin)
            log.debug("%s written", path.name)


def copy_bytes(source, target, count: int) -> None:
    while count:
        block = source.read(min(CHUNK, count))
        target.write(block)
        count -= len(block)


def changed(data: bytearray, tensor, job: dict, parts) -> bytearray:
    """W + scaling * B A, written over W's bytes.

    As peft does it, to the bit: the product and the sum in float32, rounded once (peft 0.21, lora/layer.py; its
    safe_merge rounds twice and differs in one weight of twenty).
    """
    import torch

    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[tensor.dtype]
    weight = torch.frombuffer(data, dtype=dtype).view(tensor.shape)
    delta = parts.get_tensor(job["B"]).float() @ parts.get_tensor(job["A"]).float()
    if job["transposed"]:
        delta = delta.T
    delta = delta * job["scaling"]
    weight += delta
    if not weight.isfinite().all():
        raise MoultError(
            f"{tensor.name}: not finite after the merge",
            "the adapter's weights are too large for the base's dtype",
        )
    return data


def merge_with_peft(base: Path, adapter: Path, folder: Path, trust_remote_code: bool) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        base, dtype="auto", use_safetensors=True, trust_remote_code=trust_remote_code
    )
    with torch.no_grad():
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(folder)
    if (
        not merged.config.tie_word_embeddings
        == AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code).tie_word_embeddings
    ):
        raise MoultError(f"{base}: merging parts the tied embeddings", "set lora.ensure_weight_tying: true")


# --- the rest of the folder -------------------------------------------------------------------------------------------


def copy_files(base: Path, folder: Path) -> None:
    """config.json and what else the base has at its top, byte for byte: processors, remote code, license."""
    for path in sorted(base.iterdir()):
        hidden = path.name.startswith(".")
        if path.is_file() and not hidden and path.suffix not in LEFT_OUT and path.name not in WRITTEN_ANEW:
            shutil.copyfile(path, folder / path.name)


def check_layout(base: Path, folder: Path, streamed: bool) -> None:
    """The merged files are whole, and hold the tensors of the base, no more and no fewer, in its shapes and dtypes.

    transformers, which writes them for peft, may have other names for them than the base's files.
    """

    def form(place: Path) -> Counter:
        tensors = read_tensors(place).values()
        return Counter((tensor.name if streamed else "", tensor.shape, tensor.dtype) for tensor in tensors)

    before, after = form(base), form(folder)
    differ = sorted(((before - after) + (after - before)).elements())
    if differ:
        raise MoultError(f"{folder}: differs from the base in {some(differ)}", "this is a bug in merge, or of peft's")


if __name__ == "__main__":
    main()
