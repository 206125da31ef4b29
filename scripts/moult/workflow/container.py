"""Containers for the stages: check that the image exists, and decide what a container sees of the machine.

Apptainer reads all of this from environment variables. So `snakemake --use-singularity` needs no profile, and a cluster job,
which reads the rules again, gets the folders and the GPU of its own node.
"""

import csv
import glob
import io
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from moult.errors import MoultError
from moult.workflow.benchmarks import benchmarks_of, files_of
from moult.workflow.config import is_local, local_model, source_entries

# Environment variables for the stages and their libraries. All others stay outside, for example PYTHONPATH, LD_LIBRARY_PATH
# and settings of the host's compilers. (Apptainer itself passes TERM and the proxy variables.)
_PASSED_ON = re.compile(
    r"(HF|HUGGING_FACE|HUGGINGFACE|MOULT|SLURM|NCCL|GLOO|UCX|TORCH|PYTORCH|TORCHELASTIC|TORCHINDUCTOR|TRITON|ACCELERATE|VLLM"
    r"|NVIDIA|OMP|MKL|CUBLAS|KERNELS|WANDB|MLFLOW)_\w+"
    r"|CUDA_(?!HOME|PATH|ROOT)\w+|RANK|LOCAL_RANK|WORLD_SIZE|MASTER_ADDR|MASTER_PORT|TZ"
    r"|SSL_CERT_FILE|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE"
)


def identity(container: str) -> str:
    """The identity of an image, independent of its folder: the digest, or the file name, which contains the version."""
    return container.rpartition("@")[2] if "://" in container else Path(container).name


def check_image(container: str) -> None:
    """Raises MoultError if Apptainer or the image is missing. Snakemake itself fetches an image with a URL."""
    if not any(map(shutil.which, ("apptainer", "singularity"))):
        raise MoultError(
            "--use-singularity: neither apptainer nor singularity is on the PATH",
            "install Apptainer (https://apptainer.org); without the flag the stages run in Snakemake's own environment",
        )
    if "://" not in container and not Path(container).is_file():
        raise MoultError(
            f"--use-singularity: the image does not exist: {container}",
            "`make image` builds the image of the training stages, `make serve-image` that of the server, `make benchmark-image` "
            "that of the benchmarks, `make export-image` that of the exports; `container`, `serve.container`, "
            "`eval.lm_eval.container` and `export.container` in the config name other images",
        )


def environment(config: dict, writes: Iterable[str], scratch: Path) -> dict[str, str]:
    """Environment variables by which Apptainer shows a stage only what it needs.

    `writes` are the folders of the outputs. `scratch` contains the container's /tmp and home, so that libraries do not write
    their caches into the checkout or the user's home. HOME keeps its value, so that `~` in the config means the same inside.
    (Snakemake adds its cache of sources, which may be in the home: Apptainer mounts the outer folder first.)
    """
    prefix = "APPTAINER" if shutil.which("apptainer") else "SINGULARITY"  # as Snakemake chooses
    kept = {name: value for name, value in os.environ.items() if _PASSED_ON.fullmatch(name)}
    mounts = _Mounts()
    for folder, destinations in (("tmp", ("/tmp", "/var/tmp")), ("home", (str(Path.home()),))):
        (scratch / folder).mkdir(parents=True, exist_ok=True)
        for destination in destinations:
            mounts.replace(destination, scratch / folder)
    for path in (".", *writes):
        Path(path).mkdir(parents=True, exist_ok=True)
        mounts.show(path, writable=True)
    for path in _read(config):
        mounts.show(path)
    for path in _named_by(kept):
        mounts.show(path, writable=Path(path).is_dir())
    variables = {
        f"{prefix}_CLEANENV": "1",
        f"{prefix}_NO_MOUNT": "tmp",
        f"{prefix}_MOUNT": str(mounts),
        **{f"{prefix}ENV_{name}": value for name, value in kept.items()},
    }
    if any(map(os.path.exists, ("/dev/nvidiactl", "/dev/dxg"))):  # the latter in WSL
        variables[f"{prefix}_NV"] = "1"
    return variables


def _named_by(variables: dict[str, str]) -> list[str]:
    """Files and folders that environment variables name: certificates, and the hub's cache, which contains the token."""
    values = [value for name, value in variables.items() if not name.startswith("SLURM_")]
    if "HF_HOME" in variables:
        Path(variables["HF_HOME"]).expanduser().mkdir(parents=True, exist_ok=True)
    elif "HF_TOKEN_PATH" not in variables:
        values.append(os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface", "token"))  # noqa: PTH118
    return [value for value in values if value.startswith(("/", "~")) and os.path.exists(os.path.expanduser(value))]  # noqa: PTH110, PTH111


def _read(config: dict) -> Iterator[str]:
    """The files and folders that the config names for reading."""
    if config["paths"]["models"]:
        yield config["paths"]["models"]
    if config["network"]["tls"] not in ("verify", "off"):
        yield config["network"]["tls"]
    for run in config["runs"].values():
        if folder := local_model(run["model"], config["paths"]):
            yield from _with_links(folder)
        if run["model"]["chat_template"]:
            yield run["model"]["chat_template"]
        for benchmark in benchmarks_of(run):
            if benchmark.path:
                yield from files_of(benchmark.path)
    for dataset in config["datasets"].values():
        for source in filter(None, (dataset["source"], dataset["val_source"], dataset["test_source"])):
            for entry in source_entries(source, dataset):
                if is_local(entry["path"]):
                    yield from _with_links(entry["path"])


def _with_links(path: str) -> Iterator[str]:
    """A file or a folder (for a pattern: its folder), and the targets of links in it. The hub's cache consists of links."""
    path = os.path.expanduser(path)  # noqa: PTH111
    if not os.path.exists(path) and glob.has_magic(path):  # noqa: PTH110
        path = re.split(r"[*?\[]", path)[0].rpartition("/")[0] or "."
    yield path
    targets = set()
    for folder, folders, files in os.walk(path):
        for entry in (Path(folder, name) for name in (*folders, *files)):
            if entry.is_symlink():
                target = entry.resolve()
                targets.add(str(target if target.is_dir() else target.parent))  # thousands of files: too many mounts
    yield from sorted(targets)


class _Mounts:
    """The mounts. A path that goes through links is mounted under each name on its way, so that it works inside as well."""

    def __init__(self):
        self.wanted: dict[Path, tuple[Path, bool]] = {}
        self.replaced: set[Path] = set()

    def replace(self, destination: str, source: Path) -> None:
        """Show `source` at `destination` instead of what the machine has there."""
        self.wanted[Path(destination)] = source, True
        self.replaced.add(Path(destination))

    def show(self, path: str, writable: bool = False) -> None:
        """Show what the machine has at `path`, if it exists."""
        for name in _names(Path(path).expanduser().absolute()):
            if name.exists():
                writable |= self.wanted.get(name, (name, False))[1]
                self.wanted[name] = name.resolve(), writable
                self.replaced.discard(name)

    def __str__(self) -> str:
        """The value of APPTAINER_MOUNT: one line of CSV per mount, an outer folder before an inner one."""
        text = io.StringIO()
        made: dict[Path, bool] = {}
        for name, (source, writable) in sorted(self.wanted.items()):
            around = next((folder for folder in name.parents if folder in made), None)
            # A folder that is mounted contains everything below it. A second mount is needed only to make a part writable.
            if around is not None and around not in self.replaced and (made[around] >= writable or name != source):
                continue
            made[name] = writable
            mode = "type=bind" if writable else "ro"  # each line must have as many fields as the first
            csv.writer(text, lineterminator="\n").writerow(
                ["type=bind", f"source={source}", f"destination={name}", mode]
            )
        return text.getvalue().rstrip()


def _names(path: Path) -> Iterator[Path]:
    """`path`, and the paths that the links on its way lead to, up to the real one."""
    for _ in range(40):  # as many as Linux follows
        path = Path(os.path.normpath(path))
        yield path
        link = next((part for part in (*reversed(path.parents), path) if part.is_symlink()), None)
        if link is None:
            return
        path = link.parent / link.readlink() / path.relative_to(link)
