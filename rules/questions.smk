"""Input functions and params of the benchmarks, and of the search for questions in the training rows."""

from moult.workflow.benchmarks import benchmarks_by_slug, benchmarks_of, files_of
from moult.workflow.environments import LM_EVAL, check_python

benchmarks = benchmarks_by_slug(config["runs"])


def benchmark_run(wildcards):
    """The config of the run that the job is for; for fetch_benchmark, of the first that has the benchmark."""
    return config["runs"][wildcards.get("run") or next(iter(benchmarks[wildcards.benchmark]))]


def lm_eval_python(wildcards):
    """Param: the Python that has lm-eval."""
    return "python" if in_containers else benchmark_run(wildcards)["eval"]["lm_eval"]["python"] or "python"


def lm_eval_image(wildcards):
    """Container of the benchmarks. Without containers, this checks the Python before a job runs."""
    if workflow.executor_plugin is not None and not (workflow.dryrun or workflow.touch or in_containers):
        try:
            check_python(lm_eval_python(wildcards), *LM_EVAL)
        except MoultError as error:
            raise SystemExit(str(error)) from None
    return shown(benchmark_run(wildcards)["eval"]["lm_eval"]["container"])


def task_files(wildcards):
    """Input: the file of a task of the user's own, and its data."""
    path = next(iter(benchmarks[wildcards.benchmark].values())).path
    return files_of(path) if path else []


def asked(wildcards):
    """Param: which benchmark, and how many of its questions."""
    return canonical(benchmarks[wildcards.benchmark][wildcards.run].asked())


def of_benchmarks(base, tuned):
    """Input: files of all benchmarks of a run, those of the base where they are measured."""

    def files(wildcards):
        slugs = [benchmark.slug for benchmark in benchmarks_of(config["runs"][wildcards.run])]
        of_base = [base.format(run=benchmarkers[slug][wildcards.run], benchmark=slug) for slug in slugs]
        return of_base + [tuned.format(run=wildcards.run, benchmark=slug) for slug in slugs]

    return files


def of_seed_benchmarks(tuned):
    """Input: a file of all benchmarks, of each run with a further seed of this run."""
    return lambda wildcards: [
        tuned.format(run=other, benchmark=benchmark.slug)
        for other in seed_runs(wildcards.run, config["runs"][wildcards.run])
        for benchmark in benchmarks_of(config["runs"][other])
    ]


def questions_of_dataset(wildcards):
    """Input: the questions of the benchmarks of all runs of the dataset."""
    settings = stage_settings(config, "contamination", wildcards.ds)
    return [at.benchmark_items.format(benchmark=slug) for slug in settings["benchmarks"]]


def contamination_of(wildcards):
    """Input: what was found, if the run asks anything that can be looked for."""
    run = config["runs"][wildcards.run]
    asks = run["eval"]["prompts"] or run["eval"]["benchmarks"]
    return [at.contamination.format(ds=run["dataset"])] if asks else []


def dropped_rows(wildcards):
    """Input of encode: the ids of the rows that it leaves out."""
    run = config["runs"][wildcards.run]
    return [at.contaminated_rows.format(ds=run["dataset"])] if run["eval"]["contamination"] == "drop" else []
