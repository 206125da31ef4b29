"""Export the merged model for other engines, and prove each export to be the model that was measured.

Reads:  merged model (or adapter), base model, tokens, both measurements
Writes: results/<run>/exports/<format>/: model/ and made.json; likelihood.jsonl, answers.jsonl, general.jsonl and check.json;
        export.json

They run in the Python, or the image, that has llama.cpp and llmcompressor (export.python); but for the verdict, which needs
neither. Each format is a job of its own. Adding one reruns nothing else.
"""

OLLAMA_TEMPLATES = "scripts/moult/exporting/ollama_templates.json"


rule export_gguf:
    """Merged model, or adapter -> GGUF, for llama.cpp, Ollama and LM Studio, with a Modelfile."""
    input:
        model=base_model,
        adapter=ancient(at.adapter),
        merged=ancient(at.merged),  # merge.json tracks their content
        summary=at.merge_summary,
        template=of_encoder(at.template),
        report=of_encoder(at.report),
        train=calibration,
    output:
        model=directory(at.export),
        made=at.export_made,
    log:
        "<logs>/{run}/export_{format}.log",
    benchmark:
        "<benchmarks>/{run}/export_{format}.jsonl"
    wildcard_constraints:
        format="|".join(GGUF),
    container:
        export_image
    threads: 4
    resources:
        mem_mb=sized,
        runtime=growing(120),
    params:
        settings=settings("export_gguf"),
        script=script_of("export_gguf"),
        code=code_of("export_gguf", OLLAMA_TEMPLATES),
        python=untracked(export_python),
    shell:
        """
        {params.python:q} {params.script:q} --settings {params.settings:q} --run {wildcards.run:q} --format {wildcards.format:q} \
            --base {input.model:q} --adapter {input.adapter:q} --merged {input.merged:q} --merge {input.summary:q} \
            --template {input.template:q} --report {input.report:q} --train {input.train:q} --model {output.model:q} \
            --made {output.made:q} --threads {threads} --log-file {log:q}
        """


rule export_compressed:
    """Merged model -> weights of 8 or 4 bits for vLLM (compressed-tensors)."""
    input:
        model=base_model,
        merged=ancient(at.merged),
        summary=at.merge_summary,
        train=calibration,
    output:
        model=directory(at.export),
        made=at.export_made,
    log:
        "<logs>/{run}/export_{format}.log",
    benchmark:
        "<benchmarks>/{run}/export_{format}.jsonl"
    wildcard_constraints:
        format="|".join(COMPRESSED),
    container:
        export_image
    threads: 4
    resources:
        gpu=1,
        mem_mb=sized,
        runtime=growing(240),
    params:
        settings=settings("export_compressed"),
        script=script_of("export_compressed"),
        code=code_of("export_compressed"),
        python=untracked(export_python),
    shell:
        """
        {params.python:q} {params.script:q} --settings {params.settings:q} --run {wildcards.run:q} --format {wildcards.format:q} \
            --merged {input.merged:q} --merge {input.summary:q} --train {input.train:q} --model {output.model:q} \
            --made {output.made:q} --threads {threads} --log-file {log:q}
        """


rule evaluate_export:
    """Hold an export against the merged model: divergence, tokens, answers and stop reasons through a server of its own engine."""
    input:
        model=base_model,
        export=ancient(at.export),  # made.json tracks its content
        made=at.export_made,
        merged=ancient(at.merged),
        summary=at.merge_summary,
        merge_check=at.merge_check,
        test=of_encoder(at.test_tokens),
        report=of_encoder(at.report),
        rows=of_dataset(at.test_rows),
        tuned=at.tuned_likelihood,
        tuned_answers=at.tuned_answers,
    output:
        likelihood=at.export_likelihood,
        answers=at.export_answers,
        general=at.export_general,
        check=at.export_check,
    log:
        "<logs>/{run}/evaluate_export_{format}.log",
    benchmark:
        "<benchmarks>/{run}/evaluate_export_{format}.jsonl"
    container:
        export_engine_image
    threads: 4
    resources:
        gpu=1,
        mem_mb=sized,
        runtime=growing(240),
    params:
        settings=settings("evaluate_export"),
        script=script_of("evaluate_export"),
        code=code_of(
            "evaluate_export",
            GENERAL_TEXT,
            "scripts/moult/serving/llamacpp_server.py",
            starts="moult/serving/transformers_server.py",
        ),
        python=untracked(export_python),
        tokens=folder_of("report"),
        tuned=folder_of("tuned"),
    shell:
        """
        {params.python:q} {params.script:q} --settings {params.settings:q} --run {wildcards.run:q} --format {wildcards.format:q} \
            --export {input.export:q} --made {input.made:q} --base {input.model:q} --merged {input.merged:q} \
            --merge {input.summary:q} --tokens {params.tokens:q} --tuned {params.tuned:q} --rows {input.rows:q} \
            --likelihood {output.likelihood:q} --answers {output.answers:q} --general {output.general:q} --check {output.check:q} \
            --threads {threads} --log-file {log:q}
        """


rule score_export:
    """The verdict again: the export against the base, and against the merged model."""
    input:
        base=of_base_measurer(at.base_likelihood),
        base_answers=of_base_measurer(at.base_answers),
        base_general=of_base_measurer(at.base_general),
        tuned=at.tuned_likelihood,
        tuned_answers=at.tuned_answers,
        tuned_general=at.tuned_general,
        export=at.export_likelihood,
        export_answers=at.export_answers,
        export_general=at.export_general,
        check=at.export_check,
        made=at.export_made,
        merge=at.merge_summary,
        merged=ancient(at.merged),
        metrics=at.metrics,
    output:
        metrics=at.export_metrics,
    log:
        "<logs>/{run}/score_export_{format}.log",
    benchmark:
        "<benchmarks>/{run}/score_export_{format}.jsonl"
    resources:
        mem_mb=growing(4000),
        runtime=growing(30),
    params:
        settings=settings("score_export"),
        script=script_of("score_export"),
        code=code_of(
            "score_export",
            "scripts/moult/measuring/export.schema.json",
            "scripts/moult/measuring/metrics.schema.json",
            INSTRUCTIONS,
        ),
        base=folder_of("base"),
        tuned=folder_of("tuned"),
        export=folder_of("export"),
    shell:
        """
        python {params.script:q} --settings {params.settings:q} --run {wildcards.run:q} --format {wildcards.format:q} \
            --base {params.base:q} --tuned {params.tuned:q} --export {params.export:q} --made {input.made:q} --check {input.check:q} \
            --merge {input.merge:q} --merged {input.merged:q} --metrics {input.metrics:q} --out {output.metrics:q} --log-file {log:q}
        """
