"""How much memory of a GPU a run needs, whether it fits, and what would fit if it does not."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypedDict

from moult.errors import MoultError
from moult.measuring.likelihood import MAX_LOGITS, MAX_TOKENS
from moult.model.estimates import BYTES, estimate_activations, largest
from moult.model.shrunken import BROKEN
from moult.training.simulation import Step, quantized_bytes, simulate
from moult.training.targets import Targets, is_linear

GB = 10**9

# Of the peak, what the allocator loses between its blocks; and what CUDA, cuBLAS and NCCL take for themselves, in bytes.
# Against published figures the simulation is within 15 % with these (tests/test_memory.py).
LOSS = 0.08
CONTEXT = 1_500_000_000

# Bytes that an optimizer keeps of each trained number. Paged ones keep theirs in the memory of the host where it is short.
MOMENTS = {"8bit": 2, "paged": 0, "sgd": 0, "adafactor": 0}
ADAM = 8

SHORTEST = 256  # tokens: a shorter max_length is not proposed


class Memory(TypedDict):
    """Bytes on each GPU, at the longest batch. plan.json has it under `memory`.

    how: `simulated`, or `formula` where the model's code cannot be run without values.
    attention: what the kernel gets (moult.training.simulation.Step).
    weights: the base, or the part of it that a GPU holds if it is sharded, and the adapter in float32.
    optimizer: the adapter's gradients and the optimizer's moments; with several GPUs also DDP's copy of the gradients.
    gathered: with train.shard, what is put together of other GPUs' parts at a time: two layers and the head.
    activations: what forward and backward pass need besides, without and with gradient checkpointing.
    validation: the same for the validation.
    total: the largest sum of those that are there at the same time, 8 % of it, and 1.5 GB for CUDA itself.
    gpu: memory of the GPU, or None if it is not known.
    """

    how: str
    device: str
    attention: str
    tokens_per_batch: int
    weights: int
    optimizer: int
    gathered: int
    activations: int
    activations_with_gradient_checkpointing: int
    validation: int
    total: int
    total_with_gradient_checkpointing: int
    gpu: int | None


@dataclass
class Run:
    """What the memory of a run depends on.

    model: the base on the meta device. targets: LoRA on it. report: of encode, with the lengths of the rows.
    exact: what plan has found of how rows may be put together (moult.training.packing.try_batches).
    lengths: those of the rows, the longest first; as many as a batch has. Without them each is as long as the longest.
    """

    model: Any
    targets: Targets
    settings: dict
    report: dict
    exact: dict[str, str | None] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)

    def changed(self, train: dict | None = None, **settings) -> "Run":
        return dataclasses.replace(
            self, settings={**self.settings, **settings, "train": {**self.settings["train"], **(train or {})}}
        )

    def shorter(self, length: int) -> "Run":
        parts = {
            part: {**self.report[part], "length": {**self.report[part]["length"], "longest_kept": length}}
            for part in ("train", "val")
        }
        return dataclasses.replace(self, report={**self.report, **parts, "max_length": length})

    @property
    def train(self) -> dict:
        return self.settings["train"]

    @property
    def rows(self) -> int:
        """Of a batch on each GPU; the least where finetune looks for the most that fit."""
        size = self.train["per_device_train_batch_size"]
        return 1 if size == "auto" else size

    @property
    def longest(self) -> int:
        return self.report["max_length"] if self.train["packing"] else self.report["train"]["length"]["longest_kept"]

    @property
    def length(self) -> int:
        """Tokens of a row in the longest batch: as many as its longest has, or without padding as they have on average."""
        rows = [min(length, self.longest) for length in self.lengths[: self.rows]]
        return math.ceil(sum(rows) / len(rows)) if rows and self.padding_free else self.longest

    @property
    def padding_free(self) -> bool:
        """Whether rows lie behind each other as they are (moult.training.batches.choose_batches)."""
        wanted = self.train.get("padding_free")
        return not self.train["packing"] and (wanted is True or (wanted == "auto" and varlen_runs(self)))

    @property
    def checkpointing(self) -> bool:
        """Whether training may fall back on gradient checkpointing."""
        return self.train["gradient_checkpointing"] is not False


# --- what it needs ----------------------------------------------------------------------------------------------------


def memory_of(run: Run, gpu: int | None = None) -> Memory | None:
    """What `run` needs on each GPU; None if config.json does not say how large the model is, and its code cannot be run."""
    step, validation = steps_of(run)
    found = activations_of(run, [step, dataclasses.replace(step, checkpointing=True), validation])
    if found is None:
        return None
    (plain, checkpointed, validated), how = found
    weights, gathered = weights_of(run)
    return Memory(
        how=how,
        device="each GPU; on a CPU all is float32",
        attention=step.attention,
        tokens_per_batch=step.rows * step.length,
        weights=weights,
        optimizer=optimizer_of(run),
        gathered=gathered,
        activations=plain,
        activations_with_gradient_checkpointing=checkpointed,
        validation=validated,
        total=with_margin(peak_of(run, plain, validated)),
        total_with_gradient_checkpointing=with_margin(peak_of(run, checkpointed, validated)),
        gpu=gpu,
    )


def steps_of(run: Run) -> tuple[Step, Step]:
    """The longest batch of the training, and of the validation."""
    step = Step(
        rows=run.rows,
        length=run.length,
        attention=attention_of(run),
        dtype=run.settings["dtype"],
        quantization=run.settings.get("quantization"),
        cast_inputs=False,  # moult.training.trainer
    )
    rows, length = validation_batch(run)
    attention = "dense" if rows > 1 and step.attention == "flash" else step.attention  # it gives the model a mask
    return step, dataclasses.replace(step, training=False, rows=rows, length=length, attention=attention)


def activations_of(run: Run, steps: list[Step]) -> tuple[list[int], str] | None:
    """Bytes of each step besides weights and optimizer, and how they were found."""
    config = run.model.config.get_text_config()
    try:
        found, how = simulate(run.model, with_exclusions(run), steps), "simulated"
    except BROKEN:
        stacked = sum(math.prod(target["shape"]) for target in run.targets.parameters.values())
        found, how = [], "formula"
        for step in steps:
            estimate = estimate_activations(config, stacked, step.rows * step.length, step.dtype)
            if estimate is None:
                return None
            found.append(estimate[step.checkpointing or not step.training])
    vocabulary = largest(config, "vocab_size") or 0
    heads = [0 if step.training else logits_of_validation(vocabulary, step) for step in steps]
    return [activations + head for activations, head in zip(found, heads, strict=True)], how


def peak_of(run: Run, activations: int, validation: int) -> int:
    held = sum(weights_of(run)) + optimizer_of(run)
    return max(held + activations, held + validation - 4 * trained_of(run))  # the validation has no gradients


def trained_of(run: Run) -> int:
    return sum(parameter.numel() for parameter in run.targets.model.parameters() if parameter.requires_grad)


def optimizer_of(run: Run) -> int:
    copies = 2 if run.train["gpu"] > 1 and not run.train.get("shard") else 1
    return trained_of(run) * (4 * copies + moments_of(run.train.get("optim", "")))


def with_margin(peak: int) -> int:
    return round(peak * (1 + LOSS)) + CONTEXT


def without_margin(total: int) -> int:
    return round((total - CONTEXT) / (1 + LOSS))


def with_exclusions(run: Run) -> dict:
    return {**run.settings["lora"], **run.targets.added_settings(run.settings["lora"])}


def attention_of(run: Run) -> str:
    """What the attention kernel gets: see Step. A mask is needed for rows that are padded or lie behind each other, where the
    model allows no other way (moult.training.packing)."""
    wanted, train = run.settings["attn_implementation"], run.train
    if wanted == "eager":
        return "eager"
    if wanted not in (None, "sdpa"):
        return "flash"
    behind = train["packing"] or train.get("padding_free")
    if behind and varlen_runs(run):
        return "flash"
    if behind is True:
        return "dense"
    return "flash" if run.rows == 1 or run.exact.get("unmasked", "not tried") is None else "dense"


def varlen_runs(run: Run) -> bool:
    """Whether the attention of moult.model.varlen can be used: FlashAttention wants half precision."""
    free = run.settings["attn_implementation"] is None and run.settings["dtype"] != "float32"
    return free and run.exact.get("varlen", "not tried") is None


def validation_batch(run: Run) -> tuple[int, int]:
    """Rows and length of the largest validation batch (moult.measuring.likelihood)."""
    longest = max(1, run.report["val"]["length"]["longest_kept"])
    return max(1, min(MAX_TOKENS["cuda"] // longest, run.report["val"]["sequences"])), longest


def logits_of_validation(vocabulary: int, batch: Step) -> int:
    """Of one part: as the model gives them and the scored ones of them, in float32, and their logarithms."""
    return min(batch.rows * batch.length * vocabulary, MAX_LOGITS) * (2 * BYTES[batch.dtype] + 8)


def moments_of(optimizer: str) -> int:
    return min((size for word, size in MOMENTS.items() if word in str(optimizer)), default=ADAM)


def weights_of(run: Run) -> tuple[int, int]:
    """Bytes of the weights that a GPU holds, and of those that it gathers from others at a time."""
    width, how = BYTES[run.settings["dtype"]], run.settings.get("quantization")
    model = run.targets.model
    head = model.get_output_embeddings()
    few_bits = set()
    if how:
        few_bits = {id(module.weight) for module in model.modules() if is_linear(module) and module is not head}
    base, adapter = 0, 0
    for parameter in model.parameters():  # tied ones come once
        if parameter.requires_grad:
            adapter += parameter.numel() * 4
        elif how and id(parameter) in few_bits:
            base += quantized_bytes(tuple(parameter.shape), how)
        else:
            base += parameter.numel() * width
    if not run.train.get("shard"):
        return base + adapter, 0
    depth = run.model.config.get_text_config().num_hidden_layers
    ends = [run.model.get_input_embeddings(), run.model.get_output_embeddings()]
    sizes = [end.weight.numel() * width for end in ends if end is not None]
    inner = base - sum(sizes if len({id(end.weight) for end in ends if end is not None}) > 1 else sizes[:1])
    return base // run.train["gpu"] + adapter, 2 * inner // depth + max(sizes, default=0)


# --- whether it fits --------------------------------------------------------------------------------------------------


def needed(memory: Memory, checkpointing: bool) -> int:
    return memory["total_with_gradient_checkpointing" if checkpointing else "total"]


def check_fits(run: Run, memory: Memory | None, log) -> None:
    """Raises MoultError for a run that cannot fit into its GPU, and says what would. Warns where it depends on the margin."""
    if memory is None or memory["gpu"] is None:
        return
    total, gpu = needed(memory, run.checkpointing), memory["gpu"]
    if total <= gpu:
        return
    how = " with gradient checkpointing" if run.checkpointing else ""
    batch = f"{run.rows} x {run.longest:,} tokens"
    if without_margin(total) <= gpu:
        log.warning(
            "this run needs about %.1f GB on each GPU of %.1f GB%s, for a batch of %s: it may run out of memory. The first "
            "minute of finetune shows it",
            total / GB,
            gpu / GB,
            how,
            batch,
        )
        return
    options = list(what_fits(run, gpu))
    raise MoultError(
        f"this run needs about {total / GB:.1f} GB on each GPU{how}, and there are {gpu / GB:.1f} GB (train.gpu_memory, or the "
        f"GPU of this machine): {memory['weights'] / GB:.1f} GB for the weights, and a batch of {batch}",
        f"set one of these: {'; '.join(options)}" if options else "use a larger GPU, or a smaller model",
    )


def what_fits(run: Run, gpu: int) -> Iterator[str]:
    """Settings with which the run fits into GPUs of this size, as they are written in the config."""
    found = False
    for options in (single_changes(run), combined_changes(run)):
        for kind in options:
            text = next((text for text, other in kind if fits(other, gpu)), None)
            if text:
                found = True
                yield text
        if found:
            return


def fits(run: Run, gpu: int) -> bool:
    """Whether a changed run fits. What is far from it is seen without running it."""
    step, validation = steps_of(run)
    step = dataclasses.replace(step, checkpointing=run.checkpointing)
    if with_margin(peak_of(run, inputs_of(run, step), 0)) > gpu:
        return False
    found = activations_of(run, [step, validation])
    return found is not None and with_margin(peak_of(run, *found[0])) <= gpu


def inputs_of(run: Run, step: Step) -> int:
    """Bytes of what each layer gets, which is kept whatever is done; without checkpointing ten times as much is."""
    config = run.model.config.get_text_config()
    sizes = [largest(config, name) or 0 for name in ("num_hidden_layers", "hidden_size")]
    return math.prod(sizes) * step.rows * step.length * BYTES[step.dtype] * (1 if step.checkpointing else 10)


def single_changes(run: Run) -> list[list[tuple[str, Run]]]:
    """Changes of one kind each, those that cost least first."""
    checkpointed = [("train.gradient_checkpointing: auto", run.changed({"gradient_checkpointing": "auto"}))]
    lengths = [2**power for power in range(17, 7, -1) if SHORTEST <= 2**power < run.longest]
    return [
        [] if run.checkpointing else checkpointed,
        smaller_batches(run),
        [(f"datasets.<name>.max_length: {length}", run.shorter(length)) for length in lengths],
        [("model.quantization: nf4", quantized(run))] if can_quantize(run) else [],
        [
            (f"train.gpu: {gpus} and train.shard: true", sharded(run, gpus))
            for gpus in (2, 4, 8)
            if can_shard(run, gpus)
        ],
    ]


def combined_changes(run: Run) -> list[list[tuple[str, Run]]]:
    """Several savings together: gradient checkpointing, one row at a time, and a base in few bits or in parts."""
    least = run.changed({"gradient_checkpointing": "auto"})
    *_, (batch, least) = [("", least), *smaller_batches(least)]
    words = [] if run.checkpointing else ["train.gradient_checkpointing: auto"]
    words += [batch] if batch else []

    def together(text: str, other: Run) -> tuple[str, Run]:
        return " and ".join([*words, text]), other

    return [
        [together("model.quantization: nf4", quantized(least))] if can_quantize(run) else [],
        [
            together(f"train.gpu: {gpus} and train.shard: true", sharded(least, gpus))
            for gpus in (2, 4, 8, 16)
            if can_shard(run, gpus)
        ],
    ]


def smaller_batches(run: Run) -> list[tuple[str, Run]]:
    """The same batch for each step in smaller parts."""
    rows, parts = run.rows, run.train["gradient_accumulation_steps"]
    found = []
    while rows > 1:
        rows, parts = math.ceil(rows / 2), parts * 2
        found.append(
            (
                f"train.per_device_train_batch_size: {rows} and train.gradient_accumulation_steps: {parts}",
                run.changed({"per_device_train_batch_size": rows}),
            )
        )
    return found


def can_quantize(run: Run) -> bool:
    return not run.settings.get("quantization") and not run.train.get("shard")


def quantized(run: Run) -> Run:
    return run.changed(quantization="nf4")


def can_shard(run: Run, gpus: int) -> bool:
    parts = run.train["gpu"] if run.train.get("shard") else 1
    return not run.settings.get("quantization") and gpus > parts


def sharded(run: Run, gpus: int) -> Run:
    return run.changed({"gpu": gpus, "shard": True})
