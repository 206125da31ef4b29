"""Rank the runs of a sweep.

Reads:  metrics of the runs; likelihoods and adapter summaries of the runs and their further seeds; the rungs before
Writes: results/sweeps/<sweep>.html, and the ranking beside it as JSON
"""


rule sweep:
    """Order the runs of a sweep by nats per token, and say whether the first is better than the others."""
    input:
        metrics=of_sweep(at.metrics, seeds=False),
        likelihoods=of_sweep(at.tuned_likelihood, seeds=True),
        adapters=of_sweep(at.adapter_summary, seeds=True),
        rungs=rungs_of_sweep,
    output:
        page=report(at.sweep, caption="captions/sweep.rst", category="Sweeps", labels={"sweep": "{sweep}"}),
        ranking=at.sweep_ranking,
    log:
        "<logs>/sweeps/{sweep}/sweep.log",
    wildcard_constraints:
        sweep="|".join(map(re.escape, config["sweeps"])) or "(?!)",
    localrule: True
    params:
        settings=known(lambda wildcards: canonical(sweep_settings(config, wildcards.sweep))),
        script=script_of("sweep"),
        code=page_code("sweep"),
    shell:
        """
        python {params.script:q} --settings {params.settings:q} --sweep {wildcards.sweep:q} --metrics {input.metrics:q} \
            --likelihoods {input.likelihoods:q} --adapters {input.adapters:q} --rungs {input.rungs:q} --page {output.page:q} \
            --ranking {output.ranking:q} --log-file {log:q}
        """
