"""Say what would run where: resolved paths of each run, versions, device, backends.

    python scripts/print_runtime.py                               # for people
    python scripts/print_runtime.py --format json --probe         # for programs; --probe imports torch and looks at the GPU
    python scripts/print_runtime.py --format env --run demo       # shell variables of one run
    python scripts/print_runtime.py --configfile mine.yaml        # laid over config/config.yaml, as snakemake does it

Needs no GPU, and without --probe imports nothing heavy. It is also the self-test of an image.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

WORKFLOW = Path(__file__).resolve().parent.parent
PACKAGES = (
    *("snakemake", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "safetensors"),
    *("huggingface_hub", "pyarrow", "langdetect", "py3langid"),
)
# What makes training or loading faster, or changes it, if it is there.
BACKENDS = ("flash_attn", "kernels", "bitsandbytes", "liger_kernel", "deepspeed", "tensorboard", "wandb", "vllm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=("text", "json", "env"), default="text")
    parser.add_argument(
        "--configfile", nargs="+", default=[], help="config files laid over config/config.yaml, in this order"
    )
    parser.add_argument("--run", help="only this run (needed for --format env if there are several)")
    parser.add_argument("--probe", action="store_true", help="import torch and look at the device")
    args = parser.parse_args()

    from moult.config import encoded_as, measured_as
    from moult.errors import MoultError

    try:
        config = read_config(args.configfile)
        shared = encoded_as(config), measured_as(config)
        runs = {name: paths(config, name, *shared) for name in chosen_runs(config, args.run)}
        print(FORMATS[args.format](runs, args))
    except MoultError as error:
        sys.exit(f"print_runtime: {error}")


def read_config(files: list[str]) -> dict:
    """The checked config that the workflow would have with these files."""
    import yaml

    from moult.config import load_schema, merged, resolve
    from moult.errors import MoultError

    config: dict = {}
    for file in ["config/config.yaml", *files]:
        try:
            config = merged(config, yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {})
        except OSError as error:
            raise MoultError(f"{file}: {error.strerror}", "run it where config/config.yaml is") from None
        except yaml.YAMLError as error:
            raise MoultError(f"{file}: not YAML: {str(error).splitlines()[0]}", "mend the file") from None
    return resolve(config, load_schema(str(WORKFLOW / "config")))


def chosen_runs(config: dict, run: str | None) -> list[str]:
    from moult.errors import MoultError, some

    if run is None:
        return list(config["runs"])
    if run not in config["runs"]:
        raise MoultError(f"no run is named {run}", f"there are: {some(config['runs'])}")
    return [run]


def paths(config: dict, name: str, encoders: dict, base_measurers: dict) -> dict[str, str | int]:
    """Where a run's things are, and what it is made of. The keys are the variables of --format env."""
    from moult.config import local_model, slug

    run = config["runs"][name]
    results = config["paths"]["results"]
    folder = f"{results}/{name}"
    model = local_model(run["model"], config["paths"])
    return {
        "RUN": name,
        "DATASET": run["dataset"],
        "BASE_MODEL": run["model"]["name"],
        "BASE_MODEL_DIR": model or f"{results}/models/{slug(run['model']['name'], run['model']['revision'])}",
        "PREPROCESS_DIR": f"{results}/prepared/{run['dataset']}",
        "TOKENS_DIR": f"{results}/{encoders[name]}/tokens",
        "TRAINER_STATE_DIR": f"{folder}/trainer_state",
        "ADAPTER_DIR": f"{folder}/adapter",
        "MERGED_DIR": f"{folder}/merged",
        "BASE_MEASUREMENT_DIR": f"{results}/{base_measurers[name]}/base",
        "METRICS": f"{folder}/metrics.json",
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
    from moult.errors import MoultError, some

    if len(runs) != 1:
        raise MoultError(f"--format env is of one run, and there are {len(runs)}", f"give --run: {some(runs)}")
    (values,) = runs.values()
    return "\n".join(f"{name}={shlex.quote(str(value))}" for name, value in values.items())


FORMATS = {"text": as_text, "json": as_json, "env": as_env}


if __name__ == "__main__":
    main()
