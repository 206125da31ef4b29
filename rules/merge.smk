"""The tuned model as a plain model folder.

Reads:  base model, adapter, plan, template
Writes: results/<run>/merged/, merge.json (hashes, how it was merged)
"""


rule merge:
    """Add the adapter to the base's weights, tensor by tensor."""
    input:
        model=base_model,
        plan="<results>/{run}/plan.json",
        adapter=ancient("<results>/{run}/adapter"),  # its content is tracked by adapter.json
        summary="<results>/{run}/adapter.json",
        report=tokens("report.json"),
        template=tokens("chat_template.jinja"),
    output:
        merged=directory("<results>/{run}/merged"),
        summary="<results>/{run}/merge.json",
    log:
        "<logs>/{run}/merge.log",
    benchmark:
        "<benchmarks>/{run}/merge.jsonl"
    threads: 4
    resources:
        mem_mb=growing(8000),
        runtime=growing(120),
    params:
        settings=settings("merge"),
        script=script_of("merge"),
        code=code_hash("merge"),
        tokens=lambda wildcards, input: Path(input.report).parent,
    shell:
        """
        python {params.script:q} --settings {params.settings:q} --model {input.model:q} --plan {input.plan:q} \
            --tokens {params.tokens:q} --adapter {input.adapter:q} --merged {output.merged:q} --summary {output.summary:q} \
            --threads {threads} --log-file {log:q}
        """
