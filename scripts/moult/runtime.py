"""The config as the workflow reads it, and where a run's things are: for scripts that are run by hand."""

import shlex
from pathlib import Path

import yaml

from moult.config import load_schema, local_model, merged, resolve, slug
from moult.errors import MoultError, some
from moult.serving import Served, vllm_arguments
from moult.settings import encoded_as, measured_as, stage_settings

SCHEMA = Path(__file__).resolve().parent.parent.parent / "config"


def read_config(files: list[str]) -> dict:
    """The checked config that the workflow would have with these files."""
    config: dict = {}
    for file in ["config/config.yaml", *files]:
        try:
            config = merged(config, yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {})
        except OSError as error:
            raise MoultError(f"{file}: {error.strerror}", "run it where config/config.yaml is") from None
        except yaml.YAMLError as error:
            raise MoultError(f"{file}: not YAML: {str(error).splitlines()[0]}", "mend the file") from None
    return resolve(config, load_schema(str(SCHEMA)))


def the_run(config: dict, name: str) -> str:
    """`name`, if a run has it. Raises MoultError."""
    if name not in config["runs"]:
        raise MoultError(f"no run is named {name}", f"there are: {some(config['runs'])}")
    return name


def shared_by_runs(config: dict) -> tuple[dict, dict]:
    """The runs whose tokens, and whose measurement of the base, each run uses."""
    return encoded_as(config), measured_as(config)


def paths(config: dict, name: str, encoders: dict, base_measurers: dict) -> dict[str, str | int]:
    """Where a run's things are, and what it is made of. The keys are the variables of --format env."""
    run = config["runs"][name]
    results = config["paths"]["results"]
    folder = f"{results}/{name}"
    model = local_model(run["model"], config["paths"])
    settings = stage_settings(config, "serve", name)
    served_name = run["serve"]["served_model_name"] or name
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
        # The compose file serves the merged model, mounted at /model, with the same flags as `make serve`.
        "SERVED_MODEL_PATH": str(Path(folder, "merged").resolve()),
        "SERVED_MODEL_NAME": served_name,
        "MAX_MODEL_LEN": run["serve"]["max_model_len"] or "auto",
        "VLLM_ARGS": shlex.join(vllm_arguments(settings, Served(served_name, "/model"), "0.0.0.0", 8080)),
        "SERVE_HOST": run["serve"]["host"],
        "SERVE_PORT": run["serve"]["port"],
        "WEBUI_PORT": 3000,
        "DOZZLE_PORT": 9999,
        "PLAN": f"{folder}/plan.json",
        "METRICS": f"{folder}/metrics.json",
        "LOG_DIR": f"logs/{name}",
        "GPUS": run["train"]["gpu"],
        "DTYPE": run["model"]["dtype"],
        "ATTENTION": run["model"]["attn_implementation"] or "chosen by transformers",
    }
