"""The config as the workflow reads it, for commands that are run by hand."""

from pathlib import Path

import yaml

from moult.errors import MoultError, some
from moult.workflow.config import load_schema, merged, resolve

SCHEMA = Path(__file__).resolve().parents[3] / "config"


def read_config(files: list[str]) -> dict:
    """The checked config that the workflow would have with these files."""
    config: dict = {}
    for file in ["config/config.yaml", *files]:
        try:
            config = merged(config, yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {})
        except OSError as error:
            raise MoultError(
                f"{file}: {error.strerror}", "start it in the folder that contains config/config.yaml"
            ) from None
        except UnicodeDecodeError as error:  # Snakemake reads no other encoding either
            raise MoultError(
                f"{file}: not UTF-8 (byte 0x{error.object[error.start]:02x})",
                f"save it as UTF-8; if it is UTF-16, as PowerShell writes it: iconv -f utf-16 -t utf-8 {file} > fixed.yaml",
            ) from None
        except yaml.YAMLError as error:
            raise MoultError(f"{file}: not YAML: {str(error).splitlines()[0]}", "fix the file") from None
    return resolve(config, load_schema(str(SCHEMA)))


def the_run(config: dict, name: str) -> str:
    """`name`, if a run has it. Raises MoultError."""
    if name not in config["runs"]:
        raise MoultError(f"there is no run {name}", f"the runs are: {some(config['runs'])}")
    return name
