"""What the stages compute on."""

import os
import platform
from pathlib import Path

from moult.errors import MoultError, some
from moult.model.architecture import auto_class
from moult.model.quantization import bitsandbytes_config, settle


def limit_threads(threads: int) -> None:
    """Before torch is imported. Results on a CPU depend on the number of threads, so it is the rule's, not the machine's."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # Threads that spin while they wait make a busy machine ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    torch.set_num_threads(threads)


def pick() -> str:
    """`cuda` if there is a GPU, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def own_device(kind: str) -> str:
    """This process's own device of a kind that `pick` returns: `cuda:<its number on this machine>`, or `cpu`.

    Always with a number: Trainer takes a model on `cuda` for one that is spread over several GPUs (transformers 5.23).
    """
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if kind == "cuda" else kind


def load_dtype(kind: str, configured: str):
    """The dtype that weights are loaded in: the configured one on a GPU, float32 on a CPU (slow and inexact otherwise)."""
    import torch

    return getattr(torch, configured) if kind == "cuda" else torch.float32


def load_model(folder: str, kind: str, settings: dict, quantization: str | None = None):
    """The base or merged model of a folder, whole, on this process's own device.

    Args:
        kind: what `pick` returns, `cuda` or `cpu`.
        settings: dtype, attn_implementation, trust_remote_code of the config's model section.
        quantization: that of the config, where the quantized base is wanted.

    Raises MoultError where weights are missing: transformers would make them up and say so in a warning only.
    """
    return read_model(
        folder,
        load_dtype(kind, settings["dtype"]),
        settings["trust_remote_code"],
        settings["attn_implementation"],
        own_device(kind),
        quantization,
    )


def read_model(
    folder: str | Path,
    dtype,
    trust_remote_code: bool,
    attn_implementation: str | None = None,
    device: str = "cpu",
    quantization: str | None = None,
):
    """The model of a folder on `device`, in `dtype`. Raises MoultError where weights are missing.

    On a GPU, each tensor goes there as soon as it is read: the machine's memory holds a few of them at a time.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    more = {"quantization_config": bitsandbytes_config(quantization, dtype)} if quantization else {}
    model, info = auto_class(config).from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=attn_implementation,
        # None on a CPU: peft would put hooks on a model with a device map there.
        device_map=None if device == "cpu" else {"": device},
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
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


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    from importlib.metadata import version

    from moult import __version__

    packages = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "safetensors")
    packages += ("bitsandbytes",)
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
