"""Say of each run which stages would run again, and why. Changes nothing.

    make explain                                                            # all runs of the config
    python scripts/tools/explain.py --configfile mine.yaml
    python scripts/tools/explain.py results/demo/metrics.json               # what leads to this file

`snakemake -n` decides what runs; this says what is different from the last time, as in

    demo
      finetune  train.learning_rate 0.0002 -> 0.0001
      merge     after finetune
      fresh: prepare, encode, plan
"""

import logging
import sys
from pathlib import Path

import _library  # noqa: F401

from moult.run.cli import tool_parser
from moult.workflow.explain import Record, Stage, explanation, own_reasons


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("targets", nargs="*", help="files or rules (default: what Snakemake makes by default)")
    parser.add_argument("--configfile", nargs="+", default=[], help="config files laid over config/config.yaml")
    args = parser.parse_args()
    sys.exit(explain(args.targets, args.configfile))


def explain(targets: list[str], configfiles: list[str]) -> int:
    """Exit code: 0, or 1 if the config or a target is refused."""
    from snakemake.api import SnakemakeApi
    from snakemake.cli import parse_args
    from snakemake.settings import types as settings
    from snakemake_interface_common.exceptions import WorkflowError

    # What the profile says of reruns counts here, too.
    profile = parse_args(["--dry-run"])[1]
    output = settings.OutputSettings(dryrun=True, log_level_override=logging.WARNING)
    with SnakemakeApi(output) as snakemake:
        try:
            api = snakemake.workflow(
                resource_settings=settings.ResourceSettings(cores=1),
                config_settings=settings.ConfigSettings(configfiles=[Path(file) for file in configfiles]),
            )
            dag = settings.DAGSettings(
                targets=targets,
                force_incomplete=profile.rerun_incomplete,
                rerun_triggers=profile.rerun_triggers,
                max_checksum_file_size=profile.max_checksum_file_size,
            )
            api.dag(dag)
            # As Workflow.printdag does it (Snakemake 9.27): the API has no function that returns the DAG.
            workflow = api._workflow
            workflow._prepare_dag(forceall=False, ignore_incomplete=False, lock_warn_only=True)
            workflow._build_dag()
            runs = workflow.async_run(explained(workflow))
            print(explanation(runs))
            if any(workflow.persistence._read_locks()):
                print("Snakemake is at work in this folder: what it is making is not made yet, or was cut short.")
        except WorkflowError as error:
            snakemake.print_exception(error)
            return 1
    return 0


async def explained(workflow) -> dict[str, list[Stage]]:
    """The stages of each run that is to be made, in the order of the workflow. A run that another builds on is also there."""
    dag = workflow.dag
    jobs = [job for level in dag.toposorted() for job in sorted(level, key=str) if not job.rule.norun]
    reasons = {job: tuple(await reasons_of(workflow, job)) for job in jobs}
    runs: dict[str, list[Stage]] = {}
    for run in dict.fromkeys(job.wildcards_dict.get("run") for job in jobs):
        own = [job for job in jobs if job.wildcards_dict.get("run") == run]
        needed = set(own) | (
            set() if run is None else {other for job in own for other in dag.bfs(dag.dependencies, job)}
        )
        if run is None:  # what no run has is of all of them
            needed -= {other for job in jobs if job not in own for other in dag.bfs(dag.dependencies, job)}
        if needed:
            stages = [Stage(name_of(job, run), reasons[job]) for job in jobs if job in needed]
            runs["all runs" if run is None else run] = stages
    return runs


def name_of(job, run: str | None) -> str:
    """The stage, and what it is of, if that is not this run, its dataset or its model."""
    others = [value for name, value in job.wildcards_dict.items() if name not in ("ds", "model") and value != run]
    return f"{job.rule.name} ({', '.join(others)})" if others else job.rule.name


async def reasons_of(workflow, job) -> list[str]:
    """Why the job would run; nothing if it would not. Snakemake stops looking at the first reason, and does not look at a job
    that comes after another: so its own functions are asked again."""
    dag, persistence = workflow.dag, workflow.persistence
    if not dag.needrun(job):
        return []
    record = persistence.metadata(job.output[0]) if job.output else None
    missing = [file async for file in job.missing_output(job.output)]
    if record is None and missing:
        return ["not made yet"]
    told = [f"{file} is not there" for file in missing]
    if await persistence.incomplete(job):
        told.append("it was cut short")
    if record is not None:
        told += own_reasons(
            Record(tuple(record.params or ()), record.code, tuple(record.input or ())),
            Record(tuple(persistence._params(job)), persistence._code(job.rule), tuple(persistence._input(job))),
            [file async for file in changed_inputs(workflow, job)],
        )
    before = {other for other, files in dag.dependencies[job].items() if files & dag.reason(job).updated_input_run}
    if before:
        told.append(f"after {', '.join(sorted(name_of(other, job.wildcards_dict.get('run')) for other in before))}")
    return told or [str(dag.reason(job))]


async def changed_inputs(workflow, job):
    """Inputs that no job of this DAG would make again, newer than the output and with another content than at the last time."""
    made = {
        file for other, files in workflow.dag.dependencies[job].items() if workflow.dag.needrun(other) for file in files
    }
    oldest = await job.output_mintime
    for file in job.input:
        if (
            oldest is None
            or file in made
            or file.is_ancient
            or not await file.exists()
            or not await file.is_newer(oldest)
        ):
            continue
        limit = workflow.dag_settings.max_checksum_file_size
        known = workflow.persistence.input_checksums(job, file)
        can_tell = len(known) == 1 and None not in known and await file.is_checksum_eligible(limit)
        if not can_tell or not await file.is_same_checksum(known.pop(), limit):
            yield str(file)


if __name__ == "__main__":
    main()
