"""Make the page of all runs.

Reads:  what was measured of each run, and its page
Writes: results/summary.html, summary.tsv
"""


rule summary:
    """Show all runs beside each other, and which is the best of each dataset: `snakemake --cores 1 results/summary.html`."""
    input:
        metrics=expand(at.metrics, run=asked_for(config)),
        samples=expand(at.samples, run=asked_for(config)),
        likelihoods=expand(at.tuned_likelihood, run=asked_for(config)),
        adapters=expand(at.adapter_summary, run=asked_for(config)),
        reports=expand(at.run_report, run=asked_for(config)),
    output:
        page=report(at.summary, caption="captions/summary.rst", category="All runs", labels={"page": "summary"}),
        table=at.summary_table,
    log:
        "<logs>/summary.log",
    benchmark:
        "<benchmarks>/summary.jsonl"
    localrule: True
    params:
        settings=lambda _: canonical({run: stage_settings(config, "summary", run) for run in asked_for(config)}),
        script=script_of("summary"),
        code=page_code("summary"),
        runs=lambda _, input: [Path(path).parent for path in input.metrics],
    shell:
        """
        python {params.script:q} --settings {params.settings:q} --runs {params.runs:q} \
            --page {output.page:q} --table {output.table:q} --log-file {log:q}
        """
