"""Parts of tests/gpu/benchmark.py that need a process of their own: a random model, and the memory of a validation.

python tests/gpu/probe.py model --shape '{"model_type": "qwen3", ...}' --out base
python tests/gpu/probe.py validation --model base --length 8192 --rows 2
python tests/gpu/probe.py attention
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
    parts.add_parser("attention", help="compare the kernel for rows without padding with plain torch")
    parts.add_parser("machine", help="card, driver and versions")
    args = parser.parse_args()
    do = {"model": make_model, "validation": measure_validation, "attention": compare_attention, "machine": machine}[
        args.part
    ]
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


# Heads of queries, of keys, size of a head, window.
HEADS = [(16, 8, 128, None), (32, 8, 128, 100), (8, 8, 64, None), (12, 2, 80, 7), (4, 1, 256, None), (6, 3, 100, 33)]
LENGTHS = [37, 1024, 1, 300, 64]
ROUNDING = 2e-2  # of bfloat16, relative; a wrong window or order gives 0.1 and more


def compare_attention(args) -> dict:
    """The largest relative errors of outputs and gradients of moult.model.varlen's kernel, and of torch's own attention of each
    row alone in the same dtype, both against float64."""
    import torch

    from moult.model.varlen import flash, row_by_row

    torch.manual_seed(0)
    bounds = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32).cuda()
    errors: dict[str, float] = {}

    def pass_of(kernel, parts, dtype, upstream, window):
        parts = [part.detach().to(dtype).requires_grad_() for part in parts]
        more = {
            "scale": parts[0].shape[-1] ** -0.5,
            "window_size": (window - 1 if window else -1, 0),
            "enable_gqa": True,
        }
        out = kernel(*parts, bounds, bounds, max(LENGTHS), max(LENGTHS), **more)
        return [out.detach(), *torch.autograd.grad(out, parts, upstream.to(dtype))]

    for heads, shared, size, window in HEADS:
        shapes = [(sum(LENGTHS), count, size) for count in (heads, shared, shared, heads)]
        *parts, upstream = (torch.randn(shape, device="cuda").bfloat16() for shape in shapes)
        exact = pass_of(row_by_row, parts, torch.float64, upstream, window)
        for name, kernel in (("kernel", flash), ("plain", row_by_row)):
            found = pass_of(kernel, parts, torch.bfloat16, upstream, window)
            for what, mine, right in zip(("outputs", "queries", "keys", "values"), found, exact, strict=True):
                error = ((mine.double() - right).norm() / right.norm()).item()
                key = f"{name}, {'outputs' if what == 'outputs' else 'gradients'}"
                errors[key] = max(errors.get(key, 0.0), error)
                if name == "kernel" and not error < ROUNDING:
                    raise SystemExit(f"{what}, {(heads, shared, size, window)}: relative error {error:.2g}")
    return errors


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
