"""Tokens per second of LoRA training on a CPU: Moult's defaults, TRL's defaults, and a bare loop, in turn on the same rows.

    make bench                                         # writes the table into BENCHMARKS.md
    python tests/benchmark_training.py --rounds 5      # prints it

A Llama of 15.7 million random weights, rows of 50 to 540 tokens of which the last half or so is trained, LoRA of rank 16 on all
linear layers, batches of 4 rows, one thread. The bare loop is what one writes by hand: padded batches, AdamW, the model's own
loss, float32. Only the steps are timed, in seconds of this process (so a busy machine disturbs little), not the loading and
not the trial step. All three see the same rows in each round, so their tokens are the same.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from moult.model.device import limit_threads
from moult.workflow.config import load_schema, resolve
from moult.workflow.stages import stage_settings

ROOT = Path(__file__).resolve().parents[1]

SHAPE = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VOCABULARY, BATCH, PAD = 4096, 4, 0
MARKS = "<!-- make bench -->", "<!-- end of make bench -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured")
    parser.add_argument("--rows", type=int, default=24, help="rows in a round")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script itself")
    parser.add_argument("--write", type=Path, help="file between whose marks the table goes")
    args = parser.parse_args()
    limit_threads(1)
    print(f"{args.rounds} rounds of {args.rows} rows", file=sys.stderr)
    found = measure(args.rounds, args.rows, TINY if args.tiny else SHAPE)
    text = table(found)
    print(text)
    if args.write:
        before, rest = args.write.read_text(encoding="utf-8").split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        args.write.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")


def measure(rounds: int, count: int, shape: dict) -> dict[str, list[float]]:
    """{what: tokens per second in each round}. The first round is for warming up, and not counted."""
    ways = {"Moult's defaults": moult, "TRL's defaults": trl, "bare loop": bare}
    found: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds + 1):
            # Fewer rows to warm up.
            rows = make_rows(count if turn else 2 * BATCH, seed=turn)
            tokens = sum(len(row["input_ids"]) for row in rows)
            for name, way in ways.items():
                seconds = way(make_model(shape), rows, Path(folder) / str(turn) / way.__name__)
                if turn:
                    found[name].append(tokens / seconds)
                    print(f"round {turn}: {name}: {tokens / seconds:,.0f} tokens/s", file=sys.stderr)
    return found


def make_rows(count: int, seed: int) -> list[dict]:
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        length = min(540, max(50, int(draw.lognormvariate(5.3, 0.5))))
        ids = [draw.randrange(5, VOCABULARY) for _ in range(length)]
        prompt = int(length * draw.uniform(0.2, 0.7))
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def make_model(shape: dict):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("llama", vocab_size=VOCABULARY, tie_word_embeddings=True, pad_token_id=PAD, **shape)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def lora():
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")


def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<end>": 1} | {f"w{index}": index for index in range(2, VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w2")), pad_token="<pad>", eos_token="<end>"
    )


def steps_only(trainer) -> float:
    """Train, and return the seconds from the begin of the first step to the end of the last."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        begun = ended = 0.0

        def on_step_begin(self, *_, **__):
            self.begun = self.begun or time.process_time()

        def on_step_end(self, *_, **__):
            self.ended = time.process_time()

    clock = Clock()
    trainer.callback_handler.callbacks.insert(0, clock)  # before those that save and measure
    trainer.train()
    return clock.ended - clock.begun


# --- the three --------------------------------------------------------------------------------------------------------


def moult(model, rows: list[dict], folder: Path) -> float:
    return steps_only(moult_trainer(model, rows, folder))


def moult_trainer(model, rows: list[dict], folder: Path, **changes):
    """finetune's trainer with the defaults of the config, but for the size of a step and `changes` of the train section."""
    from datasets import Dataset

    from moult.model.shrunken import shrink
    from moult.training.arguments import trainer_config
    from moult.training.batches import choose_batches
    from moult.training.early_stopping import EarlyStopping
    from moult.training.packing import try_batches
    from moult.training.trainer import Finetuner

    train = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        **changes,
    }
    config = {"model": {"name": str(ROOT)}, "datasets": {"rows": {"source": "rows.jsonl"}}, "train": train}
    settings = stage_settings(resolve(config, load_schema(str(ROOT / "config"))), "finetune", "rows")
    batches = choose_batches(settings, try_batches(shrink(model)), "cpu", model.config)
    if batches.attention:
        model.set_attn_implementation(batches.attention)
    folder.mkdir(parents=True)
    (folder / "training_log.jsonl").touch()
    return Finetuner(
        model=model,
        args=trainer_config(settings, folder, "cpu", 1024, batches),
        processing_class=tokenizer(),
        train_dataset=Dataset.from_list([{**row, "length": len(row["input_ids"])} for row in rows]),
        peft_config=lora(),
        state=folder,
        fingerprint={},
        val_rows=[],
        pad_id=PAD,
        keep_best=False,
        keep=1,
        stop=SimpleNamespace(received=None),
        resume=None,
        checkpointing="auto",
        sizes=[BATCH],
        unmasked=batches.unmasked,
        early_stopping=EarlyStopping.of(settings["train"]),
        stop_after=None,
    )


def trl(model, rows: list[dict], folder: Path) -> float:
    """trl.SFTTrainer as it is: gradient checkpointing and bfloat16 are on by default."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        output_dir=str(folder),
        use_cpu=True,
        num_train_epochs=1,
        per_device_train_batch_size=BATCH,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=model,
        args=config,
        processing_class=tokenizer(),
        train_dataset=Dataset.from_list(rows),
        peft_config=lora(),
    )
    return steps_only(trainer)


def bare(model, rows: list[dict], folder: Path) -> float:
    """Padded batches in random order, float32, the loss of the model itself."""
    import torch
    from peft import get_peft_model
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    tuned = get_peft_model(model, lora()).train()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=2e-4)
    collate = DataCollatorForLanguageModeling(pad_token_id=PAD)
    rows = random.Random(0).sample(rows, len(rows))
    begun = time.process_time()
    for start in range(0, len(rows), BATCH):
        loss = tuned(**collate(rows[start : start + BATCH]), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.process_time() - begun


# --- the table --------------------------------------------------------------------------------------------------------


def table(found: dict[str, list[float]]) -> str:
    medians = {name: statistics.median(values) for name, values in found.items()}
    loop, theirs = medians["bare loop"], medians["TRL's defaults"]
    lines = [
        "| | tokens per second (median) | lowest to highest | to the bare loop | to TRL's defaults |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, values in found.items():
        own, span = medians[name], f"{min(values):,.0f} to {max(values):,.0f}"
        lines.append(f"| {name} | {own:,.0f} | {span} | {own / loop:.2f} | {own / theirs:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
