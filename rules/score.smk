"""Base against tuned.

Reads:  both measurements, and what the stages wrote about data, adapter and merge
Writes: results/<run>/metrics.json, samples.jsonl
"""


rule score:
    """Intervals and a verdict."""
    input:
        base=measured_base("likelihood.jsonl"),
        base_answers=measured_base("answers.jsonl"),
        tuned="<results>/{run}/tuned/likelihood.jsonl",
        tuned_answers="<results>/{run}/tuned/answers.jsonl",
        merge_check="<results>/{run}/tuned/merge_check.json",
        prepared=lambda wildcards: f"<results>/prepared/{config['runs'][wildcards.run]['dataset']}/metadata.json",
        report=tokens("report.json"),
        adapter="<results>/{run}/adapter.json",
        merge="<results>/{run}/merge.json",
    output:
        metrics="<results>/{run}/metrics.json",
        samples="<results>/{run}/samples.jsonl",
    log:
        "<logs>/{run}/score.log",
    benchmark:
        "<benchmarks>/{run}/score.jsonl"
    resources:
        mem_mb=growing(4000),
        runtime=growing(30),
    params:
        settings=settings("score"),
        script=script_of("score"),
        code=code_hash("score", "scripts/moult/metrics.schema.json"),
        base=lambda wildcards, input: Path(input.base).parent,
        tuned=lambda wildcards, input: Path(input.tuned).parent,
        tokens=lambda wildcards, input: Path(input.report).parent,
    shell:
        """
        python {params.script:q} --settings {params.settings:q} --run {wildcards.run:q} --base {params.base:q} --tuned {params.tuned:q} \
            --prepared {input.prepared:q} --tokens {params.tokens:q} --adapter {input.adapter:q} --merge {input.merge:q} \
            --metrics {output.metrics:q} --samples {output.samples:q} --log-file {log:q}
        """
