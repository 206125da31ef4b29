"""How the memory of the stages that read tokens grows with their number: plan, finetune and evaluate.

    python tests/benchmark_tokens.py /tmp/tokens --rows 10000 100000 1000000

The rows have 200 tokens on average. finetune trains two steps on some of them, and evaluate measures 20: enough to see what
they hold in memory. What a process holds by itself (RssAnon) counts. What it has mapped is shown apart: the system takes that
back where it is short.
`--checkout` measures the scripts of another checkout.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from moult.data.token_file import TokenFile, token_schema  # noqa: E402
from moult.workflow.config import load_schema, resolve  # noqa: E402
from moult.workflow.stages import stage_settings  # noqa: E402

BASE = ROOT / "config/demo/base"
BATCH = 1000


def write_tokens(path: Path, count: int) -> None:
    """Rows of 50 to 350 random tokens, the last fifth of each trained."""
    import numpy as np
    import pyarrow as pa

    draw = np.random.default_rng(0)
    with TokenFile(path) as file:
        for begin in range(0, count, BATCH):
            lengths = draw.integers(50, 350, min(BATCH, count - begin)).astype(np.int32)
            offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
            ids = draw.integers(10, 500, offsets[-1]).astype(np.int32)
            labels = ids.copy()
            for start, length in zip(offsets, lengths, strict=False):
                labels[start : start + length * 4 // 5] = -100
            names = [f"row {begin + place}" for place in range(len(lengths))]
            zeros = pa.array(np.zeros(len(lengths), np.int32))
            lists = [pa.ListArray.from_arrays(offsets, pa.array(values)) for values in (ids, labels)]
            starts = pa.array(lengths * 4 // 5)
            columns = [pa.array(names), pa.array(names), zeros, pa.array(lengths), *lists, starts, starts]
            file.add(pa.record_batch(columns, schema=token_schema()))


def peak(command: list, log: Path) -> tuple[float, float, float]:
    """The largest (own memory, mapped files) of a stage, in MB, and its seconds of the processor."""
    process = psutil.Popen([str(part) for part in command], stderr=subprocess.DEVNULL)
    most, spent = [0.0, 0.0], 0.0
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            now = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
            most = [
                max(before, int(now[name]) * 1024 / 1e6)
                for before, name in zip(most, ("RssAnon", "RssFile"), strict=True)
            ]
            spent = sum(process.cpu_times()[:2])
        except (OSError, KeyError, psutil.Error):
            continue
        time.sleep(0.05)
    assert process.returncode == 0, log.read_text()[-2000:]
    return most[0], most[1], spent


def stages(folder: Path, checkout: Path, config: dict) -> dict[str, list]:
    """{name: command} of the stages that read tokens, on the tokens in `folder`."""

    def command(script: str, stage: str, tokens: str, packing: bool, *options) -> list:
        settings = stage_settings(config, stage, "demo")
        if packing:
            settings["train"]["packing"] = True
        out = [sys.executable, checkout / f"scripts/{script}.py", "--settings", json.dumps(settings), "--model", BASE]
        return [*out, "--tokens", folder / tokens, *options, "--log-file", folder / "log"]

    plan = ["--eval", "{}", "--out", folder / "plan.json"]
    outputs = {"--adapter": "adapter", "--summary": "adapter.json", "--training-log": "training_log.jsonl"}
    finetune = ["--plan", folder / "plan.json", "--state", folder / "state"]
    finetune += [part for option, name in outputs.items() for part in (option, folder / name)]
    answers = ["--likelihood", folder / "likelihood.jsonl", "--answers", folder / "answers.jsonl"]
    answers += ["--general", folder / "general.jsonl", "--kept", folder / "kept"]
    return {
        "plan": command("plan", "plan", "few", False, *plan),
        "finetune": command("finetune", "finetune", "few", False, *finetune),
        "plan, packing": command("plan", "plan", "few", True, *plan),
        "finetune, packing": command("finetune", "finetune", "few", True, *finetune),
        "evaluate": command("evaluate_model", "evaluate_base", "many", False, *answers),
    }


def prepare(folder: Path, checkout: Path, count: int) -> None:
    """Below `folder`: `few` with so many rows in train and 50 in val, and `many` with so many in test."""
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    row = json.dumps({"id": "r", "group": "g", "source": 0, "messages": said})
    settings = {
        "chat_template": "chatml",
        "chat_template_kwargs": {},
        "trust_remote_code": False,
        "unrenderable": "error",
    }
    settings |= {"max_length": 512, "overlength": "drop", "max_token_loss": 0}
    (folder / "rows.jsonl").write_text(f"{row}\n")
    command = [sys.executable, checkout / "scripts/encode.py", "--settings", json.dumps(settings), "--model", BASE]
    command += ["--templates", ROOT / "config/chat_templates", "--out", folder / "few", "--log-file", folder / "log"]
    command += [*(part for name in ("--train", "--val", "--test") for part in (name, folder / "rows.jsonl"))]
    peak(command, folder / "log")
    write_tokens(folder / "few/train.parquet", count)
    write_tokens(folder / "few/val.parquet", 50)
    report = json.loads((folder / "few/report.json").read_text())
    for part, rows in (("train", count), ("val", 50)):
        report[part] |= {"rows": rows, "sequences": rows, "tokens": 200 * rows}
        report[part]["length"]["longest_kept"] = 349
    (folder / "few/report.json").write_text(json.dumps(report))
    shutil.copytree(folder / "few", folder / "many")
    shutil.copy(folder / "few/train.parquet", folder / "many/test.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--checkout", type=Path, default=ROOT)
    args = parser.parse_args()
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    config["runs"]["demo"]["train"] |= {"max_steps": 2}
    config["runs"]["demo"]["eval"] |= {"max_rows": 20, "answer_rows": 4}
    config = resolve(config, load_schema(str(ROOT / "config")))
    found: dict[str, dict[int, float]] = {}
    for count in args.rows:
        folder = args.folder / str(count)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        prepare(folder, args.checkout, count)
        for name, command in stages(folder, args.checkout, config).items():
            own, mapped, spent = peak(command, folder / "log")
            found.setdefault(name, {})[count] = own
            print(f"{count:9,} rows: {name:18} {own:7,.0f} MB, mapped {mapped:7,.0f} MB, {spent:5.1f} s", flush=True)
        shutil.rmtree(folder)
    few, many = min(args.rows), max(args.rows)
    for name, peaks in found.items():
        if few < many:
            print(f"{name:18} {1e6 * (peaks[many] - peaks[few]) / (many - few):,.0f} bytes a row")


if __name__ == "__main__":
    main()
