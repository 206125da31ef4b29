"""The config: one check of the whole, then the part of it that each stage reads."""

import re

from snakemake.exceptions import WorkflowError

from moult.errors import MoultError
from moult.files import canonical
from moult.workflow.config import ConfigError, duplicate_keys, load_schema, misplaced, resolve
from moult.workflow.container import identity
from moult.workflow.functions import known
from moult.workflow.rungs import rung_name
from moult.workflow.seeds import seed_runs
from moult.workflow.stages import (
    benchmarked_as,
    encoded_as,
    evaluation_gpus,
    measured_as,
    model_slug,
    places_below,
    stage_settings,
)
from moult.workflow.sweeps import asked_for, sweep_settings

for name in ("schema.yaml", "lora.schema.json", "train.schema.json"):
    schema_folder = Path(own_file(f"config/{name}")).parent


def checked(config):
    """The complete config. Raises one error that lists every problem. Jobs do not check the files again."""
    problems = []
    if workflow.is_main_process:
        files = [Path(os.path.relpath(path)) for path in workflow.configfiles if Path(path).is_file()]
        problems += [problem for path in files for problem in duplicate_keys(path)]
    try:
        config = resolve(config, load_schema(str(schema_folder)))
    except ConfigError as error:
        problems += error.problems
    refuse(problems)
    return config


def refuse(problems):
    if problems:
        raise WorkflowError(str(ConfigError(problems)))


config = checked(config)


pathvars:
    results=config["paths"]["results"],


# A workflow that imports Moult as a module can move the results; the scripts need the new path.
config["paths"]["results"] = workflow.pathvars.apply("<results>")
refuse(misplaced(config))

# Every path below results/, with wildcards. Several runs can share a file; `encoders` and `base_measurers` are
# {run: the run that makes the shared file}, `benchmarkers` is that for each benchmark.
at = places_below("<results>")
encoders, base_measurers, benchmarkers = encoded_as(config), measured_as(config), benchmarked_as(config)


def settings(stage):
    """Param: the settings that the stage reads, as canonical JSON."""
    return known(lambda wildcards: canonical(stage_settings(config, stage, wildcards.get("run") or wildcards.ds)))


def of_run(value):
    """Param or resource: `value`, called with the config of the run."""
    return known(lambda wildcards: value(config["runs"][wildcards.run]))


def image_identity():
    """The identity of the image of the training stages."""
    return identity(config["container"])
