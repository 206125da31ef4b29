"""What is wrong between this machine and the hub: proxy, certificates, token, each model and dataset.

Reads:  the hub
Writes: nothing but its log
"""


def hub_names():
    """The models and datasets of the config that come from the hub."""
    models = [config["runs"][run]["model"] for run in hub_models.values()]
    return {
        "models": [{key: model[key] for key in ("name", "revision")} for model in models],
        "datasets": [{"name": dataset["id"], "revision": dataset["revision"]} for dataset in hub_datasets.values()],
    }


rule check_connectivity:
    """What is wrong between this machine and the hub, step by step. A target of its own, without a file."""
    log:
        "<logs>/check_connectivity.log",
    localrule: True
    params:
        script=script_of("check_connectivity"),
        settings=untracked(lambda wildcards: canonical(hub_names())),
        tls=untracked(lambda wildcards: config["network"]["tls"]),
    shell:
        "python {params.script:q} --settings {params.settings:q} --tls {params.tls:q} --log-file {log:q}"
