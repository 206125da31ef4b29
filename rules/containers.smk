"""The stages in containers (with --use-singularity): which image, and what a container sees (moult/workflow/container.py)."""

import shlex
import tempfile
from atexit import register as at_exit

from snakemake.settings.types import DeploymentMethod

from moult.workflow.container import check_image, environment

in_containers = DeploymentMethod.APPTAINER in workflow.deployment_settings.deployment_method


def image(wildcards):
    """Container of the training stages."""
    return shown(config["container"])


def server_image(wildcards):
    """Container of the smoke test. vLLM has its own image: it and the training libraries need different package versions."""
    serve = config["runs"][wildcards.run]["serve"]
    return shown(serve["container"] if serve["engine"] == "vllm" else config["container"])


def shown(container):
    """The image, after a check that it exists. Snakemake calls this after it has built the DAG and before it runs a job.

    In a dry run it returns None: otherwise Snakemake (9.27) would require the image and Apptainer.
    """
    if workflow.executor_plugin is None or workflow.dryrun or workflow.touch:
        return None
    if in_containers:
        try:
            check_image(container)
        except MoultError as error:
            raise SystemExit(str(error)) from None  # Snakemake would wrap any other exception in its own message
        set_up_containers()
    return container


@lru_cache
def set_up_containers():
    """Set the mounts and the environment of the containers, for all jobs that this Snakemake runs itself."""
    scratch = Path(tempfile.mkdtemp(prefix="moult-"))
    at_exit(shutil.rmtree, scratch, ignore_errors=True)
    folders = ("results", "logs", "benchmarks")
    writes = [".snakemake", *(workflow.pathvars.apply(f"<{folder}>") for folder in folders)]
    os.environ.update(environment(config, writes, scratch))
    # Snakemake sets HOME to the working directory. A prefix replaces Snakemake's own `set`, so it is repeated here.
    home = shlex.quote(str(Path.home())).replace("{", "{{").replace("}", "}}")
    shell.prefix(f"set -euo pipefail; export HOME={home}; ")
