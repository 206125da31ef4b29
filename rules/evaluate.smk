"""Measure the base and the tuned model on the same token ids.

Reads:  base model or merged model, test tokens, prompts
Writes: results/<run>/base/ and results/<run>/tuned/: likelihood.jsonl, answers.jsonl, general.jsonl; tuned/merge_check.json
Keeps:  results/models/<model>.answers/ and results/<run>/tuned/kept/: answers that need not be generated again
"""

# What shows what tuning has broken (moult/measuring/forgetting.py).
GENERAL_TEXT, INSTRUCTIONS = "scripts/moult/measuring/general_text.txt", "scripts/moult/measuring/instructions.jsonl"


rule evaluate_base:
    """The base model's likelihood of the test rows, and its answers.

    The plan is not an input of this rule: a changed rank makes the plan again, and then Snakemake (9.27, dag.py) does not check
    whether this rule's own params have changed.
    """
    input:
        model=base_model,
        test=of_encoder(at.test_tokens),
        report=of_encoder(at.report),
        template=of_encoder(at.template),
    output:
        likelihood=at.base_likelihood,
        answers=at.base_answers,
        general=at.base_general,
    log:
        "<logs>/{run}/evaluate_base.log",
    benchmark:
        "<benchmarks>/{run}/evaluate_base.jsonl"
    threads: 4
    resources:
        gpu=of_run(evaluation_gpus),
        mem_mb=sized,
        runtime=growing(240),
    params:
        settings=settings("evaluate_base"),
        script=script_of("evaluate_model"),
        code=code_of("evaluate_model", GENERAL_TEXT, INSTRUCTIONS),
        tokens=folder_of("report"),
        gpus=untracked(of_run(evaluation_gpus)),
        kept=lambda wildcards, input: str(Path(input.model).with_suffix(Path(at.base_kept).suffix)),
        # Untracked: a changed check needs no new answers.
        checks=untracked(of_run(lambda run: canonical(run["eval"]))),
    shell:
        """
        python {params.script:q} --settings {params.settings:q} --model {input.model:q} --tokens {params.tokens:q} \
            --likelihood {output.likelihood:q} --answers {output.answers:q} --general {output.general:q} \
            --kept {params.kept:q} --checks {params.checks:q} --gpus {params.gpus} --threads {threads} --log-file {log:q}
        """


rule evaluate_tuned:
    """The same for the merged model. Also compares the merged model with base plus adapter."""
    input:
        model=base_model,
        adapter=ancient(at.adapter),
        merged=ancient(at.merged),  # merge.json tracks their content
        summary=at.merge_summary,
        test=of_encoder(at.test_tokens),
        report=of_encoder(at.report),
        template=of_encoder(at.template),
    output:
        likelihood=at.tuned_likelihood,
        answers=at.tuned_answers,
        general=at.tuned_general,
        merge_check=at.merge_check,
    log:
        "<logs>/{run}/evaluate_tuned.log",
    benchmark:
        "<benchmarks>/{run}/evaluate_tuned.jsonl"
    threads: 4
    resources:
        gpu=of_run(evaluation_gpus),
        mem_mb=sized,
        runtime=growing(240),
    params:
        settings=settings("evaluate_tuned"),
        script=script_of("evaluate_model"),
        code=code_of("evaluate_model", GENERAL_TEXT, INSTRUCTIONS),
        tokens=folder_of("report"),
        kept=lambda wildcards, output: Path(output.answers).with_name(Path(at.tuned_kept).name),
        gpus=untracked(of_run(evaluation_gpus)),
    shell:
        """
        python {params.script:q} --settings {params.settings:q} --model {input.merged:q} --tokens {params.tokens:q} \
            --likelihood {output.likelihood:q} --answers {output.answers:q} --general {output.general:q} \
            --kept {params.kept:q} --base {input.model:q} --adapter {input.adapter:q} --merge-check {output.merge_check:q} \
            --gpus {params.gpus} --threads {threads} --log-file {log:q}
        """
