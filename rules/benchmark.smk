"""Ask the base and the tuned model the questions of lm-eval's benchmarks (eval.benchmarks).

Reads:  base model or merged model, the run's chat template, the benchmark's questions
Writes: results/benchmarks/<benchmark>/, .jsonl and .json (what it asks),
        results/<run>/benchmark_base/ and benchmark_tuned/: <benchmark>.jsonl (one line per question) and .json

They run in the Python, or the image, that has lm-eval (eval.lm_eval). Each benchmark is a job of its own: another one more, or
another limit, does not ask the others again.
"""


rule fetch_benchmark:
    """A task of lm-eval -> its questions, and what was downloaded for them. A download is kept."""
    input:
        files=task_files,
    output:
        data=directory(at.benchmark_data),
        questions=at.benchmark_items,
        metadata=at.benchmark_metadata,
    log:
        "<logs>/benchmarks/{benchmark}.log",
    benchmark:
        "<benchmarks>/benchmarks/{benchmark}.jsonl"
    wildcard_constraints:
        benchmark="|".join(map(re.escape, benchmarks)) or "(?!)",
    priority: 1  # a task that cannot be loaded is found out before anything is trained
    localrule: True
    container:
        lm_eval_image
    params:
        script=script_of("fetch_benchmark"),
        python=untracked(lm_eval_python),
        task=lambda wildcards: canonical(next(iter(benchmarks[wildcards.benchmark].values())).where()),
        contents=glances(task_files),
        tls=untracked(lambda wildcards: config["network"]["tls"]),
    shell:
        """
        {params.python:q} {params.script:q} --settings {params.task:q} --data {output.data:q} --items {output.questions:q} \
            --metadata {output.metadata:q} --tls {params.tls:q} --log-file {log:q}
        """


rule benchmark_base:
    """The base model's answers to a benchmark. Runs with the same model and template share them, whatever their data."""
    input:
        model=base_model,
        template=of_encoder(at.template),
        data=ancient(at.benchmark_data),  # the metadata tracks its content
        task=at.benchmark_metadata,
    output:
        samples=at.base_benchmark,
        summary=at.base_benchmark_summary,
    log:
        "<logs>/{run}/benchmark_base_{benchmark}.log",
    benchmark:
        "<benchmarks>/{run}/benchmark_base_{benchmark}.jsonl"
    container:
        lm_eval_image
    threads: 4
    resources:
        gpu=of_run(evaluation_gpus),
        mem_mb=sized,
        runtime=growing(240),
    params:
        settings=settings("benchmark_base"),
        asked=asked,
        script=script_of("run_benchmark"),
        code=code_of("run_benchmark"),
        python=untracked(lm_eval_python),
        gpus=untracked(of_run(evaluation_gpus)),
    shell:
        """
        {params.python:q} {params.script:q} --settings {params.settings:q} --benchmark {params.asked:q} --model {input.model:q} \
            --base {input.model:q} --template {input.template:q} --data {input.data:q} --samples {output.samples:q} \
            --summary {output.summary:q} --gpus {params.gpus} --threads {threads} --log-file {log:q}
        """


rule benchmark_tuned:
    """The same for the merged model."""
    input:
        model=base_model,
        merged=ancient(at.merged),  # merge.json tracks its content
        summary=at.merge_summary,
        template=of_encoder(at.template),
        data=ancient(at.benchmark_data),
        task=at.benchmark_metadata,
    output:
        samples=at.tuned_benchmark,
        summary=at.tuned_benchmark_summary,
    log:
        "<logs>/{run}/benchmark_tuned_{benchmark}.log",
    benchmark:
        "<benchmarks>/{run}/benchmark_tuned_{benchmark}.jsonl"
    container:
        lm_eval_image
    threads: 4
    resources:
        gpu=of_run(evaluation_gpus),
        mem_mb=sized,
        runtime=growing(240),
    params:
        settings=settings("benchmark_tuned"),
        asked=asked,
        script=script_of("run_benchmark"),
        code=code_of("run_benchmark"),
        python=untracked(lm_eval_python),
        gpus=untracked(of_run(evaluation_gpus)),
    shell:
        """
        {params.python:q} {params.script:q} --settings {params.settings:q} --benchmark {params.asked:q} --model {input.merged:q} \
            --base {input.model:q} --template {input.template:q} --data {input.data:q} --samples {output.samples:q} \
            --summary {output.summary:q} --gpus {params.gpus} --threads {threads} --log-file {log:q}
        """
