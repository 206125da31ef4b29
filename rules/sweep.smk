"""Rank the runs of a sweep.

Reads:  metrics of the runs; likelihoods and adapter summaries of the runs and their further seeds
Writes: results/sweeps/<sweep>.html, and the ranking beside it as JSON
"""


def of_sweep(place, seeds):
    """Input: a file of each run of a sweep, and with `seeds` of each of their further seeds."""

    def files(wildcards):
        runs = sweep_settings(config, wildcards.sweep)["runs"]
        return [place.format(run=run) for name in runs for run in (runs[name]["trained"] if seeds else [name])]

    return known(files)


rule sweep:
    """Order the runs of a sweep by nats per token, and say whether the first is better than the others."""
    input:
        metrics=of_sweep(at.metrics, seeds=False),
        likelihoods=of_sweep(at.tuned_likelihood, seeds=True),
        adapters=of_sweep(at.adapter_summary, seeds=True),
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
            --likelihoods {input.likelihoods:q} --adapters {input.adapters:q} --page {output.page:q} --ranking {output.ranking:q} \
            --log-file {log:q}
        """
