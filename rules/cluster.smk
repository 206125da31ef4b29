"""The resources that the stages request, and gaps of the Slurm plugin that Moult fills.

Here is only what is the same on every cluster. Partition, account and the like are in profiles/slurm.
"""

import errno
import json
import shutil
import subprocess

from snakemake.logging import logger

from moult.workflow.functions import known
from moult.workflow.slurm import ENDED, jobs_of, refusals, stop, watch


def growing(amount):
    """Resource: `amount`, 1.5 times as much at the second attempt, twice as much from the third on."""
    return known(lambda wildcards, attempt: grown(amount, attempt))


def grown(amount, attempt):
    return int(amount * min(1 + (attempt - 1) / 2, 2))


def growing_with_input(amount, share):
    """Resource: `amount` MB and this share of the size of the inputs, growing with each attempt. What a compressed file holds is
    taken for five times its size."""

    @known
    def read(wildcards, input, attempt):
        # While an input is missing, this is an OSError: Snakemake asks again when it is there.
        sizes = (Path(path).stat().st_size * (5 if path.endswith((".gz", ".parquet")) else 1) for path in input)
        return grown(amount + share * sum(sizes) / 1e6, attempt)

    return read


def planned(resource):
    """Resource of finetune: the estimate in plan.json, growing with each attempt."""

    @known
    def read(wildcards, input, attempt):
        job = json.loads(Path(input.plan).read_text(encoding="utf-8")).get("job")
        if job is None:  # written by an older Moult: the rule plan will write it again
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(input.plan))
        return grown(job[resource], attempt)

    return read


@known
def sized(wildcards, input, attempt):
    """Resource of evaluate: memory for Python, CUDA and the data, and the weights once, growing with each attempt."""
    # While the manifest or the weights are missing, this is an OSError: Snakemake asks again when they are there.
    manifest = json.loads(Path(input.model).read_text(encoding="utf-8"))
    folder = Path(manifest["folder"] or Path(input.model).with_suffix(""))
    weights = sum((folder / name).stat().st_size for name in manifest["files"] if name.endswith(".safetensors"))
    return grown(max(16000, 8000 + weights // 1_000_000), attempt)


def processes(run):
    """How many processes finetune has on each node: one per GPU."""
    return run["train"]["gpu"] // run["train"]["nodes"]


def threads_of_process(wildcards, input, threads):
    """Param: the threads of each process of finetune. Not tracked, like the launcher."""
    return max(1, threads // processes(config["runs"][wildcards.run]))


def launcher(wildcards, input, threads):
    """Param: the command that starts finetune, one process per GPU. Not tracked: plan and settings contain the numbers."""
    train = config["runs"][wildcards.run]["train"]
    here, nodes = processes(config["runs"][wildcards.run]), train["nodes"]
    # Seconds to end the step and save a checkpoint. torchrun's default is 30; Slurm kills 300 s after its warning.
    patience = "--shutdown-timeout ${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}"
    if nodes == 1:
        return "python" if here == 1 else f"torchrun --standalone --nproc-per-node {here} {patience}"
    if workflow.is_main_process and (in_containers or not workflow.dryrun and not on_slurm()):
        raise WorkflowError(
            f"runs.{wildcards.run}: train.nodes is {nodes}: several nodes need --profile slurm, and no containers "
            "(srun is not in the image)"
        )
    # srun starts one torchrun on each node. They meet at the first node, where srun itself runs. The plugin removes all SLURM_*
    # variables except the job's id, so srun needs the layout as options.
    return (
        f"srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 --cpus-per-task={threads} "
        f"--kill-on-bad-exit=1 sh -c 'exec torchrun --nnodes={nodes} --nproc-per-node={here} {patience} --rdzv-backend=c10d "
        '--rdzv-id=$SLURM_JOB_ID --rdzv-endpoint=$SLURM_LAUNCH_NODE_IPADDR:$((20000 + SLURM_JOB_ID % 10000)) "$@"\' finetune'
    )


def on_several_nodes(value):
    """Resource that finetune requests only if it uses several nodes: `value`, called with the config of the run."""
    return of_run(lambda run: value(run) if run["train"]["nodes"] > 1 else None)


def on_slurm():
    return type(workflow.executor_settings).__module__.startswith("snakemake_executor_plugin_slurm")


refused = []


def tell_refusals():
    if refused:
        logger.warning("\n".join(["Slurm refuses the resources that some jobs request:", *refused]))


def look_after_slurm():
    """Find out which jobs Slurm would refuse, stop jobs of a killed Snakemake, and watch the others (moult/workflow/slurm.py).

    Also in a run without Slurm, because an earlier run may have used it.
    """
    if shutil.which("squeue") is None:
        return
    try:
        left = [job for job in jobs_of(Path.cwd()) if job.state not in ENDED]
        if left and alone_here:
            stop(left, Path.cwd(), logger.warning)
        elif left:
            ids = " ".join(job.id for job in left)
            logger.warning(
                f"Another Snakemake has Slurm jobs in this folder: {ids}. If it is no longer running, stop them: "
                f"scancel --signal=TERM {ids}"
            )
        if on_slurm():
            refused.extend(refusals(job.resources for job in workflow.dag.needrun_jobs() if not job.is_local))
            tell_refusals()
            watch(Path.cwd(), workflow.executor_settings.requeue, logger.warning)
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning(f"Slurm does not answer: {error}")
    except KeyboardInterrupt:
        raise SystemExit("interrupted; run the same command again to continue") from None
