"""Print the plans of all runs, and with them every error that can be found without a GPU.

Reads:  results/<run>/plan.json
Writes: only its log
"""


rule plans:
    """Print what each run will do and need. A target for people: `snakemake plans --cores 1`."""
    input:
        expand(at.plan, run=config["runs"]),
    log:
        "<logs>/plans.log",
    localrule: True
    params:
        script=script_of("plans"),
    shell:
        "python {params.script:q} {input:q} | tee {log:q}"
