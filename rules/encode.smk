"""Token ids and labels out of rows.

Reads:  prepared rows, the base model's tokenizer, the chat template
Writes: results/<run>/tokens/: train.parquet, val.parquet, chat_template.jinja, report.json, preview.html
"""


rule encode:
    """Tokenize and label, once; the trainer uses it as it is."""
    input:
        train=lambda wildcards: f"<results>/prepared/{config['runs'][wildcards.run]['dataset']}/train.jsonl",
        val=lambda wildcards: f"<results>/prepared/{config['runs'][wildcards.run]['dataset']}/val.jsonl",
        model=base_model,
        template=chat_template_file,
    output:
        train="<results>/{run}/tokens/train.parquet",
        val="<results>/{run}/tokens/val.parquet",
        template="<results>/{run}/tokens/chat_template.jinja",
        report="<results>/{run}/tokens/report.json",
        preview="<results>/{run}/tokens/preview.html",
    log:
        "<logs>/{run}/encode.log",
    benchmark:
        "<benchmarks>/{run}/encode.jsonl"
    threads: 4
    resources:
        mem_mb=growing(8000),
        runtime=growing(120),
    params:
        settings=settings("encode"),
        script=script_of("encode"),
        code=code_hash("encode", "config/chat_templates/chatml.jinja"),
        templates=lambda wildcards, input: shipped_templates,
        folder=lambda wildcards, output: Path(output.report).parent,
    shell:
        """
        python {params.script:q} --settings {params.settings:q} --model {input.model:q} --templates {params.templates:q} \
            --train {input.train:q} --val {input.val:q} --out {params.folder:q} --threads {threads} --log-file {log:q}
        """
