"""Add the adapter to the base's weights: a plain model folder, in the base's own files, dtypes and names.

    python scripts/merge.py --model results/models/config--demo--base.json --plan results/demo/plan.json \\
        --tokens results/demo/tokens --adapter results/demo/adapter --merged results/demo/merged --summary results/demo/merge.json

After finetune, before evaluate. First everything is worked out from the headers of the files, then checked (every adapter
tensor used exactly once, names and shapes those of the base), only then written: the base's files anew, tensor by tensor.
What is not changed is copied byte for byte, towers for images and tensors that nobody loads as well.

LoRA is added without loading the model: in float32, rounded once, which gives the bits of peft's merge_and_unload. Peak
memory is a few times the largest tensor; of a stack of experts it is the stack in float32. What is not plain LoRA (DoRA,
modules_to_save, ...) is computed by peft, with the whole model in memory, and the log says so.
"""

import functools
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moult.errors import MoultError, some
from moult.files import atomic_folder, check_space, read_json, sha256_folder, write_json
from moult.model.architecture import empty_model
from moult.model.device import limit_threads, read_model, versions
from moult.model.export import copy_tokenizer, write_generation_config
from moult.model.layout import check_way_back, in_files, sources
from moult.model.manifest import open_model
from moult.model.quantization import bitsandbytes_for
from moult.model.safetensors import INDEX, Tensor, main_file, read_header, read_tensors, weight_files
from moult.run.cli import stage_parser
from moult.run.console import progress
from moult.run.stage import stage

# Bytes copied at a time where a tensor stays as it is.
CHUNK = 16 * 1024 * 1024

# The dtypes that are merged into, as torch calls them.
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

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
WRITTEN_ANEW = ("generation_config.json", "chat_template.jinja", "chat_template.json", INDEX)


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
        bitsandbytes_for(args.settings)
        merge(args.settings, args, log)


def merge(settings: dict, args, log) -> None:
    limit_threads(args.threads)
    base, manifest = open_model(args.model)
    adapter = Path(args.adapter)
    plan = read_json(args.plan)
    report = read_json(Path(args.tokens) / "report.json")
    template = (Path(args.tokens) / "chat_template.jinja").read_text(encoding="utf-8")
    # First all that can be wrong, then the first byte.
    check_space(args.merged, sum(path.stat().st_size for path in weight_files(base)))
    trust_remote_code = settings.get("trust_remote_code", False)
    if plan["merge"]["how"] == "peft":
        log.info("merging with peft, the whole model in memory, because of: %s", some(plan["merge"]["reasons"]))
        jobs = peft_jobs(base, adapter, trust_remote_code)
    else:
        jobs = lora_jobs(base, adapter, plan, trust_remote_code)
    with atomic_folder(args.merged) as folder:
        changed = stream(base, folder, jobs, log)
        copy_files(base, folder)
        copy_tokenizer(base, folder, template, report["template"].get("named", {}))
        write_generation_config(base, folder, report["stop"])
        check_layout(base, folder)
        metadata = {
            "schema_version": 1,
            "how": plan["merge"]["how"],
            "reasons": plan["merge"]["reasons"],
            "base": {key: manifest[key] for key in ("name", "commit", "files")},
            "adapter": sha256_folder(adapter, but=("README.md",)),  # its card comes later
            "merged_tensors": changed,
            "template_sha256": report["template"]["sha256"],
            "files": sha256_folder(folder),
            "versions": versions(),
        }
        write_json(folder / "metadata.json", metadata)
    write_json(args.summary, metadata)
    log.info("%s: %s tensors changed (%s)", args.merged, f"{changed:,}", plan["merge"]["how"])


# What is to be done with a tensor of the base's files: changes it in place, and says whether it has.
Job = Callable[[Any], bool]


# --- plan and validate: LoRA ------------------------------------------------------------------------------------------


def lora_jobs(base: Path, adapter: Path, plan: dict, trust_remote_code: bool) -> dict[str, Job]:
    """{base tensor: its job}. Raises MoultError unless plan, adapter and base fit together without a remainder."""
    from safetensors import safe_open

    tensors = read_tensors(base)
    parameters = targets_of(plan)
    check_adapter(adapter, parameters)
    parts = safe_open(adapter / "adapter_model.safetensors", "pt")
    jobs: dict[str, Job] = {}
    made_of_several = {}
    for parameter, target in parameters.items():
        if target["tensor"] is None:
            made_of_several[parameter] = target
            continue
        tensor = tensors.get(target["tensor"])
        if tensor is None:
            raise MoultError(f"{base}: no tensor for {target['module']}", "run plan again: the base has changed")
        if tensor.shape != shape_of(target):
            raise MoultError(
                f"{base}: {tensor.name} is {tensor.shape}, the plan says {list(shape_of(target))}",
                "run plan again: the base has changed",
            )
        if tensor.name in jobs:
            raise MoultError(f"{base}: {tensor.name} would be merged into twice", "this is a bug in plan")
        jobs[tensor.name] = functools.partial(add, delta=functools.partial(delta_of, parts, target))
    if made_of_several:
        jobs |= converted_jobs(base, tensors, parts, made_of_several, trust_remote_code)
    for name in jobs:
        if tensors[name].dtype not in FLOATS:
            raise MoultError(
                f"{base}: {name} is {tensors[name].dtype}; LoRA is merged into F32, F16 or BF16",
                "merge into the unquantized base",
            )
    return jobs


def targets_of(plan: dict) -> dict[str, dict]:
    """{parameter: what LoRA does to it} of plan.json. `module` is the name of its LoRA in the adapter."""
    layers = {f"{module}.weight": {**target, "module": module} for module, target in plan["targets"].items()}
    stacks = {
        parameter: {**target, "module": target["wrapper"], "transposed": False}
        for parameter, target in plan.get("target_parameters", {}).items()
    }
    return layers | stacks


def shape_of(target: dict) -> tuple[int, ...]:
    """The parameter's. Of a layer `shape` is (out, in), of a parameter its own."""
    return tuple(target["shape"][::-1] if target["transposed"] else target["shape"])


def check_adapter(adapter: Path, parameters: dict[str, dict]) -> None:
    """Raises MoultError unless the adapter has an A and a B for each parameter, in the right shapes, and nothing else."""
    parts = read_header(adapter / "adapter_model.safetensors", "run finetune again")[1]
    unused = set(parts)
    for target in parameters.values():
        names = names_in_adapter(target)
        missing = [name for name in names if name not in parts]
        if missing:
            raise MoultError(
                f"{adapter}: the plan has LoRA on {target['module']}, the adapter lacks {some(missing)}",
                "run finetune again",
            )
        unused -= set(names)
        experts, rows, columns = target.get("experts", 1), *target["shape"][-2:]
        if len(target["shape"]) == 3 and not target["swapped"]:
            rows, columns = columns, rows
        for name, shape in zip(names, [(target["r"] * experts, columns), (rows, target["r"] * experts)], strict=True):
            if parts[name].shape != shape:
                raise MoultError(
                    f"{adapter}: {name} is {parts[name].shape}, the base needs {shape}",
                    "the adapter is of another base",
                )
    if unused:
        raise MoultError(
            f"{adapter}: {len(unused):,} tensors match no layer of the base: {some(sorted(unused))}",
            "the adapter is of another base",
        )


def names_in_adapter(target: dict) -> list[str]:
    return [f"base_model.model.{target['module']}.lora_{side}.weight" for side in "AB"]


def delta_of(parts, target: dict):
    """scaling * B A, in float32 and the parameter's shape.

    Of a stack of experts A is (experts * r, in), B (out, r * experts), and the stack (experts, out, in), or (experts, in, out)
    if it is not `swapped` (peft 0.21, ParamWrapper; it rounds the product before it adds it, and so once more than this).
    """
    import torch

    a, b = (parts.get_tensor(name).float() for name in names_in_adapter(target))
    if len(target["shape"]) == 3:
        experts = target["experts"]
        order = "ore,eri->eoi" if target["swapped"] else "ore,eri->eio"
        a, b = a.reshape(experts, -1, a.shape[-1]), b.reshape(len(b), -1, experts)
        return torch.einsum(order, b, a) * target["scaling"]
    delta = b @ a
    if target["transposed"]:
        delta = delta.T
    return delta * target["scaling"]


def add(weight, delta: Callable) -> bool:
    """As peft does it, to the bit: the product and the sum in float32, rounded once (peft 0.21, lora/layer.py; its safe_merge
    rounds twice and differs in one weight of twenty)."""
    weight += delta()
    return True


def converted_jobs(base: Path, tensors: dict, parts, parameters: dict[str, dict], trust_remote_code: bool) -> dict:
    """Jobs for the tensors that transformers makes `parameters` of: it turns what is added to these into what is added to
    each tensor. The model is built without weights."""
    import torch

    model = empty_model(base, trust_remote_code)
    left = set(parameters)
    jobs: dict[str, Job] = {}

    # Files have the experts of a layer one after the other, each with the tensors of two stacks.
    @functools.lru_cache(maxsize=2)
    def deltas(index: int) -> dict:
        values = {
            name: delta_of(parts, parameters[name]) if name in parameters else torch.zeros(shape)
            for name, shape in found[index].parameters.items()
        }
        return in_files(found[index], values, model)

    found = sources(model, tensors)
    for index, source in enumerate(found):
        if left & set(source.parameters):
            check_way_back(source, tensors, model)
            left -= set(source.parameters)
            for name in source.tensors:
                jobs[name] = functools.partial(add, delta=lambda index=index, name=name: deltas(index)[name])
    if left:
        raise MoultError(f"{base}: no tensor for {some(sorted(left))}", "run plan again: the base has changed")
    return jobs


# --- plan and validate: everything else -------------------------------------------------------------------------------


def peft_jobs(base: Path, adapter: Path, trust_remote_code: bool) -> dict[str, Job]:
    """{base tensor: its job}, of all that the model's class loads. peft computes the values; what it has not changed keeps
    its bits."""
    import torch
    from peft import PeftModel, get_peft_model_state_dict

    tensors = read_tensors(base)
    model = read_model(base, common_dtype(tensors), trust_remote_code)
    tied = tied_embeddings(model)
    found = sources(model, tensors)
    with_adapter = PeftModel.from_pretrained(model, adapter)
    unused = set(read_header(adapter / "adapter_model.safetensors")[1]) ^ set(get_peft_model_state_dict(with_adapter))
    if unused:
        raise MoultError(
            f"{adapter}: {len(unused):,} tensors match no layer of the base: {some(sorted(unused))}",
            "the adapter is of another base",
        )
    with torch.no_grad():
        merged = with_adapter.merge_and_unload()
    if tied and not tied_embeddings(merged):
        raise MoultError(f"{base}: merging parts the tied embeddings", "set lora.ensure_weight_tying: true")
    state = merged.state_dict()

    @functools.lru_cache(maxsize=2)
    def values(index: int) -> dict:
        return in_files(found[index], {name: state[name] for name in found[index].parameters}, model)

    return {
        name: functools.partial(put, value=lambda index=index, name=name: values(index)[name])
        for index, source in enumerate(found)
        for name in source.tensors
        if tensors[name].dtype in FLOATS
    }


def tied_embeddings(model) -> bool:
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return output is not None and output.weight.equal(embedding.weight)


def common_dtype(tensors: dict):
    """The dtype that most of the weights have. peft computes in it; some files have a few norms in another one."""
    import torch

    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype] += tensor.end - tensor.begin
    return getattr(torch, FLOATS[max(FLOATS, key=lambda dtype: sizes[dtype])])


def put(weight, value: Callable) -> bool:
    """The value in place of the weight, unless it is the weight as the model in memory has it."""
    import torch

    new = value()
    if torch.equal(weight.to(new.dtype), new):
        return False
    weight.copy_(new)
    return True


# --- apply ------------------------------------------------------------------------------------------------------------


def stream(base: Path, folder: Path, jobs: dict[str, Job], log) -> int:
    """Write the base's weight files anew: the same headers, each tensor copied or changed. Returns how many were changed."""
    files = weight_files(base)
    if main_file(base, {path.name for path in base.iterdir()}) == INDEX:
        shutil.copyfile(base / INDEX, folder / INDEX)
    changed = 0
    with progress(sum(path.stat().st_size for path in files), "bytes") as bar:
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
                        changed += change(data, tensor, jobs[tensor.name])
                        target.write(data)
                    else:
                        copy_bytes(source, target, tensor.end - tensor.begin)
                    bar.update(tensor.end - tensor.begin)
            log.debug("%s written", path.name)
    return changed


def copy_bytes(source, target, count: int) -> None:
    while count:
        block = source.read(min(CHUNK, count))
        target.write(block)
        count -= len(block)


def change(data: bytearray, tensor: Tensor, job: Job) -> bool:
    """Do the job on a tensor's bytes."""
    import torch

    weight = torch.frombuffer(data, dtype=getattr(torch, FLOATS[tensor.dtype])).view(tensor.shape)
    has_changed = job(weight)
    if has_changed and not weight.isfinite().all():
        raise MoultError(
            f"{tensor.name}: not finite after the merge",
            "the adapter's weights are too large for the base's dtype",
        )
    return has_changed


# --- the rest of the folder -------------------------------------------------------------------------------------------


def copy_files(base: Path, folder: Path) -> None:
    """config.json and what else the base has at its top, byte for byte: processors, remote code, license."""
    for path in sorted(base.iterdir()):
        hidden = path.name.startswith(".")
        if path.is_file() and not hidden and path.suffix not in LEFT_OUT and path.name not in WRITTEN_ANEW:
            shutil.copyfile(path, folder / path.name)


def check_layout(base: Path, folder: Path) -> None:
    """The merged files are whole, and hold the tensors of the base, no more and no fewer, in its shapes and dtypes."""

    def form(place: Path) -> set:
        return {(tensor.name, tensor.shape, tensor.dtype) for tensor in read_tensors(place).values()}

    differ = sorted(form(base) ^ form(folder))
    if differ:
        raise MoultError(f"{folder}: differs from the base in {some(differ)}", "this is a bug in merge")


if __name__ == "__main__":
    main()
