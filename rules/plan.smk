"""What a run will do, before anything expensive.

Reads:  token counts, the base model's config and the headers of its weights
Writes: results/<run>/plan.json
"""


rule plan:
    """Parameters, LoRA targets, steps, memory and disk, how it can be merged and served."""
    input:
        code=code("plan"),
        model=base_model,
        train=tokens("train.parquet"),
        report=tokens("report.json"),
    output:
        "<results>/{run}/plan.json",
    log:
        "<logs>/{run}/plan.log",
    benchmark:
        "<benchmarks>/{run}/plan.jsonl"
    resources:
        mem_mb=8000,
        runtime=30,
    params:
        settings=settings("plan"),
        code=code_hash("plan"),
        tokens=lambda wildcards, input: Path(input.report).parent,
    shell:
        """
        python {input.code:q} --settings {params.settings:q} --model {input.model:q} --tokens {params.tokens:q} \
            --out {output:q} --log-file {log:q}
        """
