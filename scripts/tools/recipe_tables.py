"""Write the tables of memory in config/recipes/README.md: what models need on which cards, and what each recipe needs.

    python scripts/tools/recipe_tables.py    # a minute

No rule calls it; a test compares the page with what this makes. Everything is simulated from the shapes of the models
(moult/training/memory.py); no GPU, no weights.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import _library  # noqa: F401
import yaml

from moult.run.cli import tool_parser

CONFIG = Path(__file__).resolve().parents[2] / "config"
README = CONFIG / "recipes" / "README.md"
BEGIN, END = "<!-- {}: made by scripts/tools/recipe_tables.py -->", "<!-- end of {} -->"

# What the config.json of each model says of its size.
QWEN = {"model_type": "qwen3", "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128}
LLAMA = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8}
SHAPES = {
    "Qwen/Qwen3-0.6B": QWEN
    | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
    | {"tie_word_embeddings": True, "max_position_embeddings": 40960},
    "Qwen/Qwen3-8B": QWEN
    | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}
    | {"tie_word_embeddings": False, "max_position_embeddings": 40960},
    "Qwen/Qwen3-32B": QWEN
    | {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64}
    | {"tie_word_embeddings": False, "max_position_embeddings": 40960},
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"tie_word_embeddings": False, "max_position_embeddings": 131072},
    "meta-llama/Llama-3.3-70B-Instruct": LLAMA
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    | {"tie_word_embeddings": False, "max_position_embeddings": 131072},
}
MODELS = [name for name in SHAPES if "0.6B" not in name]

# {column: (GPUs, GB of each)}
CARDS = {"24 GB": (1, 24), "48 GB": (1, 48), "80 GB": (1, 80), "8 × 80 GB": (8, 80)}
BASES = {
    "16 bits": {"quantization": None, "gpu": 1, "shard": False},
    "nf4": {"quantization": "nf4", "gpu": 1, "shard": False},
    "16 bits, sharded over 8": {"quantization": None, "gpu": 8, "shard": True},
}
LENGTH = 4096

# Both families keep rows apart with varlen attention, and need no mask for rows padded on the right (config/MODELS.md).
EXACT: dict[str, str | None] = {"varlen": None, "unmasked": None}

# Speed is estimated: the share of a card's peak that LoRA of 8 B reached on an H100 (BENCHMARKS.md: 297 to 326 of 989 TFLOP/s; in
# NVIDIA's own table, NeMo Automodel, docs/performance-summary.mdx, 402), for all cards. A GeForce is named for 24 GB.
SHARE = 0.3
CARD = {24: "RTX 4090", 48: "L40S", 80: "H100"}  # as moult.training.throughput names them
CPU = 0.1e12  # float32 on four cores of a laptop


def empty_model(name: str):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = dict(SHAPES[name])
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.pop("model_type"), **shape))


def run_of(model, settings: dict, length: int):
    """A run of `model` whose longest rows have `length` tokens."""
    from moult.training.memory import Run
    from moult.training.targets import inject

    rows = {"length": {"longest_kept": length}, "sequences": 1000}
    report = {"max_length": length, "train": rows, "val": rows}
    return Run(model, inject(model, settings["lora"], []), settings, report, EXACT)


def defaults() -> dict:
    """The settings of plan for a run that sets nothing."""
    return plan_settings({"model": {"name": "any/model"}, "datasets": {"any": {"source": "any.jsonl"}}})[1]


def plan_settings(config: dict) -> tuple[dict, dict, int]:
    """The model section, what plan reads, and the longest row, of the run of a config's one dataset."""
    from moult.workflow.config import load_schema, resolve
    from moult.workflow.stages import stage_settings

    resolved = resolve(config, load_schema(str(CONFIG)))
    (name,) = resolved["datasets"]
    run = resolved["runs"][name]
    return run["model"], stage_settings(resolved, "plan", name), resolved["datasets"][run["dataset"]]["max_length"]


# --- models on cards --------------------------------------------------------------------------------------------------


def model_rows(name: str) -> Iterator[list[str]]:
    from moult.training.memory import memory_of

    model, settings = empty_model(name), defaults()
    for base, changes in BASES.items():
        train = {
            **settings["train"],
            "per_device_train_batch_size": 1,
            "gpu": changes["gpu"],
            "shard": changes["shard"],
        }
        run = run_of(model, {**settings, "train": train, "quantization": changes["quantization"]}, LENGTH)
        memory = memory_of(run)
        cards = [fitting(memory, gigabytes) if gpus >= changes["gpu"] else "–" for gpus, gigabytes in CARDS.values()]
        yield [name.split("/")[1], base, *figures(memory), *cards]


def figures(memory: dict) -> list[str]:
    return [
        f"{memory[key] / 1e9:,.0f}" if memory[key] >= 1e10 else f"{memory[key] / 1e9:.1f}"
        for key in ("weights", "total", "total_with_gradient_checkpointing")
    ]


def fitting(memory: dict, gigabytes: float) -> str:
    if memory["total"] <= gigabytes * 1e9:
        return "yes"
    return "checkpointed" if memory["total_with_gradient_checkpointing"] <= gigabytes * 1e9 else "no"


# --- recipes ----------------------------------------------------------------------------------------------------------


def recipe_row(path: Path) -> list[str]:
    from moult.training.memory import memory_of

    section, settings, length = plan_settings(yaml.safe_load(path.read_text(encoding="utf-8")))
    train = settings["train"]
    gigabytes = train["gpu_memory"]
    model = empty_model(section["name"])
    run = run_of(model, settings if gigabytes else {**settings, "dtype": "float32"}, length)
    memory = memory_of(run)
    # `auto` checkpoints only where it has to.
    key = train["gradient_checkpointing"]
    checkpointed = key is True or (key == "auto" and fitting(memory, gigabytes) == "checkpointed")
    total = memory["total_with_gradient_checkpointing" if checkpointed else "total"] / 1e9
    count = f"{train['gpu']} × " if train["gpu"] > 1 else ""
    hardware = f"{count}{gigabytes:g} GB" if gigabytes else "a CPU"
    bits = f", {section['quantization']}" if section["quantization"] else ""
    first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ").rstrip(".:")
    return [
        f"[{path.name}]({path.name})",
        first.split(":")[0].split(". ")[0],
        section["name"].split("/")[1] + bits,
        hardware,
        f"{run.rows} × {length:,}",
        f"{total:.0f} GB" + (", checkpointed" if checkpointed else ""),
        f"{rounded(speed(model, checkpointed, length, train['gpu'], gigabytes)):,}",
    ]


def speed(model, checkpointed: bool, length: int, gpus: int, gigabytes: float | None) -> float:
    """Tokens per second of all GPUs, on rows of `length` tokens."""
    from moult.training.throughput import PEAKS, cost_of

    operations = cost_of(model.requires_grad_(False)).operations(1, length, checkpointed)  # of one token of such a row
    return gpus * (SHARE * PEAKS[CARD[int(gigabytes)]] * 1e12 if gigabytes else CPU) / operations


def rounded(number: float) -> int:
    """Two figures: it is an estimate."""
    size = 10 ** max(0, len(str(int(number))) - 2)
    return int(round(number / size) * size)


# --- the page ---------------------------------------------------------------------------------------------------------

MODEL_HEAD = ["model", "base", "weights, GB", "all, GB", "checkpointed, GB", *CARDS]
RECIPE_HEAD = ["recipe", "for", "model", "hardware", "rows × tokens", "memory of each GPU", "tokens/s"]


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page() -> str:
    text = README.read_text(encoding="utf-8")
    recipes = sorted(README.parent.glob("*.yaml"))
    for name, made in (
        ("recipes", markdown(RECIPE_HEAD, map(recipe_row, recipes))),
        ("memory", markdown(MODEL_HEAD, (row for model in MODELS for row in model_rows(model)))),
    ):
        begin, end = BEGIN.format(name), END.format(name)
        before, after = text.split(begin)[0], text.split(end)[1]
        text = f"{before}{begin}\n{made}\n{end}{after}"
    return text


def main() -> None:
    tool_parser(__doc__).parse_args()
    README.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
