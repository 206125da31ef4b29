"""The LoRA adapter.

Reads:  tokens, base model, plan
Writes: results/<run>/adapter/, adapter.json (hashes, losses, versions), training_log.jsonl
Keeps:  results/<run>/trainer_state/, the checkpoints; no output, so that Snakemake never deletes it
"""


rule finetune:
    """Tune with trl.SFTTrainer and peft; goes on from the newest whole checkpoint."""
    input:
        model=base_model,
        plan="<results>/{run}/plan.json",
        train=tokens("train.parquet"),
        val=tokens("val.parquet"),
        report=tokens("report.json"),
        template=tokens("chat_template.jinja"),
    output:
        adapter=directory("<results>/{run}/adapter"),
        summary="<results>/{run}/adapter.json",
        training_log="<results>/{run}/training_log.jsonl",
    log:
        "<logs>/{run}/finetune.log",
    benchmark:
        "<benchmarks>/{run}/finetune.jsonl"
    threads: 4
    resources:
        gpu=lambda wildcards: config["runs"][wildcards.run]["train"]["gpu"],
        mem_mb=planned("mem_mb"),
        runtime=planned("runtime"),
        # Slurm warns it 5 minutes before its time is over, and it saves a checkpoint. Here and not in the profile, whose
        # defaults a site replaces. TERM, because USR1 kills the shells in between.
        slurm_extra="--signal=TERM@300",
        # Slurm may spread GPUs over nodes otherwise.
        nodes=lambda wildcards: config["runs"][wildcards.run]["train"]["nodes"],
        gres=on_several_nodes(lambda train: f"gpu:{train['gpu'] // train['nodes']}"),  # the same number on each
        mpi=on_several_nodes(lambda train: "srun"),  # the rule calls srun itself
        tasks=on_several_nodes(lambda train: train["nodes"]),
        tasks_per_gpu=on_several_nodes(lambda train: 0),  # the plugin would take `tasks` for it
    params:
        settings=settings("finetune"),
        script=script_of("finetune"),
        code=code_hash("finetune"),
        tokens=lambda wildcards, input: Path(input.report).parent,
        state=lambda wildcards, output: Path(output.summary).parent / "trainer_state",
        launch=launcher,
    shell:
        """
        {params.launch} {params.script:q} --settings {params.settings:q} --model {input.model:q} --tokens {params.tokens:q} \
            --plan {input.plan:q} --state {params.state:q} --adapter {output.adapter:q} --summary {output.summary:q} \
            --training-log {output.training_log:q} --threads {threads} --log-file {log:q}
        """
