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
import re
import shlex
import shutil
import subprocess
import sys

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

    from moult.errors import MoultError
    from moult.runtime import paths, read_config, shared_by_runs, the_run

    try:
        config = read_config(args.configfile)
        shared = shared_by_runs(config)
        names = list(config["runs"]) if args.run is None else [the_run(config, args.run)]
        runs = {name: paths(config, name, *shared) for name in names}
        print(FORMATS[args.format](runs, args))
    except MoultError as error:
        sys.exit(f"print_runtime: {error}")


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
    from moult.errors import MoultError, some
    from moult.serving import check_exposed

    if len(runs) != 1:
        raise MoultError(f"--format env is of one run, and there are {len(runs)}", f"give --run: {some(runs)}")
    (values,) = runs.values()
    check_exposed(values["SERVE_HOST"], os.environ.get("MOULT_API_KEY"), "MOULT_API_KEY")
    return "\n".join(f"{name}={quoted(str(value))}" for name, value in values.items())


def quoted(value: str) -> str:
    """As both a shell and Compose read it: Compose does not know the shell's way to put a single quote into single quotes."""
    return shlex.quote(value) if "'" not in value else '"' + re.sub(r'([\\"$`])', r"\\\1", value) + '"'


FORMATS = {"text": as_text, "json": as_json, "env": as_env}


if __name__ == "__main__":
    main()
