"""Base models and datasets: from the hub, or looked at in place.

Reads:  the hub (the only rules that use the network; they run where Snakemake runs), or local model folders
Writes: results/models/<model>.json and, from the hub, results/models/<model>/ and results/datasets/<dataset>.parquet
"""

hub_models = runs_by_model(local=False)
local_models = runs_by_model(local=True)


rule fetch_model:
    """Hub model at a revision -> snapshot and manifest (commit, hash of each file)."""
    input:
        code=code("fetch_model"),
    output:
        manifest="<results>/models/{model}.json",
        folder=directory("<results>/models/{model}"),
    params:
        settings=lambda wildcards: settings_of_model(wildcards.model, hub_models),
        name=lambda wildcards: config["runs"][hub_models[wildcards.model]]["model"]["name"],
        code=code_hash("fetch_model"),
    wildcard_constraints:
        model="|".join(map(re.escape, hub_models)) or "(?!)",
    log:
        "<logs>/models/{model}.log",
    benchmark:
        "<benchmarks>/models/{model}.jsonl"
    localrule: True
    shell:
        """
        python {input.code[0]:q} --settings {params.settings:q} --name {params.name:q} \
            --out {output.folder:q} --manifest {output.manifest:q} --log {log:q}
        """


rule inspect_model:
    """Local model folder -> manifest. The folder is used in place."""
    input:
        code=code("fetch_model"),
        files=lambda wildcards: local_model_files(local_models[wildcards.model]),
    output:
        manifest="<results>/models/{model}.json",
    params:
        settings=lambda wildcards: settings_of_model(wildcards.model, local_models),
        name=lambda wildcards: config["runs"][local_models[wildcards.model]]["model"]["name"],
        folder=lambda wildcards: local_model(config["runs"][local_models[wildcards.model]]["model"], config["paths"]),
        code=code_hash("fetch_model"),
    wildcard_constraints:
        model="|".join(map(re.escape, local_models)) or "(?!)",
    log:
        "<logs>/models/{model}.log",
    benchmark:
        "<benchmarks>/models/{model}.jsonl"
    localrule: True
    shell:
        """
        python {input.code[0]:q} --settings {params.settings:q} --name {params.name:q} \
            --folder {params.folder:q} --manifest {output.manifest:q} --log {log:q}
        """
