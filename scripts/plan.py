"""Work out what a run will do before a GPU is spent on it: parameters, LoRA targets, steps, memory, disk, how to serve.

    python scripts/plan.py --settings '{"lora": {...}, "train": {...}, "dtype": "bfloat16", ...}' \\
        --model config/demo/base --tokens results/demo/tokens --out results/demo/plan.json

After encode, before anything that needs a GPU. The model is built from its config on the meta device: no weights are
read but the headers of their files. finetune and merge take the targets from here. What later stages would stop at is
tried out as well, with their own libraries, and all that is wrong is said at once.
"""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from moult.data.token_file import lengths_of
from moult.errors import MoultError, some
from moult.files import read_json, write_json
from moult.measuring.foresight import tell_power
from moult.measuring.forgetting import instructions
from moult.model.architecture import auto_class, empty_model, other_class
from moult.model.chat import Chat, prompt_of
from moult.model.estimates import estimate_disk, estimate_job
from moult.model.layout import stored_as
from moult.model.lora import needs_peft, not_linear, vllm_refuses
from moult.model.manifest import open_model
from moult.model.quantization import bitsandbytes_for
from moult.model.safetensors import read_tensors
from moult.model.sharding import OUTSIDE, share_split
from moult.model.shrunken import BROKEN, shrink
from moult.run.cli import stage_parser
from moult.run.stage import stage
from moult.training.arguments import batch_sizes, check_trainer, trainer_config
from moult.training.early_stopping import ENDLESS
from moult.training.memory import GB, Run, check_fits, memory_of, needed
from moult.training.packing import ROUNDING, mixing, try_batches
from moult.training.targets import out_of_reach, place_lora
from moult.training.trial import without_router_loss


def main() -> None:
    parser = stage_parser(__doc__, "plan")
    parser.add_argument("--model", required=True, help="manifest or folder of the base model")
    parser.add_argument("--tokens", required=True, help="folder that encode wrote")
    parser.add_argument("--eval", type=json.loads, default="{}", help="JSON of the section eval: what will be asked")
    parser.add_argument("--out", required=True, help="plan.json to write")
    args = parser.parse_args()

    with stage("plan", args.log_file, args.settings) as log:
        bitsandbytes_for(args.settings)
        plan(args.settings, args, log)


def plan(settings: dict, args, log) -> None:
    report = read_json(Path(args.tokens) / "report.json")
    base = open_model(args.model)[0]
    model = empty_model(base, settings["trust_remote_code"])
    tensors = read_tensors(base)
    base_parameters = sum(parameter.numel() for parameter in model.parameters())
    small = shrink(model)
    if small is None:
        log.warning("no small model of this architecture can be made: what LoRA can train shows in the trial step only")
    no_router_loss = small and without_router_loss(small, settings["train"])
    if no_router_loss:
        log.warning("trained without the loss that balances the experts, which fails: %s", no_router_loss)
    exact = try_batches(small)
    steps = count_steps(args.tokens, report, settings["train"])
    lora = settings["lora"]
    *_, targets = all_of(
        lambda: check_weights(base, settings["trust_remote_code"]),
        lambda: check_attention(model.config, settings),
        lambda: check_lengths(report, model.config),
        lambda: check_steps(steps, settings["train"]),
        lambda: check_prompts(args.eval.get("prompts", []), base, args.tokens, report, model.config, settings),
        lambda: check_train(settings, report, model),
        lambda: check_packing(small, exact, settings, log),
        lambda: check_shard(model, settings["train"]),
        lambda: place_lora(model, lora, small),
    )
    quantization = settings["quantization"] and plan_quantization(settings["quantization"], model, small, targets, lora)
    stored = stored_as(model, tensors)
    for name, target in targets.layers.items():
        target["tensor"] = stored.get(f"{name}.weight")
    for name, target in targets.parameters.items():
        target["tensor"] = stored.get(name)
    trainable = sum(parameter.numel() for parameter in targets.model.parameters() if parameter.requires_grad)
    run = Run(model, targets, settings, report, exact, longest_rows(args.tokens, settings["train"]))
    memory = memory_of(run, gpu_memory(settings["train"]))
    check_fits(run, memory, log)
    everything = {**targets.layers, **targets.parameters}
    ranks = {target["r"] for target in everything.values()} or {lora["r"]}

    as_peft_has_it = {**lora, "target_parameters": sorted(targets.parameters)}
    not_matrices = not_linear(targets.model)
    merge_reasons = needs_peft(as_peft_has_it) + not_matrices
    serve_reasons = vllm_refuses(as_peft_has_it, ranks) + not_matrices + other_class(base, model)
    result = {
        "schema_version": 1,
        "auto_class": auto_class(model.config).__name__,
        "parameters": {
            "base": base_parameters,
            "trainable": trainable,
            "trainable_share": trainable / base_parameters,
        },
        "targets": targets.layers,
        "target_parameters": targets.parameters,
        "left_out": targets.left_out,
        "out_of_reach": out_of_reach(model, targets, lora),
        # What finetune sets besides the config.
        "lora": targets.added_settings(lora),
        "train": {"router_aux_loss_coef": 0.0} if no_router_loss else {},
        # How rows may be put together (packing.try_batches): what finetune chooses from.
        "batches": exact,
        "quantization": quantization,
        "steps": steps,
        "memory": memory,
        "disk": estimate_disk(tensors, trainable, settings["train"], report["train"]["tokens"]),
        "job": estimate_job(base_parameters, steps, settings, report),
        "merge": {"how": "peft" if merge_reasons else "streamed", "reasons": merge_reasons},
        "serve": {
            "as": "merged" if serve_reasons else "adapter or merged",
            "reasons": serve_reasons,
            "max_lora_rank": max(ranks),
            # Not the base that the adapter was trained on. Elsewhere (serve.vllm.quantization) it is another model than the one
            # that metrics.json is about.
            "base": "not quantized" if quantization else None,
        },
    }
    write_json(args.out, result)
    tell(result, args, log)
    tell_schedule(settings["train"], log)
    if args.eval:
        has_template = (Path(args.tokens) / "chat_template.jinja").stat().st_size > 0
        tell_questions(args.eval, report["test"]["sequences"], has_template, log)


def plan_quantization(kind: str, model, small, targets, lora: dict) -> dict:
    """What of the base is quantized for training. Raises MoultError if that is nothing, or if it does not work."""
    from moult.training.quantized import check_quantized, count_quantized

    counted = count_quantized(model, kind)
    if small is not None:
        check_quantized(small, kind, targets, lora)
    return counted


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
    from transformers import AutoConfig

    # On the meta device the headers of the files are read, and no weight.
    _, info = auto_class(AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)).from_pretrained(
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

    wanted = settings["attn_implementation"]
    try:
        with torch.device("meta"):
            auto_class(config).from_config(
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
    longest, positions = (
        max(report[part]["length"]["longest_kept"] for part in ("train", "val", "test")),
        positions_of(config),
    )
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
    config = trainer_config({**settings, "train": train, "seed": 0}, "trainer_state", None, report["max_length"])
    check_trainer(config, model)


def check_packing(small, exact: dict, settings: dict, log) -> None:
    """Rows that are packed into one sequence do not see each other, tried on a small model of the same architecture."""
    train, attention = settings["train"], settings["attn_implementation"]
    key = "packing" if train["packing"] else "padding_free"
    # Other attention needs a GPU: finetune tries it there.
    if train[key] is not True or small is None or attention not in (None, "eager", "sdpa"):
        return
    if attention:
        small.set_attn_implementation(attention)
    elif exact["varlen"] is None:
        return
    else:
        log.warning(
            "train.%s: the fast attention for it cannot be used with this model (%s): a sequence costs the square of its length",
            key,
            exact["varlen"],
        )
    try:
        difference = mixing(small, [[token + 3 for token in range(start, start + 12)] for start in (0, 30, 80)])
    except BROKEN as error:
        raise MoultError(f"train.{key}: {str(error).strip().splitlines()[0]}", f"set train.{key}: false") from error
    if not difference < ROUNDING:
        raise MoultError(
            f"train.{key}: rows that are packed into one sequence see each other in this model (its logits differ by "
            f"{difference:.1%} of the largest from those of each row alone)",
            f"set train.{key}: false",
        )


def check_shard(model, train: dict) -> None:
    """transformers has a plan by which it can split this model over GPUs, layer by layer."""
    if train["shard"] and (share := share_split(model)) < 1 - OUTSIDE:
        raise MoultError(
            f"train.shard: transformers splits only {share:.0%} of this model over the GPUs: its plan has other names for the "
            "layers",
            "leave shard out: use GPUs that hold the whole base, or model.quantization",
        )


# --- memory -----------------------------------------------------------------------------------------------------------


def gpu_memory(train: dict) -> int | None:
    """Bytes of memory of each GPU that will train, or None if that is not known.

    The config says it, or the GPU of this machine. In a job of Slurm that is not the one that trains: this stage asks for none.
    """
    import torch

    if train.get("gpu_memory"):
        return round(train["gpu_memory"] * GB)
    if "SLURM_JOB_ID" in os.environ or not torch.cuda.is_available():
        return None
    return min(torch.cuda.get_device_properties(number).total_memory for number in range(torch.cuda.device_count()))


def longest_rows(tokens: str, train: dict) -> list[int]:
    """The lengths of the longest sequences, as many as a batch has."""
    import numpy as np

    lengths = np.concatenate([[0], *lengths_of(Path(tokens) / "train.parquet")])
    return np.sort(lengths)[::-1][: batch_sizes(train, "cuda")[0]].tolist()


# --- steps ------------------------------------------------------------------------------------------------------------


def count_steps(tokens: str, report: dict, train: dict) -> dict:
    """How many batches and optimizer steps the run takes, as transformers counts them."""
    sequences = packed_count(tokens, report, train) if train["packing"] else report["train"]["sequences"]
    # With `auto`, finetune finds how large a batch is. A step has the same sequences with each, so the smallest does.
    per_batch = batch_sizes(train, "cuda")[-1] * train["gpu"]
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
        "early_stopping": train["early_stopping_patience"] is not None,  # then `total` is the most that it can be
        "sequences_per_batch": per_batch,
        "sequences_per_step": per_batch * train["gradient_accumulation_steps"],
    }


def packed_count(tokens: str, report: dict, train: dict) -> int:
    import pyarrow as pa
    from datasets import Dataset
    from trl import pack_dataset

    # Only the lengths matter: lists of as many nulls, which take up no memory.
    chunks = []
    for lengths in lengths_of(Path(tokens) / "train.parquet"):
        ends = lengths.cumsum()
        chunks.append(pa.ListArray.from_arrays(pa.array([0, *ends], pa.int32()), pa.nulls(int(ends[-1]))))
    rows = Dataset(pa.table({"input_ids": pa.chunked_array(chunks)}))
    return len(pack_dataset(rows, report["max_length"], train["packing_strategy"]))


# --- on the console ----------------------------------------------------------------------------------------------------


def tell(result: dict, args, log) -> None:
    parameters, steps, memory = result["parameters"], result["steps"], result["memory"]
    log.debug("merge: %s; serve: %s", result["merge"]["how"], result["serve"]["as"])
    for why in dict.fromkeys(result["left_out"].values()):
        names = [name for name, reason in result["left_out"].items() if reason == why]
        log.warning("LoRA is not on %s: %s", some(names), why)
    if result["out_of_reach"]:
        log.warning(
            "all-linear leaves out %.0f %% of the parameters: weights of experts, or layers that have the name of an expert's; "
            "to tune them too, set lora.target_parameters: [%s]",
            100 * result["out_of_reach"]["share"],
            ", ".join(result["out_of_reach"]["target_parameters"]),
        )
    quantization = result["quantization"]
    if quantization and quantization["share"] < 0.5:
        log.warning(
            "%s: only %.0f %% of the parameters are quantized; the others (stacked weights of experts, embeddings, the head) "
            "stay in 16 bits",
            quantization["kind"],
            100 * quantization["share"],
        )
    text = "unknown: config.json does not say how large the layers are"
    if memory:
        plain, checkpointed = needed(memory, False) / GB, needed(memory, True) / GB
        text = f"about {plain:.1f} GB, {checkpointed:.1f} if checkpointed"
    log.info(
        "%s%s steps of %s sequences; %s of %s parameters trained (%.2f %%); GPU memory %s",
        "at most " if steps["early_stopping"] else "",
        f"{steps['total']:,}",
        f"{steps['sequences_per_step']:,}",
        f"{parameters['trainable']:,}",
        f"{parameters['base']:,}",
        100 * parameters["trainable_share"],
        text,
    )
    free = shutil.disk_usage(Path(args.out).parent).free
    if free < result["disk"]["total"]:
        log.warning(
            "%s has %.1f GB free, and this run writes about %.1f GB",
            Path(args.out).parent,
            free / GB,
            result["disk"]["total"] / GB,
        )


def tell_schedule(train: dict, log) -> None:
    """Early stopping is biased where the learning rate falls towards a last step that is then not reached (Hägele et al.,
    arXiv:2405.18392)."""
    if train["early_stopping_patience"] is not None and train["lr_scheduler_type"] not in ENDLESS:
        log.warning(
            "train.early_stopping_patience with lr_scheduler_type %s: a run that stops early ends with a learning rate that has "
            "not fallen, and is worse than one that was planned as short; constant_with_warmup has no such bias",
            train["lr_scheduler_type"],
        )


def tell_questions(questions: dict, test_rows: int, has_template: bool, log) -> None:
    """What the evaluation will show. Not in plan.json: more questions change nothing of the training."""
    counts = {"prompts": sum("expect" in prompt for prompt in questions.get("prompts", []))}
    counts["rows"] = min(questions["answer_rows"], test_rows) if questions.get("row_expect") else 0
    counts["instructions"] = len(instructions()) if questions["forgetting"] and has_template else 0
    measured = min(questions["max_rows"] or test_rows, test_rows) if questions["perplexity"] else 0
    tell_power(questions, {part: n for part, n in counts.items() if n}, measured, log)


if __name__ == "__main__":
    main()
