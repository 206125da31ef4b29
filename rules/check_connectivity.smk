"""Test the connection to the hub: proxy, certificates, token, and each model and dataset.

Reads:  the hub
Writes: only its log
"""


rule check_connectivity:
    """Test the connection to the hub, step by step. A target for people: `snakemake check_connectivity --cores 1`."""
    log:
        "<logs>/check_connectivity.log",
    localrule: True
    params:
        script=script_of("check_connectivity"),
        settings=untracked(lambda wildcards: canonical(hub_names())),
        tls=untracked(lambda wildcards: config["network"]["tls"]),
    shell:
        "python {params.script:q} --settings {params.settings:q} --tls {params.tls:q} --log-file {log:q}"
