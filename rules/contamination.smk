"""Look for the questions of the evaluation in the training rows.

Reads:  training rows, eval.prompts and the benchmarks' questions of all runs of the dataset
Writes: results/prepared/<dataset>/contamination.json (each question that was found), contaminated_rows.json (ids of the rows)

With eval.contamination: drop, encode leaves these rows out. A new question must not train again if it is found nowhere. So there
is a checkpoint between the two: once it is done, Snakemake looks again at what is to be run, and encode, which has the ids as a
param and not as an input, runs only if they are other ones. (As an `ancient` input they would hide changes to the params of all
that follows: Snakemake 9.27, dag.py.) A dry run before that shows all that might run.
"""


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
    """Param: the file with the ids of the rows that encode leaves out."""
    run = config["runs"][wildcards.run]
    drops = run["eval"]["contamination"] == "drop"
    return [workflow.pathvars.apply(at.dropped_rows.format(ds=run["dataset"]))] if drops else []


def after_drop(wildcards):
    """Input of encode: nothing, once the rows to drop are known (`checkpoints` waits for that)."""
    if dropped_rows(wildcards):
        checkpoints.drop.get(ds=config["runs"][wildcards.run]["dataset"])
    return []


rule contamination:
    """Which questions of the evaluation are in which training rows."""
    input:
        train=at.train_rows,
        questions=questions_of_dataset,
    output:
        report=at.contamination,
        rows=at.contaminated_rows,
    log:
        "<logs>/{ds}/contamination.log",
    benchmark:
        "<benchmarks>/{ds}/contamination.jsonl"
    threads: 4
    resources:
        mem_mb=growing(8000),
        runtime=growing(60),
    params:
        settings=settings("contamination"),
        script=script_of("contamination"),
        code=code_of("contamination"),
    shell:
        """
        python {params.script:q} --settings {params.settings:q} --train {input.train:q} --questions {input.questions:q} \
            --report {output.report:q} --rows {output.rows:q} --threads {threads} --log-file {log:q}
        """


checkpoint drop:
    """With eval.contamination: drop. A checkpoint of its own, so that without it there is none."""
    input:
        at.contaminated_rows,
    output:
        at.dropped_rows,
    log:
        "<logs>/{ds}/drop.log",
    localrule: True
    shell:
        "cp {input:q} {output:q} 2>{log:q}"
