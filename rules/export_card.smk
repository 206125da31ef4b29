"""Write the card of exports that are uploaded together.

Reads:  the exports that the config lists, metrics, base model
Writes: results/<run>/cards/<what>.md; what: gguf, fp8, w8a8 or w4a16
"""


rule export_card:
    """Describe exports: how good each is, and how to run it. `make publish WHAT=gguf` uploads the card with them."""
    input:
        model=base_model,
        exports=of_upload,
        template=of_encoder(at.template),
        metrics=at.metrics,
    output:
        at.export_card,
    log:
        "<logs>/{run}/export_card_{what}.log",
    benchmark:
        "<benchmarks>/{run}/export_card_{what}.jsonl"
    wildcard_constraints:
        what="|".join(UPLOADS),
    localrule: True
    params:
        settings=settings("export_card"),
        script=script_of("export_card"),
        code=code_of("export_card"),
    shell:
        """
        python {params.script:q} --settings {params.settings:q} --run {wildcards.run:q} --what {wildcards.what:q} --model {input.model:q} \
            --template {input.template:q} --metrics {input.metrics:q} --exports {input.exports:q} --card {output:q} --log-file {log:q}
        """
