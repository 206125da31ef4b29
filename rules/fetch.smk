"""Base models and datasets: from the hub, or looked at in place.

Reads:  the hub (the only rules that use the network; they run where Snakemake runs), or local model folders
Writes: results/models/<model>.json and, from the hub, results/models/<model>/,
        results/datasets/<dataset>.parquet and .json

What was downloaded stays: the outputs of fetch_model and fetch_dataset bear name and revision, and nothing else is
tracked. Their params are functions that take `input`, which Snakemake does not track, and the code is no input: neither a
changed network.tls nor a new version of Moult downloads a model again.
"""

hub_models = runs_by_model(local=False)
local_models = runs_by_model(local=True)
hub_datasets = {
    dataset_slug(dataset, entry["path"]): {
        "id": entry["path"],
        **{key: dataset[key] for key in ("subset", "split", "revision")},
    }
    for dataset in config["datasets"].values()
    for source in (dataset["source"], dataset["val_source"])
    if source
    for entry in source_entries(source, dataset)
    if not is_local(entry["path"])
}


rule fetch_model:
    """Hub model at a revision -> snapshot and manifest (commit, hash of each file)."""
    output:
        manifest="<results>/models/{model}.json",
        folder=directory("<results>/models/{model}"),
    log:
        "<logs>/models/{model}.log",
    benchmark:
        "<benchmarks>/models/{model}.jsonl"
    wildcard_constraints:
        model="|".join(map(re.escape, hub_models)) or "(?!)",
    localrule: True
    params:
        script=script_of("fetch_model"),
        settings=lambda wildcards, input: settings_of_model(wildcards.model, hub_models),
        name=lambda wildcards, input: config["runs"][hub_models[wildcards.model]]["model"]["name"],
        tls=lambda wildcards, input: config["network"]["tls"],
    shell:
        """
        python {params.script:q} --settings {params.settings:q} --name {params.name:q} --tls {params.tls:q} \
            --out {output.folder:q} --manifest {output.manifest:q} --log-file {log:q}
        """


rule inspect_model:
    """Local model folder -> manifest. The folder is used in place."""
    input:
        files=local_model_files,
    output:
        manifest="<results>/models/{model}.json",
    log:
        "<logs>/models/{model}.log",
    benchmark:
        "<benchmarks>/models/{model}.jsonl"
    wildcard_constraints:
        model="|".join(map(re.escape, local_models)) or "(?!)",
    localrule: True
    params:
        settings=lambda wildcards: settings_of_model(wildcards.model, local_models),
        name=lambda wildcards: config["runs"][local_models[wildcards.model]]["model"]["name"],
        contents=glances(local_model_files),
        folder=lambda wildcards: local_model(config["runs"][local_models[wildcards.model]]["model"], config["paths"]),
        script=script_of("fetch_model"),
        code=code_hash("fetch_model"),
    shell:
        """
        python {params.script:q} --settings {params.settings:q} --name {params.name:q} \
            --folder {params.folder:q} --manifest {output.manifest:q} --log-file {log:q}
        """


rule fetch_dataset:
    """One split of a hub dataset at a revision -> Parquet, and what it is (commit, rows, hash)."""
    output:
        rows="<results>/datasets/{dataset}.parquet",
        metadata="<results>/datasets/{dataset}.json",
    log:
        "<logs>/datasets/{dataset}.log",
    benchmark:
        "<benchmarks>/datasets/{dataset}.jsonl"
    wildcard_constraints:
        dataset="|".join(map(re.escape, hub_datasets)) or "(?!)",
    localrule: True
    params:
        script=script_of("fetch_dataset"),
        settings=lambda wildcards, input: canonical(hub_datasets[wildcards.dataset]),
        tls=lambda wildcards, input: config["network"]["tls"],
    shell:
        """
        python {params.script:q} --settings {params.settings:q} --tls {params.tls:q} \
            --out {output.rows:q} --metadata {output.metadata:q} --log-file {log:q}
        """


rule check_connectivity:
    """What is wrong between this machine and the hub, step by step. A target of its own, without a file."""
    log:
        "<logs>/check_connectivity.log",
    localrule: True
    params:
        script=script_of("check_connectivity"),
        settings=lambda wildcards, input: canonical(
            {
                "models": [
                    {key: config["runs"][run]["model"][key] for key in ("name", "revision")}
                    for run in hub_models.values()
                ],
                "datasets": [
                    {"name": dataset["id"], "revision": dataset["revision"]} for dataset in hub_datasets.values()
                ],
            }
        ),
        tls=lambda wildcards, input: config["network"]["tls"],
    shell:
        "python {params.script:q} --settings {params.settings:q} --tls {params.tls:q} --log-file {log:q}"
