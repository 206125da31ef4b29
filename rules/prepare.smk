"""Turn a dataset into rows for training, validation and test.

Reads:  the dataset's files
Writes: results/prepared/<dataset>/train.jsonl, val.jsonl, test.jsonl, metadata.json (what happened to each row)
"""


rule prepare:
    """Normalise, filter, deduplicate, and split the rows. Count every row that is left out."""
    input:
        files=dataset_files,
    output:
        train=at.train_rows,
        val=at.val_rows,
        test=at.test_rows,
        metadata=at.ledger,
    log:
        "<logs>/{ds}/prepare.log",
    benchmark:
        "<benchmarks>/{ds}/prepare.jsonl"
    threads: 4
    resources:
        # A row takes 264 bytes of memory, whatever its length (BENCHMARKS.md). So this is enough for rows of 264 bytes and more, and
        # at the third attempt for rows of 132.
        mem_mb=growing_with_input(1000, 1),
        runtime=growing(120),
    params:
        settings=settings("prepare"),
        contents=glances(dataset_files),
        script=script_of("prepare"),
        code=code_of("prepare"),
    shell:
        """
        python {params.script:q} --settings {params.settings:q} --train {output.train:q} --val {output.val:q} \
            --test {output.test:q} --metadata {output.metadata:q} --threads {threads} --log-file {log:q}
        """
