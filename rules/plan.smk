"""What a run will do, before anything expensive.

Reads:  token counts, the base model's config and the headers of its weights
Writes: results/<run>/plan.json
"""


rule plan:
    """The plans of all runs: everything that can be known before a GPU is used, checked for all of them in one go."""
    input:
        expand("<results>/{run}/plan.json", run=config["runs"]),
    log:
        "<logs>/plan.log",
    localrule: True
    params:
        script=script_of("show_plans"),
    shell:
        "python {params.script:q} {input:q} | tee {log:q}"


rule plan_run:
    """Parameters, LoRA targets, steps, memory and disk, how it can be merged and served."""
    input:
        model=base_model,
        train=tokens("train.parquet"),
        report=tokens("report.json"),
    output:
        "<results>/{run}/plan.json",
    log:
        "<logs>/{run}/plan.log",
    benchmark:
        "<benchmarks>/{run}/plan.jsonl"
    priority: 1  # before evaluate_base, which needs a GPU
    resources:
        mem_mb=growing(8000),
        runtime=growing(30),
    params:
        settings=settings("plan"),
        script=script_of("plan"),
        code=code_hash("plan"),
        tokens=lambda wildcards, input: Path(input.report).parent,
        # Not tracked (it takes `input`): a changed prompt reruns neither plan nor finetune.
        prompts=lambda wildcards, input: canonical(config["runs"][wildcards.run]["eval"]["prompts"]),
    shell:
        """
        python {params.script:q} --settings {params.settings:q} --model {input.model:q} --tokens {params.tokens:q} \
            --prompts {params.prompts:q} --out {output:q} --log-file {log:q}
        """
