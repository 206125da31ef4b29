"""Print the paths of each run, the versions of packages, the device, and optional packages.

    python scripts/tools/print_runtime.py                               # for people
    python scripts/tools/print_runtime.py --format json --probe         # for programs; --probe also looks at the GPU with torch
    python scripts/tools/print_runtime.py --format env --run demo       # shell variables of one run
    python scripts/tools/print_runtime.py --configfile mine.yaml        # added to config/config.yaml

It needs no GPU. The images run it as their self-test.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import _library  # noqa: F401

from moult.errors import MoultError, some
from moult.serving.launch import Served, check_exposed, vllm_arguments
from moult.workflow.runtime import read_config, the_run
from moult.workflow.stages import Places, places_of_runs, serve_settings

PACKAGES = (
    *("snakemake", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "safetensors"),
    *("huggingface_hub", "pyarrow", "langdetect", "py3langid"),
)
# Optional packages that change training or loading.
BACKENDS = ("flash_attn", "kernels", "bitsandbytes", "liger_kernel", "deepspeed", "tensorboard", "wandb", "vllm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=("text", "json", "env"), default="text")
    parser.add_argument(
        "--configfile", nargs="+", default=[], help="config files that are added to config/config.yaml, in this order"
    )
    parser.add_argument("--run", help="only this run (needed for --format env if there are several)")
    parser.add_argument("--probe", action="store_true", help="import torch and look at the device")
    args = parser.parse_args()

    try:
        config = read_config(args.configfile)
        names = list(config["runs"]) if args.run is None else [the_run(config, args.run)]
        runs = {name: variables(config, name, places) for name, places in places_of_runs(config, names).items()}
        print(FORMATS[args.format](runs, args))
    except MoultError as error:
        sys.exit(f"print_runtime: {error}")


def variables(config: dict, name: str, places: Places) -> dict[str, str | int]:
    """The paths and the main settings of a run, under the names of --format env."""
    run = config["runs"][name]
    settings = serve_settings(run)
    served_name = run["serve"]["served_model_name"] or name
    return {
        "RUN": name,
        "DATASET": run["dataset"],
        "BASE_MODEL": run["model"]["name"],
        "BASE_MODEL_DIR": places.model,
        "PREPROCESS_DIR": places.prepared,
        "TOKENS_DIR": places.tokens,
        "TRAINER_STATE_DIR": places.trainer_state,
        "ADAPTER_DIR": places.adapter,
        "MERGED_DIR": places.merged,
        "BASE_MEASUREMENT_DIR": places.base,
        # The compose file serves the merged model, mounted at /model, with the same flags as `make serve`.
        "SERVED_MODEL_PATH": str(Path(places.merged).resolve()),
        "SERVED_MODEL_NAME": served_name,
        "MAX_MODEL_LEN": run["serve"]["max_model_len"] or "auto",
        "VLLM_ARGS": shlex.join(vllm_arguments(settings, Served(served_name, "/model"), "0.0.0.0", 8080)),
        "SERVE_HOST": run["serve"]["host"],
        "SERVE_PORT": run["serve"]["port"],
        "WEBUI_PORT": 3000,
        "DOZZLE_PORT": 9999,
        "PLAN": places.plan,
        "METRICS": places.metrics,
        "LOG_DIR": f"logs/{name}",
        "GPUS": run["train"]["gpu"],
        "DTYPE": run["model"]["dtype"],
        "ATTENTION": run["model"]["attn_implementation"] or "chosen by transformers",
    }


def versions() -> dict[str, str]:
    found = {"moult": importlib.import_module("moult").__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def device(probe: bool) -> dict:
    """The GPUs as the driver names them; with `probe` also as torch sees them."""
    found: dict = {"machine": platform.machine(), "cpus": os.cpu_count(), "driver": "no nvidia-smi"}
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        found["driver"] = answer.stdout.strip().splitlines() or answer.stderr.strip()
    if probe:
        import torch

        found["torch_device"] = "cuda" if torch.cuda.is_available() else "cpu"
        found["torch_cuda"] = torch.version.cuda
        found["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        found["bfloat16"] = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        found["threads"] = torch.get_num_threads()
    return found


def everything(runs: dict, args) -> dict:
    return {
        "runs": runs,
        "versions": versions(),
        "device": device(args.probe),
        "backends": {name: importlib.util.find_spec(name) is not None for name in BACKENDS},
    }


def as_text(runs: dict, args) -> str:
    lines = []
    for section, content in everything(runs, args).items():
        for title, values in content.items() if section == "runs" else [("", content)]:
            lines += ["", f"{section} {title}".strip()]
            width = max(map(len, values))
            lines += [f"  {name.ljust(width)}  {value}" for name, value in values.items()]
    return "\n".join(lines[1:])


def as_json(runs: dict, args) -> str:
    return json.dumps(everything(runs, args), indent=2, sort_keys=True)


def as_env(runs: dict, args) -> str:
    """For a shell, and for containers/.env, which Docker Compose reads."""
    if len(runs) != 1:
        raise MoultError(
            f"--format env shows one run, but there are {len(runs)}", f"choose one with --run: {some(runs)}"
        )
    (values,) = runs.values()
    check_exposed(values["SERVE_HOST"], os.environ.get("MOULT_API_KEY"), "MOULT_API_KEY")
    return "\n".join(f"{name}={quoted(str(value))}" for name, value in values.items())


def quoted(value: str) -> str:
    """Quoted for both a shell and Compose, which does not know how a shell puts a single quote into single quotes."""
    return shlex.quote(value) if "'" not in value else '"' + re.sub(r'([\\"$`])', r"\\\1", value) + '"'


FORMATS = {"text": as_text, "json": as_json, "env": as_env}


if __name__ == "__main__":
    main()
