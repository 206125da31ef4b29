"""The config: checked as a whole, and cut into what each stage reads."""

import re

from snakemake.exceptions import WorkflowError

from moult.errors import MoultError
from moult.files import canonical
from moult.workflow.config import ConfigError, duplicate_keys, load_schema, misplaced, resolve
from moult.workflow.container import identity
from moult.workflow.stages import encoded_as, measured_as, model_slug, places_below, stage_settings

for name in ("schema.yaml", "lora.schema.json", "train.schema.json"):
    schema_folder = Path(own_file(f"config/{name}")).parent


def checked(config):
    """The whole config, or one error with all that is wrong with it. Jobs need not look at the files again."""
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


# Where a module's user has put them instead, the scripts must know it too.
config["paths"]["results"] = workflow.pathvars.apply("<results>")
refuse(misplaced(config))

# Every path below results/, the wildcards still in it. What runs share has an owner: {run: the run that makes it}.
at = places_below("<results>")
encoders, base_measurers = encoded_as(config), measured_as(config)


def settings(stage):
    """Param: what the stage reads of the config, in one spelling."""
    return lambda wildcards: canonical(stage_settings(config, stage, wildcards.get("run") or wildcards.ds))


def of_run(value):
    """Param or resource: `value` of the run's config."""
    return lambda wildcards: value(config["runs"][wildcards.run])


def image_identity():
    """What tells the image of the training stages from another."""
    return identity(config["container"])
