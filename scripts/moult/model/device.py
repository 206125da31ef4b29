"""What the stages compute on."""

import contextlib
import itertools
import os
import platform
import re
import shutil
import socket
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from moult.errors import HOPELESS, MoultError, some
from moult.model.architecture import auto_class
from moult.model.quantization import bitsandbytes_config, settle
from moult.model.sharding import split_over
from moult.run.console import log


def limit_threads(threads: int) -> None:
    """Before torch is imported. Results on a CPU depend on the number of threads, so it is the rule's, not the machine's."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # Threads that spin while they wait make a busy machine ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    torch.set_num_threads(threads)


def pick(gpus: int = 1) -> str:
    """`cuda` if there is a GPU, else `cpu`. Takes `gpus` GPUs that no other stage on this machine has.

    Raises MoultError for a GPU that torch cannot use. An empty CUDA_VISIBLE_DEVICES asks for the CPU, as everywhere; Slurm sets
    that anew in each job, but not accelerate's variable.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hidden or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return "cpu"
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        # Batches have different lengths: otherwise the allocator's blocks fit the next batch badly.
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    sign = sign_of_gpu()
    take_gpus(gpus)  # before torch asks CUDA, which reads CUDA_VISIBLE_DEVICES once
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if not usable:
        if sign:
            raise unusable(sign, [str(warning.message) for warning in caught])
        return "cpu"
    check_gpus(own_device("cuda"), gpus)
    return "cuda"


ON_CPU = "to compute on the CPU, set ACCELERATE_USE_CPU (`ACCELERATE_USE_CPU=true snakemake ...`)"


def sign_of_gpu() -> str | None:
    """What says that this process has been given a GPU."""
    nothing = {"CUDA_VISIBLE_DEVICES": ("", "NoDevFiles"), "SLURM_JOB_GPUS": ("",), "SLURM_GPUS_ON_NODE": ("", "0")}
    for name, values in nothing.items():
        if os.environ.get(name, "") not in values:
            return f"{name} is {os.environ[name]}"
    return "/dev/nvidiactl exists" if Path("/dev/nvidiactl").exists() else None


def unusable(sign: str, said: list[str]) -> MoultError:
    """The error for a GPU that torch cannot use. On the CPU a run would take weeks, and what it costs is the GPU's price."""
    import torch

    try:
        driver = Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        driver = "unknown"
    built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
    why = f": {said[0].splitlines()[0]}" if said else ""
    return MoultError(
        f"there is a GPU ({sign}), but torch cannot use it{why} (NVIDIA driver {driver}; torch {torch.__version__} {built})",
        "update the driver (CUDA 13 needs 580 or newer), install torch for your CUDA, or request a GPU for the job; "
        f"{ON_CPU}",
        HOPELESS,
    )


def check_gpus(device: str, gpus: int) -> None:
    """Raises MoultError for too few GPUs, and for one that is too old for this torch."""
    import torch

    wanted, seen = max(gpus, int(os.environ.get("LOCAL_WORLD_SIZE", 1))), torch.cuda.device_count()
    if seen < wanted:
        key = "train.gpu" if gpus == 1 else "eval.gpu (or train.gpu, with train.shard)"
        raise MoultError(
            f"{key} needs {wanted} GPUs on this machine, but {seen} are visible",
            f"request more GPUs, or lower {key.split()[0]}",
            HOPELESS,
        )
    lowest = min((capability_of(name) for name in torch.cuda.get_arch_list() if name.startswith("sm_")), default=(0, 0))
    capability = torch.cuda.get_device_capability(device)
    if capability < lowest:
        has, needs = (".".join(map(str, version)) for version in (capability, lowest))
        raise MoultError(
            f"{torch.cuda.get_device_name(device)} has compute capability {has}, and torch {torch.__version__} needs {needs} or "
            "higher",
            f"use a newer GPU, or a torch for an older CUDA; {ON_CPU}",
            HOPELESS,
        )


def check_compiler() -> None:
    """Raises MoultError if Triton, in which TRL's loss is written, could not compile it for a GPU."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("gcc", "clang", "cc")), None)
    header = Path(sysconfig.get_path("include"), "Python.h")
    missing = [] if compiler else ["a C compiler"]
    missing += [] if header.exists() else [f"Python's header files ({header})"]
    if missing:
        raise MoultError(
            f"training on a GPU needs {' and '.join(missing)}: Triton compiles the loss",
            "install gcc and python3-dev, or run the stages in the image (--use-singularity), which has them",
            HOPELESS,
        )


def capability_of(architecture: str) -> tuple[int, int]:
    """The compute capability of sm_75 is (7, 5), of sm_100a (10, 0)."""
    number = int(re.sub(r"\D", "", architecture))
    return number // 10, number % 10


# What holds this process's GPU: sockets without a file, with a name that only one process of the machine can have.
_held: list[socket.socket] = []


def take_gpus(count: int) -> None:
    """Put GPUs that no other stage on this machine has where this process looks for its own in CUDA_VISIBLE_DEVICES.

    With --resources gpu=4 Snakemake starts four stages, and tells none of them which GPU is its own. The name of the lock ends
    with the process. Containers see it too, which have a /tmp of their own.
    """
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]
    if not visible or _held:
        return
    processes, place = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    own = list(itertools.islice(filter(hold, visible), count))
    start = place % len(visible)
    shared = [gpu for gpu in [*visible[start:], *visible[:start]] if gpu not in own][: count - len(own)]
    if shared:
        log.warning("all GPUs are in use by stages of Moult: sharing GPU %s with another one", some(shared))
    own += shared
    others = [gpu for gpu in visible if gpu not in own]
    # All stay visible to several processes, which copy from GPU to GPU.
    visible = own if processes == 1 else [*others[:place], *own, *others[place:]]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible)


def hold(gpu: str) -> bool:
    """Whether this process can have the GPU for its own. Slurm numbers the GPUs of each job anew."""
    lock = socket.socket(socket.AF_UNIX)
    try:
        lock.bind(f"\0moult-gpu-{os.environ.get('SLURM_JOB_ID', '')}-{gpu}")
    except OSError:
        lock.close()
        return False
    _held.append(lock)
    return True


@contextlib.contextmanager
def enough_memory(doing: str | Callable[[], str], fix: str) -> Iterator[None]:
    """Turn running out of memory in the block into a MoultError that says what was done, and that is not tried again.

    Args:
        doing: what the block does: "loading the base", or a function that returns this.
        fix: what to lower.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        what = doing if isinstance(doing, str) else doing()
        where = f" (rank {os.environ['RANK']})" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
        said = str(error).splitlines()[0].split(" Of the allocated memory")[0]
        # A cluster gives the next attempt more of the machine's memory, and the same GPU.
        code = 1 if OF_THE_MACHINE in said else HOPELESS
        raise MoultError(f"out of memory while {what}{where}: {said}", fix, code) from error


OF_THE_MACHINE = "can't allocate memory"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's memory was not enough. Libraries below torch say it in their own words."""
    import torch

    words = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", OF_THE_MACHINE)
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def own_device(kind: str) -> str:
    """This process's own device of a kind that `pick` returns: `cuda:<its number on this machine>`, or `cpu`.

    Always with a number: Trainer takes a model on `cuda` for one that is spread over several GPUs (transformers 5.23).
    """
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if kind == "cuda" else kind


def load_dtype(kind: str, configured: str):
    """The dtype that weights are loaded in: the configured one on a GPU, float32 on a CPU (slow and inexact otherwise)."""
    import torch

    return getattr(torch, configured) if kind == "cuda" else torch.float32


def load_model(
    folder: str, kind: str, settings: dict, quantization: str | None = None, processes: int = 1, gpus: int = 1
):
    """The base or merged model of a folder, on this process's own device.

    Args:
        kind: what `pick` returns, `cuda` or `cpu`.
        settings: dtype, attn_implementation, trust_remote_code of the config's model section.
        quantization: that of the config, where the quantized base is wanted.
        processes: over how many processes it is split (model/sharding.py); with 1 it is whole.
        gpus: over how many GPUs of this process its layers are spread.

    Raises MoultError where weights are missing: transformers would make them up and say so in a warning only.
    """
    where = split_over(processes) if processes > 1 else place_of(kind, gpus)
    with enough_memory(f"loading {folder} to {own_device(kind)}", "use a GPU with more memory, or a smaller model"):
        dtype, trusted = load_dtype(kind, settings["dtype"]), settings["trust_remote_code"]
        model = read_model(folder, dtype, trusted, settings["attn_implementation"], where, quantization)
    elsewhere = {"cpu", "disk"} & {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if kind == "cuda" and elsewhere:
        raise MoultError(
            f"{folder} does not fit into the memory of {gpus} GPUs: part of it would be on {some(sorted(elsewhere))}",
            "raise eval.gpu, or use GPUs with more memory",
            HOPELESS,
        )
    return model


def place_of(kind: str, gpus: int) -> dict:
    """Arguments of from_pretrained for where a whole model is to be."""
    import torch

    if kind == "cpu":
        return {}  # peft would put hooks on a model with a device map there
    if gpus == 1:
        return {"device_map": {"": own_device(kind)}}
    # A tenth of each for logits and what is computed at a time; nothing on the CPU, where it would take days.
    room = {number: int(0.9 * torch.cuda.mem_get_info(number)[0]) for number in range(gpus)}
    return {"device_map": "balanced", "max_memory": room}


def read_model(
    folder: str | Path,
    dtype,
    trust_remote_code: bool,
    attn_implementation: str | None = None,
    where: dict | None = None,
    quantization: str | None = None,
):
    """The model of a folder in `dtype`; on the CPU unless `where` has other arguments of from_pretrained. Raises MoultError where
    weights are missing.

    On a GPU, each tensor goes there as soon as it is read: the machine's memory holds a few of them at a time.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    more = {"quantization_config": bitsandbytes_config(quantization, dtype)} if quantization else {}
    model, info = auto_class(config).from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        **(where or {}),
        **more,
    )
    if quantization:
        settle(model)
    if info["missing_keys"] or info["mismatched_keys"]:
        names = [*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])]
        raise MoultError(
            f"{folder}: the weights lack {some(names)}", "config.json and the weights do not belong together"
        )
    return model


# What the training stages depend on.
PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "tokenizers",
    "safetensors",
)


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Versions of what a result depends on: Moult, Python and these packages."""
    from importlib.metadata import version

    from moult import __version__

    return {
        "moult": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def hardware(device: str) -> dict:
    """What the stage ran on."""
    import torch

    found: dict = {"device": device, "machine": platform.machine(), "threads": torch.get_num_threads()}
    if device == "cuda":
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "gpus": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
        }
    return found
