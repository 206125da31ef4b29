"""Download base models and datasets from the hub, or describe a local model.

Reads:  the hub, or local model folders. These rules run on the machine where Snakemake runs, because they need the network
Writes: results/models/<model>.json and, from the hub, results/models/<model>/,
        results/datasets/<dataset>.parquet and .json

A download is kept: name and revision are part of its path, and params and code of fetch_model and fetch_dataset are not
tracked. A changed network.tls or a new version of Moult does not download a model again.
"""


rule fetch_model:
    """Hub model at a revision -> snapshot and manifest (commit, hash of each file)."""
    output:
        manifest=at.manifest,
        folder=directory(at.model),
    log:
        "<logs>/models/{model}.log",
    benchmark:
        "<benchmarks>/models/{model}.jsonl"
    wildcard_constraints:
        model="|".join(map(re.escape, hub_models)) or "(?!)",
    localrule: True
    params:
        script=script_of("fetch_model"),
        settings=untracked(model_settings("fetch_model", hub_models)),
        name=untracked(lambda wildcards: model_of(wildcards, hub_models)["name"]),
        tls=untracked(lambda wildcards: config["network"]["tls"]),
    shell:
        """
        python {params.script:q} --settings {params.settings:q} --name {params.name:q} --tls {params.tls:q} \
            --out {output.folder:q} --manifest {output.manifest:q} --log-file {log:q}
        """


rule inspect_model:
    """Local model folder -> manifest. The folder is not copied."""
    input:
        files=local_model_files,
    output:
        manifest=at.manifest,
    log:
        "<logs>/models/{model}.log",
    benchmark:
        "<benchmarks>/models/{model}.jsonl"
    wildcard_constraints:
        model="|".join(map(re.escape, local_models)) or "(?!)",
    localrule: True
    params:
        settings=model_settings("inspect_model", local_models),
        name=lambda wildcards: model_of(wildcards, local_models)["name"],
        contents=glances(local_model_files),
        folder=lambda wildcards: local_model(model_of(wildcards, local_models), config["paths"]),
        script=script_of("inspect_model"),
        code=code_of("inspect_model"),
    shell:
        """
        python {params.script:q} --settings {params.settings:q} --name {params.name:q} \
            --folder {params.folder:q} --manifest {output.manifest:q} --log-file {log:q}
        """


rule fetch_dataset:
    """One split of a hub dataset at a revision -> Parquet, and metadata (commit, rows, hash)."""
    output:
        rows=at.dataset,
        metadata=at.dataset_metadata,
    log:
        "<logs>/datasets/{dataset}.log",
    benchmark:
        "<benchmarks>/datasets/{dataset}.jsonl"
    wildcard_constraints:
        dataset="|".join(map(re.escape, hub_datasets)) or "(?!)",
    localrule: True
    params:
        script=script_of("fetch_dataset"),
        settings=untracked(lambda wildcards: canonical(hub_datasets[wildcards.dataset])),
        tls=untracked(lambda wildcards: config["network"]["tls"]),
    shell:
        """
        python {params.script:q} --settings {params.settings:q} --tls {params.tls:q} \
            --out {output.rows:q} --metadata {output.metadata:q} --log-file {log:q}
        """
