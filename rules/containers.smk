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
    """Container of the smoke test: vLLM and the training libraries exclude each other, so they have an image each."""
    serve = config["runs"][wildcards.run]["serve"]
    return shown(serve["container"] if serve["engine"] == "vllm" else config["container"])


def shown(container):
    """An image, made ready to run in. Snakemake asks for it when it knows what will run, and before anything does.

    Where nothing will, there is none: a dry run needs neither the image nor Apptainer, for which Snakemake (9.27) looks.
    """
    if workflow.executor_plugin is None or workflow.dryrun or workflow.touch:
        return None
    if in_containers:
        try:
            check_image(container)
        except MoultError as error:
            raise SystemExit(str(error)) from None  # what else is raised here Snakemake wraps in its own words
        set_up_containers()
    return container


@lru_cache
def set_up_containers():
    """What the containers see and what they are told, for all jobs that this Snakemake runs itself."""
    scratch = Path(tempfile.mkdtemp(prefix="moult-"))
    at_exit(shutil.rmtree, scratch, ignore_errors=True)
    folders = ("results", "logs", "benchmarks")
    writes = [".snakemake", *(workflow.pathvars.apply(f"<{folder}>") for folder in folders)]
    os.environ.update(environment(config, writes, scratch))
    # Snakemake makes the working directory the home. The `set` is Snakemake's own, which a prefix replaces.
    home = shlex.quote(str(Path.home())).replace("{", "{{").replace("}", "}}")
    shell.prefix(f"set -euo pipefail; export HOME={home}; ")
