"""Compare the runs of a sweep at a rung (moult/workflow/rungs.py).

Reads:  likelihoods of the runs that stop there, and of their further seeds
Writes: results/sweeps/<sweep>-rung<step>.json: the ranking, and which of them go on
"""


checkpoint rung:
    """Rank the runs at one of their steps. Those that are clearly worse than the best go no further."""
    input:
        likelihoods=likelihoods_of_rung,
    output:
        ranking=at.rung,
    log:
        "<logs>/sweeps/{sweep}/rung{step}.log",
    wildcard_constraints:
        sweep="|".join(map(re.escape, config["sweeps"])) or "(?!)",
        step="[0-9]+",
    localrule: True
    params:
        settings=known(lambda wildcards: canonical(sweep_settings(config, wildcards.sweep))),
        script=script_of("rung"),
        code=code_of("rung"),
        runs=untracked(lambda wildcards: climbers(wildcards.sweep, int(wildcards.step))),
    shell:
        """
        python {params.script:q} --settings {params.settings:q} --runs {params.runs:q} --likelihoods {input.likelihoods:q} \
            --ranking {output.ranking:q} --log-file {log:q}
        """
