"""After a failure: all that has failed since the start, for all runs, in one table below Snakemake's own lines."""

import time

from snakemake.logging import logger

from moult.run.process import STARTED_BY, process_name
from moult.workflow.benchmarks import benchmarks_of
from moult.workflow.config import dataset_slug
from moult.workflow.failures import NotAgain, failures_since, table

started = time.time()

# Stages end when the Snakemake that has started them does (moult/run/process.py), also when it is killed.
os.environ[STARTED_BY] = process_name()

if workflow.is_main_process:
    logger.addFilter(NotAgain(lambda: workflow.scheduler.running, started))


def tell_failures():
    found = failures_since(started, Path(workflow.pathvars.apply("<logs>")))
    if found:
        print(table([failure._replace(runs=runs_of(failure)) for failure in found]), file=sys.stderr)


def runs_of(failure):
    """The runs that need what a stage could not make; its log lies in the folder of its run, dataset, or kind."""
    owner, name = failure.log.parts[-2:]
    slugs = {
        "models": lambda run: [model_slug(config["runs"][run]["model"])],
        "datasets": dataset_slugs,
        "benchmarks": lambda run: [benchmark.slug for benchmark in benchmarks_of(config["runs"][run])],
    }
    owners = {
        "prepare.log": lambda run: config["runs"][run]["dataset"],
        "contamination.log": lambda run: config["runs"][run]["dataset"],
        "encode.log": encoders.get,
        "evaluate_base.log": base_measurers.get,
    }
    owners |= {f"benchmark_base_{slug}.log": runs.get for slug, runs in benchmarkers.items()}
    if owner in slugs:
        return [run for run in config["runs"] if failure.log.stem in slugs[owner](run)]
    return [run for run in config["runs"] if owners.get(name, str)(run) == owner]


def dataset_slugs(run):
    dataset = config["datasets"][config["runs"][run]["dataset"]]
    return [dataset_slug(dataset, entry["path"]) for _, entry in all_entries(dataset)]
