"""Work out what a run will do before a GPU is spent on it: parameters, LoRA targets, steps, memory, disk, how to serve.

    python scripts/plan.py --settings '{"lora": {...}, "train": {...}, "dtype": "bfloat16", ...}' \\
        --model config/demo/base --tokens results/demo/tokens --out results/demo/plan.json

After encode, before anything that needs a GPU. The model is built from its config on the meta device: no weights are
read but the headers of their files. finetune and merge take the targets from here. What later stages would stop at is
tried out as well, with their own libraries, and all that is wrong is said at once.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

from moult.errors import MoultError, some
from moult.files import read_json, write_json
from moult.model.chat import Chat, prompt_of
from moult.model.lora import lora_config, needs_peft, vllm_refuses
from moult.model.manifest import open_model
from moult.model.safetensors import read_tensors
from moult.run.cli import stage_parser
from moult.run.stage import stage
from moult.training.arguments import check_trainer, trainer_config

GIB = 1024**3


def main() -> None:
    parser = stage_parser(__doc__, "plan")
    parser.add_argument("--model", required=True, help="manifest or folder of the base model")
    parser.add_argument("--tokens", required=True, help="folder that encode wrote")
    parser.add_argument("--prompts", type=json.loads, default="[]", help="JSON of eval.prompts, to be tried out")
    parser.add_argument("--out", required=True, help="plan.json to write")
    args = parser.parse_args()

    with stage("plan", args.log_file, args.settings) as log:
        plan(args.settings, args, log)


def plan(settings: dict, args, log) -> None:
    report = read_json(Path(args.tokens) / "report.json")
    base = open_model(args.model)[0]
    tensors = read_tensors(base)
    model = empty_model(base, settings["trust_remote_code"])
    base_parameters = sum(parameter.numel() for parameter in model.parameters())
    tied = tied_modules(model)
    steps = count_steps(args.tokens, report, settings["train"])
    *_, (targets, model) = all_of(
        lambda: check_weights(base, settings["trust_remote_code"]),
        lambda: check_attention(model.config, settings),
        lambda: check_lengths(report, model.config),
        lambda: check_steps(steps, settings["train"]),
        lambda: check_prompts(args.prompts, base, args.tokens, report, model.config, settings),
        lambda: check_train(settings, report, model),
        lambda: lora_targets(model, lora_config(settings["lora"]), settings["lora"], tied),
    )
    place_in_files(targets, tensors, model)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    ranks = {target["r"] for target in targets.values()} or {settings["lora"]["r"]}

    merge_reasons = needs_peft(settings["lora"])
    if any(target["tensor"] is None for target in targets.values()):
        merge_reasons.append("weights are stored under other names")
    serve_reasons = vllm_refuses(settings["lora"], ranks)
    result = {
        "schema_version": 1,
        "parameters": {
            "base": base_parameters,
            "trainable": trainable,
            "trainable_share": trainable / base_parameters,
        },
        "targets": targets,
        "steps": steps,
        "memory": estimate_memory(model, base_parameters, trainable, settings, report),
        "disk": estimate_disk(tensors, trainable, settings["train"]),
        "job": estimate_job(base_parameters, steps, settings, report),
        "merge": {"how": "peft" if merge_reasons else "streamed", "reasons": merge_reasons},
        "serve": {
            "as": "merged" if serve_reasons else "adapter or merged",
            "reasons": serve_reasons,
            "max_lora_rank": max(ranks),
        },
    }
    write_json(args.out, result)
    tell(result, args, log)


def all_of(*checks: Callable) -> list:
    """What each of `checks` returns. Raises MoultError with all that is wrong, not the first only."""
    results, errors = [], []
    for check in checks:
        try:
            results.append(check())
        except MoultError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        listing = "".join(f"\n  - {error.what}\n    -> {error.fix}" for error in errors)
        raise MoultError(f"{len(errors)} problems:{listing}")
    return results


# --- what later stages would stop at ----------------------------------------------------------------------------------


def check_weights(base: Path, trust_remote_code: bool) -> None:
    """The files hold every weight of the model, in its shape. transformers makes up what is missing."""
    from transformers import AutoModelForCausalLM

    # On the meta device the headers of the files are read, and no weight.
    _, info = AutoModelForCausalLM.from_pretrained(
        base,
        device_map="meta",
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        local_files_only=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    names = sorted(info["missing_keys"]) + sorted(
        f"{name} (is {list(there)}, must be {list(wanted)})" for name, there, wanted in info["mismatched_keys"]
    )
    if names:
        raise MoultError(
            f"{base}: the weights lack {some(names)}", "config.json and the weights do not belong together"
        )


def check_attention(config, settings: dict) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    wanted = settings["attn_implementation"]
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(
                config, attn_implementation=wanted, trust_remote_code=settings["trust_remote_code"]
            )
    except (ImportError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        if "installed" not in reason and not torch.cuda.is_available() and isinstance(error, ImportError):
            return  # it is there, and wants a GPU to say more
        raise MoultError(
            f"model.attn_implementation: {wanted}: {reason}", "install what it needs, or set sdpa or null"
        ) from error


def check_lengths(report: dict, config) -> None:
    """No sequence is longer than the model has positions for. Most models would train on it and answer badly."""
    longest, positions = max(report[part]["length"]["longest_kept"] for part in ("train", "val")), positions_of(config)
    if longest > positions:
        raise MoultError(
            f"a sequence has {longest:,} tokens, and the model {positions:,.0f} positions (max_position_embeddings)",
            "lower datasets.<name>.max_length",
        )


def positions_of(config) -> float:
    """How many positions the model has, stretched ones (rope scaling) too."""
    config = config.get_text_config()
    scaling = getattr(config, "rope_parameters", None) or {}
    return (getattr(config, "max_position_embeddings", None) or math.inf) * max(1.0, scaling.get("factor") or 1.0)


def check_steps(steps: dict, train: dict) -> None:
    if steps["total"] == 0:
        raise MoultError(
            f"train: no step in {steps['sequences']:,} sequences: a batch is {steps['sequences_per_batch']:,}, and "
            "dataloader_drop_last leaves out what does not fill one",
            "lower train.per_device_train_batch_size, or leave dataloader_drop_last out",
        )
    if train["warmup_steps"] >= max(1, steps["total"]):
        raise MoultError(
            f"train.warmup_steps: {train['warmup_steps']:g} of {steps['total']:,} steps: the learning rate never "
            "reaches its peak",
            "lower it; below 1 it is a share of all steps",
        )


def check_prompts(prompts: list[dict], base: Path, tokens: str, report: dict, config, settings: dict) -> None:
    """The template can show them all, and the model has the tokens and the positions."""
    if not prompts:
        return
    template = (Path(tokens) / "chat_template.jinja").read_text(encoding="utf-8") or None
    chat = Chat(str(base), template, settings["chat_template_kwargs"], settings["trust_remote_code"])
    for prompt in prompts:
        ids = prompt_of(prompt, chat)[1]
        if report["vocabulary"] and max(ids) >= report["vocabulary"]:
            raise MoultError(
                f"eval.prompts.{prompt['id']}: token {max(ids)} is outside the model's vocabulary of {report['vocabulary']:,}",
                "tokenizer and model do not belong together",
            )
        if len(ids) >= positions_of(config):
            raise MoultError(
                f"eval.prompts.{prompt['id']}: {len(ids):,} tokens, and the model has {positions_of(config):,.0f} positions "
                "(max_position_embeddings), for the answer too",
                "shorten it",
            )


def check_train(settings: dict, report: dict, model) -> None:
    """The train section is one that TRL takes, with all that it names installed."""
    # tf32 is refused where there is no GPU.
    train = {name: value for name, value in settings["train"].items() if name != "tf32"}
    config = trainer_config({**settings, "train": train, "seed": 0}, "trainer_state", "cpu", report["max_length"])
    check_trainer(config, model)


# --- model ------------------------------------------------------------------------------------------------------------


def empty_model(folder: Path, trust_remote_code: bool):
    """The model of a folder's config.json on the meta device: shapes, no weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MoultError(
            f"{folder}: transformers cannot build this model: {reason}",
            "check config.json, or set model.trust_remote_code",
        ) from error


def tied_modules(model) -> set[str]:
    """Names of the modules that share the embedding's weight."""
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if output is None or not model.config.get_text_config().tie_word_embeddings:
        return set()
    return {name for name, module in model.named_modules() if module is output or module is embedding}


def lora_targets(model, config, lora: dict, tied: set[str]) -> tuple[dict[str, dict], object]:
    """{module: what LoRA does to it}, and the model with LoRA in place. Raises MoultError for what cannot come out right."""
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import TrainableTokensWrapper
    from transformers.pytorch_utils import Conv1D

    output = model.get_output_embeddings()
    head = next((name for name, module in model.named_modules() if module is output), None)
    layers = [name for name, module in model.named_modules() if is_linear(module) and name != head]
    linear = sorted({name.rsplit(".", 1)[-1] for name in layers})
    # Initialisations that look at the weights cannot run without them; the shapes are the same.
    config.init_lora_weights = True
    try:
        model = get_peft_model(model, config, low_cpu_mem_usage=True)
    except (ValueError, RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        hint = f"linear layers of this model: {some(linear, 20)}"
        if config.target_modules in linear:
            hint = f"make it a list, [{config.target_modules}]: a text is a regular expression for the whole name"
        raise MoultError(f"lora.target_modules: {reason}", hint) from error
    if isinstance(model.get_output_embeddings(), TrainableTokensWrapper):
        raise MoultError(
            f"lora.trainable_token_indices: {head} has the embedding's weight, and TRL's fused loss cannot use it wrapped "
            "(TRL 1.16)",
            "set lora.modules_to_save: [embed_tokens] and ensure_weight_tying: true instead",
        )
    targets, without_bias = {}, []
    for name, module in model.base_model.model.named_modules():
        if not (isinstance(module, BaseTunerLayer) and hasattr(module, "scaling")):
            continue
        base = module.get_base_layer()
        rows, columns = base.weight.shape
        without_bias += [name] if getattr(base, "bias", None) is None else []
        targets[name] = {
            "r": module.r["default"],
            "scaling": float(module.scaling["default"]),
            "transposed": isinstance(base, Conv1D),
            "shape": [columns, rows] if isinstance(base, Conv1D) else [rows, columns],
            "kind": type(base).__name__,
        }
    check_targets(targets, lora, tied, head, linear)
    if lora.get("lora_bias") and without_bias:
        raise MoultError(
            f"lora.lora_bias: {some(without_bias, 3)} of the base have no bias that the adapter's could be merged into",
            "leave it out",
        )
    return targets, model


def is_linear(module) -> bool:
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Linear | Conv1D)


def check_targets(targets: dict, lora: dict, tied: set[str], head: str | None, linear: list[str]) -> None:
    wanted = lora["target_modules"]
    if isinstance(wanted, list):
        # peft is content when one of them matches.
        idle = [name for name in wanted if not any(target == name or target.endswith(f".{name}") for target in targets)]
        if idle:
            raise MoultError(
                f"lora.target_modules: nothing is named {some(idle)}",
                f"linear layers of this model: {some(linear, 20)}",
            )
    if not targets and not lora.get("target_parameters"):
        raise MoultError("lora.target_modules: no layer matches", f"linear layers of this model: {some(linear, 20)}")
    hit = sorted(tied & set(targets))
    if hit:
        raise MoultError(
            f"lora.target_modules: {some(hit)} share one weight (tied embeddings), and merging LoRA into one changes both",
            "leave them out; to train new tokens, set lora.modules_to_save: [embed_tokens] and ensure_weight_tying: true",
        )
    if head in targets:
        raise MoultError(
            f"lora.target_modules: {head} cannot be tuned: TRL's fused loss reads its weight directly (TRL 1.16)",
            f"leave {head} out; all-linear does",
        )
    saved = [name for name in lora.get("modules_to_save") or [] if any(module.endswith(name) for module in tied)]
    if saved and not lora.get("ensure_weight_tying"):
        raise MoultError(
            f"lora.modules_to_save: {some(saved)} is tied to another weight, and training a copy of it would part the two",
            "set lora.ensure_weight_tying: true, or leave it out",
        )


def place_in_files(targets: dict, tensors: dict, model) -> None:
    """Set each target's `tensor`, its name in the weight files: with or without the base model's prefix (GPT-2)."""
    prefix = f"{model.base_model.model.base_model_prefix}."
    for name, target in targets.items():
        names = [f"{name}.weight", f"{name}.weight".removeprefix(prefix), f"{prefix}{name}.weight"]
        found = next((candidate for candidate in names if candidate in tensors), None)
        shape = target["shape"][::-1] if target["transposed"] else target["shape"]
        target["tensor"] = found if found and list(tensors[found].shape) == shape else None


# --- steps ------------------------------------------------------------------------------------------------------------


def count_steps(tokens: str, report: dict, train: dict) -> dict:
    """How many batches and optimizer steps the run takes, as transformers counts them."""
    sequences = packed_count(tokens, report, train) if train["packing"] else report["train"]["sequences"]
    per_batch = train["per_device_train_batch_size"] * train["gpu"]
    whole = train.get("dataloader_drop_last", False)
    batches = sequences // per_batch if whole else math.ceil(sequences / per_batch)
    per_epoch = math.ceil(batches / train["gradient_accumulation_steps"])
    total = train.get("max_steps", -1)
    if total <= 0 or batches == 0:
        total = math.ceil(per_epoch * train["num_train_epochs"])
    return {
        "sequences": sequences,
        "batches_per_epoch": batches,
        "steps_per_epoch": per_epoch,
        "total": total,
        "sequences_per_batch": per_batch,
        "sequences_per_step": per_batch * train["gradient_accumulation_steps"],
    }


def packed_count(tokens: str, report: dict, train: dict) -> int:
    import pyarrow.parquet
    from datasets import Dataset
    from trl import pack_dataset

    rows = Dataset(pyarrow.parquet.read_table(Path(tokens) / "train.parquet", columns=["input_ids", "labels"]))
    return len(pack_dataset(rows, report["max_length"], train["packing_strategy"]))


# --- estimates --------------------------------------------------------------------------------------------------------


def estimate_memory(model, base: int, trainable: int, settings: dict, report: dict) -> dict:
    """Bytes on each GPU at the longest batch.

    weights: the base in its dtype, the adapter in float32. optimizer: gradient and AdamW's two moments of the adapter,
    float32. activations: what a decoder layer keeps for its backward pass, per token: about 10 vectors of the hidden
    and 4 of the intermediate size in the compute dtype, and two of the hidden size in float32 for the norms; attention
    keeps no scores (SDPA). With gradient checkpointing only one hidden vector per layer, and one layer in full. The
    fused loss keeps logits of one chunk only. An estimate from the shapes, not a measurement.
    """
    config = model.config.get_text_config()
    train = settings["train"]
    width = {"bfloat16": 2, "float16": 2, "float32": 4}[settings["dtype"]]
    hidden = config.hidden_size
    layers = config.num_hidden_layers
    intermediate = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    length = report["max_length"] if train["packing"] else report["train"]["length"]["longest_kept"]
    tokens = train["per_device_train_batch_size"] * length
    per_layer = tokens * (width * (10 * hidden + 4 * intermediate) + 8 * hidden)
    weights = base * width + trainable * 4
    optimizer = trainable * 12
    full = layers * per_layer
    checkpointed = layers * tokens * hidden * width + per_layer
    logits = 3 * 4 * 256 * config.vocab_size
    return {
        "device": "each GPU; on a CPU all is float32",
        "tokens_per_batch": tokens,
        "weights": weights,
        "optimizer": optimizer,
        "logits": logits,
        "activations": full,
        "activations_with_gradient_checkpointing": checkpointed,
        "total": weights + optimizer + logits + full,
        "total_with_gradient_checkpointing": weights + optimizer + logits + checkpointed,
    }


def estimate_disk(tensors: dict, trainable: int, train: dict) -> dict:
    """Bytes that the run writes: checkpoints (adapter and two moments, float32; the kept, the best, the one being written),
    the adapter, the merged model."""
    merged = sum(tensor.end - tensor.begin for tensor in tensors.values())
    checkpoint = trainable * 12
    checkpoints = checkpoint * (train["save_total_limit"] + 2)
    adapter = trainable * 4
    return {
        "checkpoints": checkpoints,
        "adapter": adapter,
        "merged": merged,
        "total": checkpoints + adapter + merged,
    }


def estimate_job(base: int, steps: dict, settings: dict, report: dict) -> dict:
    """What finetune asks of a cluster for its first attempt; a job that needs more gets more at the next, and goes on.

    mem_mb, on each node: 6,000 for Python, CUDA and the data, and the base once for each process, which loads it there.
    runtime, minutes: 30, and 6 operations per parameter and token (forward, backward through the frozen base, and forward
    again with gradient checkpointing) and a quarter for validation, at 25 TFLOP/s on each GPU, which is slow; at most a day,
    the limit of many partitions.
    """
    train = settings["train"]
    width = {"bfloat16": 2, "float16": 2, "float32": 4}[settings["dtype"]]
    tokens = steps["total"] * steps["sequences_per_step"] * report["train"]["tokens"] / steps["sequences"]
    minutes = 30 + 1.25 * 6 * base * tokens / (25e12 * train["gpu"]) / 60
    return {
        "mem_mb": math.ceil(6000 + train["gpu"] // train["nodes"] * base * width / 1e6),
        "runtime": math.ceil(min(minutes, 24 * 60)),
    }


def tell(result: dict, args, log) -> None:
    parameters, steps, memory = result["parameters"], result["steps"], result["memory"]
    log.debug("merge: %s; serve: %s", result["merge"]["how"], result["serve"]["as"])
    log.info(
        "%s steps of %s sequences; %s of %s parameters trained (%.2f %%); GPU memory about %.1f GiB, %.1f if checkpointed",
        f"{steps['total']:,}",
        f"{steps['sequences_per_step']:,}",
        f"{parameters['trainable']:,}",
        f"{parameters['base']:,}",
        100 * parameters["trainable_share"],
        memory["total"] / GIB,
        memory["total_with_gradient_checkpointing"] / GIB,
    )
    free = shutil.disk_usage(Path(args.out).parent).free
    if free < result["disk"]["total"]:
        log.warning(
            "%s has %.1f GiB free, and this run writes about %.1f GiB",
            Path(args.out).parent,
            free / GIB,
            result["disk"]["total"] / GIB,
        )


if __name__ == "__main__":
    main()
