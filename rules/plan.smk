"""Plan a run before anything expensive starts.

Reads:  token counts, the base model's config and the headers of its weights
Writes: results/<run>/plan.json
"""


rule plan:
    """Number of parameters, LoRA targets, steps, memory and disk, and how the model can be merged and served."""
    input:
        model=base_model,
        train=of_encoder(at.train_tokens),
        report=of_encoder(at.report),
    output:
        at.plan,
    log:
        "<logs>/{run}/plan.log",
    benchmark:
        "<benchmarks>/{run}/plan.jsonl"
    priority: 1  # run before evaluate_base, which needs a GPU
    resources:
        mem_mb=growing(8000),
        runtime=growing(30),
    params:
        settings=settings("plan"),
        script=script_of("plan"),
        code=code_of("plan"),
        tokens=folder_of("report"),
        # Untracked: a changed question must not rerun plan and finetune.
        eval=untracked(of_run(lambda run: canonical(run["eval"]))),
    shell:
        """
        python {params.script:q} --settings {params.settings:q} --model {input.model:q} --tokens {params.tokens:q} \
            --eval {params.eval:q} --out {output:q} --log-file {log:q}
        """
