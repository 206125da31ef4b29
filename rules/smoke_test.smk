"""Serve the tuned model and ask it the questions of evaluate.

Reads:  merged model, or base and adapter (serve.mode), the tuned model's answers, prompts, test rows
Writes: results/<run>/smoke_test.json; where a check fails smoke_test.failed.json, which is no output: Snakemake would remove it

The server starts and ends with the job, on the same machine and in the same image. As a `service()` it would be a second
job, and `--cores 1` would not be enough (Snakemake 9.27: "_cores: 2/1"). `make serve` starts a server that stays.
"""


rule smoke_test:
    """Check that the served model is the model that was measured."""
    input:
        model=base_model,
        adapter=ancient(at.adapter),
        merged=ancient(at.merged),  # merge.json tracks their content
        summary=at.merge_summary,
        plan=at.plan,
        answers=at.tuned_answers,
        merge_check=at.merge_check,
        rows=of_dataset(at.test_rows),
    output:
        result=at.smoke_test,
    log:
        "<logs>/{run}/smoke_test.log",
    benchmark:
        "<benchmarks>/{run}/smoke_test.jsonl"
    container:
        server_image
    threads: 4
    resources:
        gpu=of_run(lambda run: run["serve"]["vllm"].get("tensor_parallel_size", 1)),
        mem_mb=growing(16000),
        runtime=growing(60),
    params:
        settings=settings("smoke_test"),
        script=script_of("smoke_test"),
        code=code_of("smoke_test", starts="moult/serving/transformers_server.py"),
    shell:
        """
        python {params.script:q} --settings {params.settings:q} --run {wildcards.run:q} --answers {input.answers:q} \
            --merge-check {input.merge_check:q} --rows {input.rows:q} --base {input.model:q} --adapter {input.adapter:q} \
            --merged {input.merged:q} --merge {input.summary:q} --plan {input.plan:q} --result {output.result:q} \
            --threads {threads} --log-file {log:q}
        """
