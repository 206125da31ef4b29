"""Train the LoRA adapter.

Reads:  tokens, base model, plan; the checkpoints of the run that this one goes on from (start_from)
Writes: results/<run>/adapter/, adapter.json (hashes, losses, versions), training_log.jsonl
Keeps:  results/<run>/trainer_state/, the checkpoints. It is not an output, because Snakemake deletes outputs
"""


rule finetune:
    """Tune with trl.SFTTrainer and peft. Continues from the newest complete checkpoint."""
    input:
        model=base_model,
        plan=at.plan,
        train=of_encoder(at.train_tokens),
        val=of_encoder(at.val_tokens),
        report=of_encoder(at.report),
        template=of_encoder(at.template),
        before=run_before(at.adapter_summary),
    output:
        adapter=directory(at.adapter),
        summary=at.adapter_summary,
        training_log=at.training_log,
    log:
        "<logs>/{run}/finetune.log",
    benchmark:
        "<benchmarks>/{run}/finetune.jsonl"
    threads: of_run(lambda run: 4 * processes(run))
    resources:
        gpu=of_run(lambda run: run["train"]["gpu"]),
        mem_mb=planned("mem_mb"),
        runtime=planned("runtime"),
        # Slurm warns the job 5 minutes before its time limit, and finetune saves a checkpoint. This is not in the profile,
        # because a site may replace the defaults there. TERM, because USR1 would kill the shells in between.
        slurm_extra="--signal=TERM@300",
        # Otherwise Slurm may spread the GPUs over several nodes.
        nodes=of_run(lambda run: run["train"]["nodes"]),
        gres=on_several_nodes(lambda run: f"gpu:{processes(run)}"),  # the same number on each node
        mpi=on_several_nodes(lambda run: "srun"),  # the rule calls srun itself
        tasks=on_several_nodes(lambda run: run["train"]["nodes"]),
        tasks_per_gpu=on_several_nodes(lambda run: 0),  # otherwise the plugin would use `tasks` for this
    params:
        settings=settings("finetune"),
        script=script_of("finetune"),
        code=code_of("finetune"),
        tokens=folder_of("report"),
        state=lambda wildcards, output: Path(output.summary).with_name(Path(at.trainer_state).name),
        start=known(
            lambda wildcards, input: [
                f"--start-from={Path(path).with_name(Path(at.trainer_state).name)}" for path in input.before
            ]
        ),
        image=image_identity(),
        launch=launcher,
        threads=threads_of_process,
    shell:
        """
        {params.launch} {params.script:q} --settings {params.settings:q} --model {input.model:q} --tokens {params.tokens:q} \
            --plan {input.plan:q} --state {params.state:q} {params.start:q} --adapter {output.adapter:q} \
            --summary {output.summary:q} --training-log {output.training_log:q} --image {params.image:q} \
            --threads {params.threads} --log-file {log:q}
        """
