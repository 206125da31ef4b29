"""The plans of all runs: what can be known before a GPU is used, found for all of them in one go.

Reads:  results/<run>/plan.json
Writes: nothing but its log
"""


rule plans:
    """Print what each run will do and need; a target for people: `snakemake plans --cores 1`."""
    input:
        expand(at.plan, run=config["runs"]),
    log:
        "<logs>/plans.log",
    localrule: True
    params:
        script=script_of("plans"),
    shell:
        "python {params.script:q} {input:q} | tee {log:q}"
