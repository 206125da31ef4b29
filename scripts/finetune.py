"""Train a LoRA adapter with trl.SFTTrainer and peft, on the tokens and labels of encode.

    python scripts/finetune.py --settings '{"lora": {...}, "train": {...}, ...}' --model results/models/config--demo--base.json \\
        --tokens results/demo/tokens --plan results/demo/plan.json \\
        --state results/demo/trainer_state --adapter results/demo/adapter --summary results/demo/adapter.json \\
        --training-log results/demo/training_log.jsonl

After plan, before merge. On several GPUs, put `torchrun --nproc-per-node N` before it. Checkpoints are written to --state, and
the same command continues from the newest complete one: on a CPU to the same bytes, on a GPU with the same rows and random
numbers, where kernels round in an order of their own. After SIGTERM, SIGINT or SIGUSR2 (for Slurm's --signal), it saves at the
end of the step and exits with 75; torchrun turns this into 1. The adapter is a copy of a checkpoint: the one with the lowest
validation loss, or the last.
"""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

from moult.data.token_file import rows_in, unpack
from moult.errors import UNFINISHED, MoultError, some
from moult.files import (
    atomic_file,
    atomic_folder,
    canonical,
    read_json,
    read_jsonl,
    sha256_file,
    sha256_folder,
    sha256_text,
    write_json,
)
from moult.model.device import check_compiler, enough_memory, hardware, limit_threads, load_model, pick, versions
from moult.model.export import adapter_config, copy_tokenizer, write_generation_config
from moult.model.lora import lora_config
from moult.model.manifest import open_model
from moult.model.quantization import bitsandbytes_for
from moult.model.sharding import share_held
from moult.model.tokenizer import load_tokenizer
from moult.run.cli import stage_parser
from moult.run.stage import stage
from moult.training.arguments import batch_sizes, show_backbone, trainer_config
from moult.training.batches import choose_batches
from moult.training.checkpoints import (
    FORMAT,
    UNPACKED,
    adopt,
    checkpoint_folders,
    claim,
    differences,
    fault_of,
    locked,
    newest_whole,
    restore_log,
    step_of,
)
from moult.training.early_stopping import EarlyStopping
from moult.training.ranks import StopSignal, rank, together, world_size
from moult.training.throughput import summary
from moult.workflow.code import hash_of_script


def main() -> None:
    parser = stage_parser(__doc__, "finetune", threads="CPU threads")
    parser.add_argument("--model", required=True, help="manifest or folder of the base model")
    parser.add_argument("--tokens", required=True, help="folder with the tokens that encode wrote")
    parser.add_argument("--plan", required=True, help="plan.json")
    parser.add_argument("--state", required=True, help="folder for the checkpoints")
    parser.add_argument("--adapter", required=True, help="output: adapter folder")
    parser.add_argument("--summary", required=True, help="output: hashes, losses and versions (.json)")
    parser.add_argument("--training-log", required=True, help="output: training log (.jsonl)")
    parser.add_argument("--image", help="identity of the container image; part of the fingerprint")
    parser.add_argument("--resume-from", help="checkpoint to continue from, instead of the newest in --state")
    parser.add_argument(
        "--start-from", help="--state of a run with the same settings, to go on from if --state is empty"
    )
    args = parser.parse_args()

    settings = args.settings
    with stage("finetune", args.log_file, settings, rank=rank()) as log:
        bitsandbytes_for(settings)
        stop = StopSignal()
        # What plan has found that cannot be trained is left out.
        for section in ("lora", "train"):
            settings[section] |= read_json(args.plan).get(section, {})
        state = Path(args.state)
        fingerprint = make_fingerprint(settings, args)
        with locked(state) if rank() == 0 else contextlib.nullcontext():
            if rank() == 0:
                if args.resume_from:
                    # First, because claim() would move a checkpoint of this run aside.
                    check_given(Path(args.resume_from), fingerprint, settings["train"]["load_best_model_at_end"])
                claim(state, fingerprint)
            finetune(settings, args, state, fingerprint, stop, log)


def make_fingerprint(settings: dict, args) -> dict:
    """What the weights depend on. Without it, a checkpoint of other settings would be resumed, with a wrong result: transformers
    (5.23) ignores a changed learning rate and mixes changed data, both silently. The code is this script and the library on
    the disk, so a command that is run again by hand after an edit also trains again."""
    tokens = Path(args.tokens)
    harmless = (
        "report_to",
        "logging_steps",
        "logging_strategy",
        "logging_first_step",
        "save_total_limit",
        "run_name",
        "project",
    )
    train = {name: value for name, value in settings["train"].items() if name not in harmless}
    return {
        "format": FORMAT,
        "code": hash_of_script(Path(__file__)),
        "image": args.image,
        # Where it stops changes no step before.
        "settings": {name: value for name, value in settings.items() if name != "stop_after"} | {"train": train},
        "tokens": {name: sha256_file(tokens / name) for name in ("train.parquet", "val.parquet")},
        "model": open_model(args.model)[1]["files"],
        "versions": {name: value for name, value in versions().items() if name not in ("moult", "python")},
        "processes": world_size(),
    }


# --- the run ----------------------------------------------------------------------------------------------------------


def finetune(settings: dict, args, state: Path, fingerprint: dict, stop: StopSignal, log) -> None:
    device = pick_device(args.threads, settings["train"]["gpu"])
    with together(device == "cpu", settings["train"]):
        tune(settings, args, state, fingerprint, device, stop, log)


def tune(settings: dict, args, state: Path, fingerprint: dict, device: str, stop: StopSignal, log) -> None:
    total = read_json(args.plan)["steps"]["total"]
    wanted = settings["train"].get("max_steps", -1)
    if wanted > 0 and wanted != total:
        raise MoultError(
            f"train.max_steps is {wanted:,}, but {args.plan} has {total:,} steps", "run the stage plan again"
        )
    keep_best = settings["train"]["load_best_model_at_end"]

    def find_checkpoint() -> Path | None:
        if args.resume_from:
            return adopt(Path(args.resume_from), state, keep_best)
        own = newest_whole(state, fingerprint, keep_best)
        if own or not args.start_from:
            return own
        return started_from(Path(args.start_from), state, fingerprint, keep_best, log)

    last = min(total, settings.get("stop_after") or total)
    resume = from_main_process(find_checkpoint)
    if rank() == 0:
        restore_log(state, resume)
    if resume and is_last(resume, last, settings["train"]):
        # transformers would train one step more.
        log.info("%s is the checkpoint of the last step: nothing to train", resume)
        end = step_of(resume)
    else:
        if resume:
            log.info("continuing from %s (of %s steps)", resume, f"{total:,}")
        trainer = make_trainer(settings, args, state, fingerprint, device, stop, resume, log)
        end = train(trainer, resume, total, last, stop, log)
    if rank() == 0:
        publish(settings, args, state, fingerprint, device, end, total, log)
        shutil.rmtree(state / UNPACKED, ignore_errors=True)


def is_last(checkpoint: Path, last: int, train: dict) -> bool:
    """Whether training has ended with this checkpoint: at the step `last`, or early."""
    history = read_json(checkpoint / "trainer_state.json")["log_history"]
    return step_of(checkpoint) >= last or EarlyStopping.of(train).ends(history)


def started_from(before: Path, state: Path, fingerprint: dict, keep_best: bool, log) -> Path | None:
    """A copy of the newest checkpoint in `before`, the state of a run that stopped earlier and is otherwise the same; or None."""
    for checkpoint in reversed(checkpoint_folders(before)):
        if fault_of(checkpoint, fingerprint, keep_best) is None:
            return adopt(checkpoint, state, keep_best)
    log.warning("%s has no checkpoint of this run: training starts at the first step", before)
    return None


def from_main_process(find: Callable):
    """Call `find()` in the main process, and return its result in all processes. Only the main process has locked the folder."""
    if world_size() == 1:
        return find()
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([find() if rank() == 0 else None])[0]


def pick_device(threads: int, gpus: int) -> str:
    """The device to train on. Raises MoultError if the number of processes differs from the config."""
    processes = world_size()
    if processes != gpus:
        raise MoultError(
            f"train.gpu is {gpus}, but {processes} processes are running",
            f"start with: torchrun --nproc-per-node {gpus} scripts/finetune.py ...",
        )
    limit_threads(threads)
    device = pick()
    if device == "cuda":
        check_compiler()
    return device


def check_given(folder: Path, fingerprint: dict, keep_best: bool) -> None:
    """Raises MoultError if the checkpoint of --resume-from is incomplete or belongs to another run, and says what differs."""
    fault = fault_of(folder, fingerprint, keep_best) if folder.is_dir() else "no such folder"
    if fault is None:
        return
    theirs = folder.parent / "fingerprint.json"
    differs = some(differences(read_json(theirs), fingerprint)) if theirs.exists() else ""
    raise MoultError(
        f"--resume-from {folder}: {fault}{f' (differs in: {differs})' if differs else ''}",
        "choose a checkpoint with the same settings, data, model and versions, or leave --resume-from out",
    )


def make_trainer(
    settings: dict,
    args,
    state: Path,
    fingerprint: dict,
    device: str,
    stop: StopSignal,
    resume: Path | None,
    log,
):
    from transformers.utils import logging as transformers_logging

    from moult.training.trainer import Finetuner

    transformers_logging.set_verbosity_info()
    transformers_logging.disable_progress_bar()
    report = read_json(Path(args.tokens) / "report.json")
    found = read_json(resume / "trainer_state.json")["train_batch_size"] if resume else None
    base = str(open_model(args.model)[0])
    tokenizer = load_tokenizer(base, settings["trust_remote_code"])
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(report["pad_token_id"])
    rows, val = open_tokens(Path(args.tokens), state)
    shards = world_size() if settings["train"]["shard"] else 1
    model = load_model(base, device, settings, settings["quantization"], shards)
    show_backbone(model)
    batches = choose_batches(settings, read_json(args.plan)["batches"], device, model.config)
    if batches.attention:
        model.set_attn_implementation(batches.attention)
    config = trainer_config(settings, state, device, report["max_length"], batches, found)
    try:
        with enough_memory("adding the adapter to the base", "use a GPU with more memory, or a lower lora.r"):
            trainer = Finetuner(
                model=model,
                args=config,
                processing_class=tokenizer,
                train_dataset=rows,
                eval_dataset=val if config.eval_strategy != "no" else None,
                peft_config=lora_config(settings["lora"]),
                state=state,
                fingerprint=fingerprint,
                val_rows=rows_in(val.data),
                pad_id=report["pad_token_id"],
                keep_best=settings["train"]["load_best_model_at_end"],
                keep=settings["train"]["save_total_limit"],
                stop=stop,
                resume=resume,
                checkpointing=settings["train"]["gradient_checkpointing"],
                sizes=batch_sizes(settings["train"], device, found),
                unmasked=batches.unmasked,
                early_stopping=EarlyStopping.of(settings["train"]),
                stop_after=settings.get("stop_after"),
            )
    except (ImportError, RuntimeError, ValueError) as error:  # settings that Trainer or TRL refuses
        raise MoultError(
            f"train: {str(error).splitlines()[0]}",
            "fix the train section of the config, or install the missing package",
        ) from error
    strays = {parameter.device.type for parameter in trainer.model.parameters()} - {device}
    if strays:
        raise MoultError(
            f"part of the model is on {some(sorted(strays))}, not on {device}",
            "free GPU memory, or use a larger GPU",
        )
    log.info(
        "training on %s; base in %s%s, adapter in float32",
        device,
        settings["quantization"] or str(next(iter(trainer.model.parameters())).dtype).removeprefix("torch."),
        f", split over {shards} processes ({share_held(model):.0%} of it in this one)" if shards > 1 else "",
    )
    return trainer


def open_tokens(tokens: Path, state: Path) -> list:
    """Token ids, labels and lengths (for group_by_length) of train and val, as memory-mapped datasets.Datasets.

    All processes map the same files. They are in the run's state, because the temporary folder of a node may be in memory; TRL
    puts the rows that it has packed beside them.
    """
    from datasets import Dataset

    def unpack_both() -> list[str]:
        folder = state / UNPACKED
        folder.mkdir(exist_ok=True)
        for part in ("train", "val"):
            unpack(tokens / f"{part}.parquet", folder / f"{part}.arrow", ["input_ids", "labels", "length"])
        return [str(folder / f"{part}.arrow") for part in ("train", "val")]

    return [Dataset.from_file(path) for path in from_main_process(unpack_both)]


def train(trainer, resume: Path | None, total: int, last: int, stop: StopSignal, log) -> int:
    """Train to the end, and return its step: `last`, or an earlier one. Raises MoultError if a signal ends it before."""
    stop.training = True
    with enough_memory("training", "lower train.per_device_train_batch_size"):
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    stop.training = False
    step = trainer.state.global_step
    if trainer.state.max_steps != total:
        raise MoultError(
            f"the trainer counts {trainer.state.max_steps} steps, the plan {total}",
            "this is a bug in Moult; please report it",
        )
    if step < last and trainer.early_stopping.ends(trainer.state.log_history):
        patience = trainer.early_stopping.patience
        log.info("no gain in %d validations: training ends at step %s of %s", patience, f"{step:,}", f"{total:,}")
    elif step < last:
        raise MoultError(
            f"stopped by {stop.received or 'a signal to another process'} at step {step:,} of {last:,}; checkpoint saved",
            "run the same command again to go on",
            UNFINISHED,
        )
    log.debug("trained %s steps", f"{step:,}")
    return step


# --- publishing -------------------------------------------------------------------------------------------------------


def publish(settings: dict, args, state: Path, fingerprint: dict, device: str, end: int, total: int, log) -> None:
    """Write the adapter folder from the best checkpoint (or that of the step `end`), after a check that it is trained."""
    last = read_json(state / f"checkpoint-{end}" / "trainer_state.json")
    keep_best = settings["train"]["load_best_model_at_end"]
    step = last["best_global_step"] if keep_best else end
    checkpoint = state / f"checkpoint-{step}"
    check_trained(checkpoint / "adapter_model.safetensors")
    report = read_json(Path(args.tokens) / "report.json")
    template = (Path(args.tokens) / "chat_template.jinja").read_text(encoding="utf-8")
    base, manifest = open_model(args.model)
    with atomic_folder(args.adapter) as folder:
        shutil.copyfile(checkpoint / "adapter_model.safetensors", folder / "adapter_model.safetensors")
        write_json(
            folder / "adapter_config.json",
            adapter_config(checkpoint / "adapter_config.json", manifest["name"], manifest["commit"]),
        )
        copy_tokenizer(base, folder, template, report["template"].get("named", {}))
        write_generation_config(base, folder, report["stop"])
    history = list(read_jsonl(state / "training_log.jsonl"))
    with atomic_file(args.training_log) as partial:
        shutil.copyfile(state / "training_log.jsonl", partial)
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry and entry["step"] in (step, end)]
    write_json(
        args.summary,
        {
            "schema_version": 1,
            "files": sha256_folder(args.adapter),
            "adapter_sha256": sha256_file(Path(args.adapter) / "adapter_model.safetensors"),
            "step": step,
            "steps": total,
            "ended": {"step": end, "because": why_ended(end, total, settings.get("stop_after"))},
            "batch": last["train_batch_size"],
            "validation_loss": {
                "published": losses[0] if losses else None,
                "last": losses[-1] if losses else None,
            },
            "training_loss": [entry["loss"] for entry in history if "loss" in entry][-1:],
            "chosen": "lowest validation loss" if keep_best else "last step",
            "settings": settings,
            "fingerprint": sha256_text(canonical(fingerprint)),
            "throughput": summary(history),
            "versions": versions(),
            "hardware": hardware(device),
        },
    )
    log.info(
        "adapter of step %s of %s%s",
        f"{step:,}",
        f"{end:,}",
        f", validation loss {losses[0]:.4f}" if losses else "",
    )


def why_ended(end: int, total: int, stop_after: int | None) -> str:
    return "last step" if end == total else "stop_after" if end == stop_after else "early stopping"


def check_trained(path: Path) -> None:
    """Raises MoultError if a tensor is not finite, or if a B matrix still has the zeros that it starts with."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise MoultError(f"{path}: these tensors are not finite: {some(broken)}", "lower train.learning_rate")
    still = [name for name, tensor in tensors.items() if "lora_B" in name and not tensor.any()]
    if still:
        raise MoultError(
            f"{path}: training has not changed {some(still)}",
            "check lora.target_modules and train.learning_rate",
        )


if __name__ == "__main__":
    main()
