"""Rows out of a dataset.

Reads:  the dataset's files
Writes: results/prepared/<dataset>/train.jsonl, val.jsonl, metadata.json (where each row that was read has gone)
"""


rule prepare:
    """Normalise, filter, deduplicate, split; every row accounted for."""
    input:
        files=dataset_files,
    output:
        train=at.train_rows,
        val=at.val_rows,
        metadata=at.ledger,
    log:
        "<logs>/{ds}/prepare.log",
    benchmark:
        "<benchmarks>/{ds}/prepare.jsonl"
    threads: 4
    resources:
        mem_mb=growing(8000),
        runtime=growing(120),
    params:
        settings=settings("prepare"),
        contents=glances(dataset_files),
        script=script_of("prepare"),
        code=code_of("prepare"),
    shell:
        """
        python {params.script:q} --settings {params.settings:q} --train {output.train:q} --val {output.val:q} \
            --metadata {output.metadata:q} --threads {threads} --log-file {log:q}
        """
