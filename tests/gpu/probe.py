"""Parts of tests/gpu/benchmark.py that need a process of their own: a random model, and the memory of a validation.

python tests/gpu/probe.py model --shape '{"model_type": "qwen3", ...}' --out base
python tests/gpu/probe.py validation --model base --length 8192 --rows 2
python tests/gpu/probe.py machine

Each prints one line of JSON.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from moult.model.device import load_model, pick, versions

TOKENIZER = Path(__file__).resolve().parents[2] / "config" / "demo" / "base"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    model = parts.add_parser("model", help="write a model of random weights")
    model.add_argument("--shape", type=json.loads, required=True, help="fields of config.json")
    model.add_argument("--out", type=Path, required=True, help="folder")
    validation = parts.add_parser("validation", help="measure the likelihood of long rows")
    validation.add_argument("--model", type=Path, required=True, help="folder of a model")
    validation.add_argument("--length", type=int, required=True, help="tokens of a row")
    validation.add_argument("--rows", type=int, default=2, help="number of rows")
    parts.add_parser("machine", help="card, driver and versions")
    args = parser.parse_args()
    do = {"model": make_model, "validation": measure_validation, "machine": machine}[args.part]
    print(json.dumps(do(args)))


def make_model(args) -> dict:
    """The demo's tokenizer fits: it knows fewer tokens than the model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    started, shape = time.monotonic(), dict(args.shape)
    ids = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 3}
    config = AutoConfig.for_model(shape.pop("model_type"), **ids, **shape)
    torch.manual_seed(0)
    with torch.device(pick()):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(args.out)
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(TOKENIZER / name, args.out)
    settings = json.loads((TOKENIZER / "tokenizer_config.json").read_text())
    settings["model_max_length"] = config.max_position_embeddings
    (args.out / "tokenizer_config.json").write_text(json.dumps(settings))
    return {"parameters": model.num_parameters(), "seconds": time.monotonic() - started}


def measure_validation(args) -> dict:
    """Seconds, and bytes at the peak besides the weights, of moult.measuring.likelihood on rows of this length."""
    import torch

    from moult.measuring.likelihood import likelihood

    device = pick()
    settings = {"dtype": "bfloat16", "trust_remote_code": False, "attn_implementation": None}
    model = load_model(str(args.model), device, settings).eval()
    rows = torch.randint(4, model.config.vocab_size, (args.rows, args.length)).tolist()
    weights = torch.cuda.memory_allocated() if device == "cuda" else 0
    started = time.monotonic()
    results = likelihood(model, [{"input_ids": row, "labels": row} for row in rows], 3)
    seconds = time.monotonic() - started
    if not all(result.tokens == args.length - 1 for result in results):
        raise SystemExit("not all tokens were measured")
    peak = torch.cuda.max_memory_allocated() - weights if device == "cuda" else None
    return {"seconds": seconds, "tokens_per_second": args.rows * args.length / seconds, "peak_besides_weights": peak}


def machine(args) -> dict:
    import torch

    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version,power.limit", "--format=csv,noheader"]
    try:
        cards = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()
    except (OSError, subprocess.CalledProcessError):
        cards = []
    found = {"cards": cards, "device": pick(), "cuda": torch.version.cuda, "platform": platform.platform()}
    if found["device"] == "cuda":
        card = torch.cuda.get_device_properties(0)
        found |= {"memory": card.total_memory, "capability": f"{card.major}.{card.minor}"}
    return {**found, "versions": versions()}


if __name__ == "__main__":
    main()
