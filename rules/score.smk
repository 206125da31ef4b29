"""Compare the base with the tuned model.

Reads:  both measurements, and the metadata of data, adapter and merge
Writes: results/<run>/metrics.json, samples.jsonl
"""


rule score:
    """Compute the intervals and the verdict."""
    input:
        base=of_base_measurer(at.base_likelihood),
        base_answers=of_base_measurer(at.base_answers),
        base_general=of_base_measurer(at.base_general),
        tuned=at.tuned_likelihood,
        tuned_answers=at.tuned_answers,
        tuned_general=at.tuned_general,
        merge_check=at.merge_check,
        benchmarks=of_benchmarks(at.base_benchmark, at.tuned_benchmark),
        benchmark_summaries=of_benchmarks(at.base_benchmark_summary, at.tuned_benchmark_summary),
        contamination=contamination_of,
        prepared=of_dataset(at.ledger),
        report=of_encoder(at.report),
        adapter=at.adapter_summary,
        merge=at.merge_summary,
        seed_adapters=of_other_seeds(at.adapter_summary),
        seed_likelihoods=of_other_seeds(at.tuned_likelihood),
        seed_answers=of_other_seeds(at.tuned_answers),
        seed_generals=of_other_seeds(at.tuned_general),
        seed_benchmarks=of_seed_benchmarks(at.tuned_benchmark),
        seed_benchmark_summaries=of_seed_benchmarks(at.tuned_benchmark_summary),
        seed_merge_checks=of_other_seeds(at.merge_check),
    output:
        metrics=at.metrics,
        samples=at.samples,
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
        code=code_of("score", "scripts/moult/measuring/metrics.schema.json", INSTRUCTIONS),
        base=folder_of("base"),
        tuned=folder_of("tuned"),
        tokens=folder_of("report"),
        seeds=lambda wildcards, input: [Path(path).parent for path in input.seed_merge_checks],
    shell:
        """
        python {params.script:q} --settings {params.settings:q} --run {wildcards.run:q} --base {params.base:q} --tuned {params.tuned:q} \
            --prepared {input.prepared:q} --tokens {params.tokens:q} --adapter {input.adapter:q} --merge {input.merge:q} \
            --benchmarks {input.benchmarks:q} --contamination {input.contamination:q} \
            --seed-tuned {params.seeds:q} --seed-adapters {input.seed_adapters:q} \
            --seed-benchmarks {input.seed_benchmarks:q} \
            --metrics {output.metrics:q} --samples {output.samples:q} --log-file {log:q}
        """
