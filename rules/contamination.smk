"""Look for the questions of the evaluation in the training rows.

Reads:  training rows, eval.prompts and the benchmarks' questions of all runs of the dataset
Writes: results/prepared/<dataset>/contamination.json (each question that was found), contaminated_rows.json (ids of the rows)

With eval.contamination: drop, encode leaves these rows out, so they are its input. A new question then runs all that follows
again. It trains only if it was found in other rows: otherwise finetune sees the same tokens, and has nothing to train.
"""


rule contamination:
    """Which questions of the evaluation are in which training rows."""
    input:
        train=at.train_rows,
        questions=questions_of_dataset,
    output:
        report=at.contamination,
        rows=at.contaminated_rows,
    log:
        "<logs>/{ds}/contamination.log",
    benchmark:
        "<benchmarks>/{ds}/contamination.jsonl"
    threads: 4
    resources:
        mem_mb=growing(2000),  # that of the questions, whatever the rows
        runtime=growing(60),
    params:
        settings=settings("contamination"),
        script=script_of("contamination"),
        code=code_of("contamination"),
    shell:
        """
        python {params.script:q} --settings {params.settings:q} --train {input.train:q} --questions {input.questions:q} \
            --report {output.report:q} --rows {output.rows:q} --threads {threads} --log-file {log:q}
        """
