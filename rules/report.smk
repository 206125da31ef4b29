"""Make the page of a run.

Reads:  the JSON files that the stages of the run wrote
Writes: results/<run>/report.html
"""


rule report:
    """Show the verdict, the answers, the training and the rows of a run on one page."""
    input:
        metrics=at.metrics,
        samples=at.samples,
        plan=at.plan,
        adapter=at.adapter_summary,
        training=at.training_log,
        ledger=of_dataset(at.ledger),
        rows=of_dataset(at.test_rows),
        base=of_base_measurer(at.base_likelihood),
        tuned=at.tuned_likelihood,
        tokens=of_encoder(at.report),
        preview=of_encoder(at.preview_rows),
        exports=of_exports(at.export_metrics),
    output:
        report(at.run_report, caption="captions/report.rst", category="Runs", labels=labels_of_run("report")),
    log:
        "<logs>/{run}/report.log",
    benchmark:
        "<benchmarks>/{run}/report.jsonl"
    localrule: True
    params:
        settings=settings("report"),
        script=script_of("report"),
        code=page_code("report"),
        results=folder_of("metrics"),
        tokens=folder_of("tokens"),
    shell:
        """
        python {params.script:q} --settings {params.settings:q} --run {wildcards.run:q} --results {params.results:q} \
            --ledger {input.ledger:q} --tokens {params.tokens:q} --rows {input.rows:q} --base-likelihood {input.base:q} \
            --tuned-likelihood {input.tuned:q} --exports {input.exports:q} --out {output:q} --log-file {log:q}
        """
