"""Make the page of the difference between two runs.

Reads:  the JSON files that the stages of both wrote, their rows and their answers
Writes: results/compare/<a>..<b>.html
"""


rule compare:
    """Show what differs between two runs, and which is the better one: `snakemake --cores 1 results/compare/a..b.html`."""
    input:
        metrics=of_both(at.metrics),
        samples=of_both(at.samples),
        likelihoods=of_both(at.tuned_likelihood),
        adapters=of_both(at.adapter_summary),
        plans=of_both(at.plan),
        merges=of_both(at.merge_summary),
        ledgers=of_both(at.ledger),
        rows=of_both(at.train_rows),
        tokens=of_both(at.report, encoders.get),
    output:
        report(
            at.comparison,
            caption="captions/compare.rst",
            category="Comparisons",
            labels={"run": "{a}", "against": "{b}"},
        ),
    log:
        "<logs>/compare/{a}..{b}.log",
    benchmark:
        "<benchmarks>/compare/{a}..{b}.jsonl"
    wildcard_constraints:
        a="|".join([*map(re.escape, config["runs"]), r"[^/]+?"]),
        b=r"[^/]+",
    localrule: True
    params:
        settings=lambda wildcards: canonical(stage_settings(config, "compare", pair(wildcards)[0])),
        script=script_of("compare"),
        code=page_code("compare"),
        runs=folders_of("metrics"),
        prepared=folders_of("ledgers"),
        tokens=folders_of("tokens"),
    shell:
        """
        python {params.script:q} --settings {params.settings:q} --runs {params.runs:q} --prepared {params.prepared:q} \
            --tokens {params.tokens:q} --page {output:q} --log-file {log:q}
        """
