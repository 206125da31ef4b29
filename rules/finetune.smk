"""The LoRA adapter.

Reads:  tokens, base model, plan
Writes: results/<run>/adapter/, adapter.json (hashes, losses, versions), training_log.jsonl
Keeps:  results/<run>/trainer_state/, the checkpoints; no output, so that Snakemake never deletes it
"""


rule finetune:
    """Tune with trl.SFTTrainer and peft; goes on from the newest whole checkpoint."""
    input:
        model=base_model,
        plan=at.plan,
        train=of_encoder(at.train_tokens),
        val=of_encoder(at.val_tokens),
        report=of_encoder(at.report),
        template=of_encoder(at.template),
    output:
        adapter=directory(at.adapter),
        summary=at.adapter_summary,
        training_log=at.training_log,
    log:
        "<logs>/{run}/finetune.log",
    benchmark:
        "<benchmarks>/{run}/finetune.jsonl"
    threads: 4
    resources:
        gpu=of_run(lambda run: run["train"]["gpu"]),
        mem_mb=planned("mem_mb"),
        runtime=planned("runtime"),
        # Slurm warns it 5 minutes before its time is over, and it saves a checkpoint. Here and not in the profile, whose
        # defaults a site replaces. TERM, because USR1 kills the shells in between.
        slurm_extra="--signal=TERM@300",
        # Slurm may spread GPUs over nodes otherwise.
        nodes=of_run(lambda run: run["train"]["nodes"]),
        gres=on_several_nodes(lambda train: f"gpu:{train['gpu'] // train['nodes']}"),  # the same number on each
        mpi=on_several_nodes(lambda train: "srun"),  # the rule calls srun itself
        tasks=on_several_nodes(lambda train: train["nodes"]),
        tasks_per_gpu=on_several_nodes(lambda train: 0),  # the plugin would take `tasks` for it
    params:
        settings=settings("finetune"),
        script=script_of("finetune"),
        code=code_of("finetune"),
        tokens=folder_of("report"),
        state=lambda wildcards, output: Path(output.summary).with_name(Path(at.trainer_state).name),
        image=image_identity(),
        launch=launcher,
    shell:
        """
        {params.launch} {params.script:q} --settings {params.settings:q} --model {input.model:q} --tokens {params.tokens:q} \
            --plan {input.plan:q} --state {params.state:q} --adapter {output.adapter:q} --summary {output.summary:q} \
            --training-log {output.training_log:q} --image {params.image:q} --threads {threads} --log-file {log:q}
        """
