"""What the rules share: the checked config, the code that a stage consists of, the files that it depends on.

Nothing heavier than yaml and jsonschema is imported here, because Snakemake reads this again in every job.
"""

import fcntl
import os
import re
import shutil
import sys
import time
from functools import lru_cache
from os import environ
from pathlib import Path

from snakemake.exceptions import WorkflowError

started = time.time()


def hold_folder():
    """Keep the working directory for this Snakemake, and take off a lock that a killed one has left in it.

    Snakemake's own lock does not die with its holder. This one does: each Snakemake holds it shared while it lives, so if
    it can be had alone, nobody is at work here. Some cluster file systems lock for each machine apart: what another
    machine has locked is left to `snakemake --unlock`. Returns the lock, if there is one, and whether nobody else is at work.
    """
    alone = False
    try:
        Path(".snakemake").mkdir(exist_ok=True)
        lock = Path(".snakemake/moult.lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.seek(0)
            machine = os.uname().nodename
            if lock.read() in ("", machine) or not any(Path(".snakemake/locks").glob("*")):
                alone = True
                shutil.rmtree(".snakemake/locks", ignore_errors=True)
                lock.truncate(0)
                lock.write(machine)
                lock.flush()
        except BlockingIOError:
            pass  # Snakemake's lock says whether the two go together
        fcntl.flock(lock, fcntl.LOCK_SH)
        return lock, alone
    except OSError:  # a read-only folder, or a file system without locks
        return None, False


held_folder, alone_here = hold_folder() if workflow.is_main_process else (None, False)

# The stages run with the Python that runs Snakemake; inside a container `python` is the image's.
environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"


@lru_cache
def own_file(path):
    """Where the jobs find a file of this workflow, given relative to the Snakefile.

    In a checkout that is the working directory, its plain path: a command that `snakemake -p` prints can be run by hand.
    Otherwise (a module, from another folder or from GitHub) Snakemake's cached copy, which containers see as well.
    """
    cached = workflow.source_path(f"../{path}")
    original = os.path.relpath(os.path.normpath(str(cached.flags["sourcecache_entry"])))
    return original if not original.startswith("..") and os.path.exists(original) else str(cached)


library_modules = "__init__ errors files config container failures settings slurm sources stage"
for module in library_modules.split():
    library = Path(own_file(f"scripts/moult/{module}.py"))
for name in ("schema.yaml", "lora.schema.json", "train.schema.json"):
    schema_folder = Path(own_file(f"config/{name}")).parent
sys.path.insert(0, str(library.parent.parent.resolve()))

from moult.config import ConfigError, dataset_slug, duplicate_keys, is_local, load_schema
from moult.config import local_model, misplaced, resolve, slug, source_entries
from moult.container import identity
from moult.errors import MoultError
from moult.failures import failures_since, table
from moult.files import canonical, glance, sha256_text
from moult.settings import encoded_as, measured_as, stage_settings
from moult.sources import expand as expand_source
from moult.stage import process_name

# Stages end when the Snakemake that has started them does (moult/stage.py), also when it is killed.
environ["MOULT_STARTED_BY"] = process_name()


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
encoders, base_measurers = encoded_as(config), measured_as(config)


# --- code: tracked by content, not by time ---


def script_of(stage):
    """Param: the script of a stage. The path itself is not tracked (it takes `input`): outside of a checkout it is another
    one at each start. What the script and its library hold is in `code_hash`."""
    code_hash(stage)  # brings the modules that it imports to where the jobs find them
    return lambda wildcards, input: own_file(f"scripts/{stage}.py")


@lru_cache
def code_hash(script, *data):
    """Param: the contents of a stage's script, of the modules that it imports, directly or through others, and of
    `data`, files of the workflow that it reads. An edit reruns the stage, a checkout does not.

    The image that the config names is part of it, with --use-singularity or without, so that runs with it and without it
    agree: a new version or digest reruns the stages, a moved file does not. (Snakemake's own trigger is off: see
    profiles/default. What lies in the file is not looked at: hence the version in its name.)"""
    found = [f"scripts/{script}.py", "scripts/moult/__init__.py", *data]
    texts = []
    for path in found:
        texts.append(Path(own_file(path)).read_text(encoding="utf-8"))
        for module in re.findall(r"^\s*from moult\.(\w+) import", texts[-1], re.MULTILINE):
            if f"scripts/moult/{module}.py" not in found:
                found.append(f"scripts/moult/{module}.py")
    return sha256_text("".join([*texts, identity(config["container"])]))[:16]


shipped_templates = Path(own_file("config/chat_templates/chatml.jinja")).parent


# --- config ---


def settings(stage):
    """Param: what the stage reads of the config, in one spelling."""
    return lambda wildcards: canonical(stage_settings(config, stage, wildcards.get("run") or wildcards.ds))


def model_slug(run):
    return slug(config["runs"][run]["model"]["name"], config["runs"][run]["model"]["revision"])


def base_model(wildcards):
    """Input: the manifest of a run's base model."""
    return f"<results>/models/{model_slug(wildcards.run)}.json"


def tokens(name):
    """Input: a file that encode wrote for the run, or for another one with the same model and data."""
    return lambda wildcards: f"<results>/{encoders[wildcards.run]}/tokens/{name}"


def measured_base(name):
    """Input: the base's measurement, shared by all runs that ask it the same."""
    return lambda wildcards: f"<results>/{base_measurers[wildcards.run]}/base/{name}"


def runs_by_model(local):
    """{slug: run} of the models that are on this machine, or of those that come from the hub."""
    return {
        model_slug(name): name
        for name, run in config["runs"].items()
        if (local_model(run["model"], config["paths"]) is not None) == local
    }


def settings_of_model(slug, runs):
    return canonical(stage_settings(config, "fetch_model", runs[slug]))


def local_model_files(wildcards):
    """Input: the files of a local model, but for its card. A missing folder is reported by the stage, in plain words."""
    run = local_models[wildcards.model]
    folder = Path(local_model(config["runs"][run]["model"], config["paths"]))
    files = [path for path in folder.glob("*") if path.is_file() and path.suffix != ".md"]
    return sorted(str(path) for path in files if not path.name.startswith("."))


def glances(files):
    """Param: what local input files hold, at a glance. Snakemake goes by time, and does not see a file that was put in
    place of another with its old time (cp -p, rsync -a, mv)."""
    return lambda wildcards: [glance(path) for path in files(wildcards) if not path.startswith("<results>")]


def dataset_files(wildcards):
    """Input: the files of a dataset: local ones as they are, those of the hub where fetch_dataset puts them."""
    dataset = config["datasets"][wildcards.ds]
    files = []
    for entry in all_entries(dataset):
        if is_local(entry["path"]):
            try:
                files += map(str, expand_source(entry["path"], dataset["split"]))
            except MoultError as error:
                if not workflow.dryrun and not rows_are_there(wildcards.ds):
                    return []  # prepare will say it, in one table with what is wrong with other runs
                # Whatever else is raised here Snakemake takes for a rule that does not apply, and goes on with old rows.
                raise SystemExit(f"datasets.{wildcards.ds}.source: {error}") from None
        else:
            files.append(f"<results>/datasets/{dataset_slug(dataset, entry['path'])}.parquet")
    return files


def all_entries(dataset):
    """The parts of a dataset, those to validate on as well."""
    return [
        entry
        for source in (dataset["source"], dataset["val_source"])
        if source
        for entry in source_entries(source, dataset)
    ]


def rows_are_there(dataset):
    """Whether there are rows that a job which cannot read its source would make Snakemake delete."""
    return Path(config["paths"]["results"], "prepared", dataset, "metadata.json").exists()


def chat_template_file(wildcards):
    """Input: the template that the config names, if it is a file of the user's."""
    template = config["runs"][wildcards.run]["model"]["chat_template"]
    return [template] if template and Path(template).is_file() else []


def tell_failures():
    """Below Snakemake's own lines: what has failed since the start, for all runs, in one table."""
    found = failures_since(started, Path(workflow.pathvars.apply("<logs>")))
    if found:
        print(table([failure._replace(runs=runs_of(failure)) for failure in found]), file=sys.stderr)


def runs_of(failure):
    """The runs that need what a stage could not make; its log lies in the folder of its run, dataset, or kind."""
    owner, name = failure.log.parts[-2:]
    slugs = {"models": lambda run: [model_slug(run)], "datasets": dataset_slugs}
    owners = {
        "prepare.log": lambda run: config["runs"][run]["dataset"],
        "encode.log": encoders.get,
        "evaluate_base.log": base_measurers.get,
    }
    if owner in slugs:
        return [run for run in config["runs"] if failure.log.stem in slugs[owner](run)]
    return [run for run in config["runs"] if owners.get(name, str)(run) == owner]


def dataset_slugs(run):
    dataset = config["datasets"][config["runs"][run]["dataset"]]
    return [dataset_slug(dataset, entry["path"]) for entry in all_entries(dataset)]
