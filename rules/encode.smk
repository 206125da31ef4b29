"""Turn rows into token ids and labels.

Reads:  prepared rows, the base model's tokenizer, the chat template
Writes: results/<run>/tokens/: train.parquet, val.parquet, test.parquet, chat_template.jinja, report.json,
        preview.html, preview.json
"""

shipped_template = "config/chat_templates/chatml.jinja"


rule encode:
    """Tokenize and label the rows once. The trainer uses the result unchanged."""
    input:
        train=of_dataset(at.train_rows),
        val=of_dataset(at.val_rows),
        test=of_dataset(at.test_rows),
        model=base_model,
        template=chat_template_file,
        without=dropped_rows,
    output:
        train=at.train_tokens,
        val=at.val_tokens,
        test=at.test_tokens,
        template=at.template,
        report=at.report,
        preview=report(
            at.preview, caption="captions/preview.rst", category="Runs", labels=labels_of_run("trained tokens")
        ),
        preview_rows=at.preview_rows,
    log:
        "<logs>/{run}/encode.log",
    benchmark:
        "<benchmarks>/{run}/encode.jsonl"
    threads: 4
    resources:
        mem_mb=growing(2000),  # it does not grow with the rows: 0.4 GB, and less for each further process
        runtime=growing(120),
    params:
        settings=settings("encode"),
        script=script_of("encode"),
        code=code_of("encode", shipped_template),
        templates=untracked(lambda wildcards: Path(own_file(shipped_template)).parent),
        folder=lambda wildcards, output: Path(output.report).parent,
    shell:
        """
        python {params.script:q} --settings {params.settings:q} --model {input.model:q} --templates {params.templates:q} \
            --train {input.train:q} --val {input.val:q} --test {input.test:q} --without {input.without:q} --out {params.folder:q} \
            --threads {threads} --log-file {log:q}
        """
