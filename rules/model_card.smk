"""Write the model cards into the model folders.

Reads:  metrics, plan, base model
Writes: results/<run>/cards/, and the same text as README.md in results/<run>/adapter/ and merged/
"""


rule model_card:
    """Describe the adapter and the merged model, with the figures. `make publish` uploads the cards with them."""
    input:
        model=base_model,
        adapter=ancient(at.adapter),
        merged=ancient(at.merged),
        made=[at.adapter_summary, at.merge_summary],
        plan=at.plan,
        metrics=at.metrics,
    output:
        adapter=at.adapter_card,
        merged=at.merged_card,
    log:
        "<logs>/{run}/model_card.log",
    benchmark:
        "<benchmarks>/{run}/model_card.jsonl"
    resources:
        mem_mb=growing(1000),
        runtime=growing(10),
    params:
        settings=settings("model_card"),
        script=script_of("model_card"),
        code=code_of("model_card"),
        cards=lambda wildcards, output: Path(output.merged).parent,
    shell:
        """
        python {params.script:q} --settings {params.settings:q} --run {wildcards.run:q} --model {input.model:q} \
            --plan {input.plan:q} --metrics {input.metrics:q} --adapter {input.adapter:q} --merged {input.merged:q} --cards {params.cards:q} \
            --log-file {log:q}
        """
