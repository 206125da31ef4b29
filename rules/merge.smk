"""Write the tuned model as a normal model folder.

Reads:  base model, adapter, plan, template
Writes: results/<run>/merged/, merge.json (hashes, how it was merged)
"""


rule merge:
    """Add the adapter to the base's weights, tensor by tensor."""
    input:
        model=base_model,
        plan=at.plan,
        adapter=ancient(at.adapter),  # adapter.json tracks its content
        summary=at.adapter_summary,
        report=of_encoder(at.report),
        template=of_encoder(at.template),
    output:
        merged=directory(at.merged),
        summary=at.merge_summary,
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
        code=code_of("merge"),
        tokens=folder_of("report"),
    shell:
        """
        python {params.script:q} --settings {params.settings:q} --model {input.model:q} --plan {input.plan:q} \
            --tokens {params.tokens:q} --adapter {input.adapter:q} --merged {output.merged:q} --summary {output.summary:q} \
            --threads {threads} --log-file {log:q}
        """
