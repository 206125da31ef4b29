"""What the stages compute on."""

import os
import platform


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


def load_dtype(device: str, configured: str):
    """The dtype that weights are loaded in: the configured one on a GPU, float32 on a CPU (slow and inexact otherwise)."""
    import torch

    return getattr(torch, configured) if device == "cuda" else torch.float32


def load_model(folder: str, device: str, settings: dict):
    """The base or merged model of a folder, whole, on one device.

    Args:
        settings: dtype, attn_implementation, trust_remote_code of the config's model section.

    Raises MoultError where weights are missing: transformers would make them up and say so in a warning only.
    """
    from transformers import AutoModelForCausalLM

    from moult.errors import MoultError, some

    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=load_dtype(device, settings["dtype"]),
        attn_implementation=settings["attn_implementation"],
        trust_remote_code=settings["trust_remote_code"],
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        names = [*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])]
        raise MoultError(
            f"{folder}: the weights lack {some(names)}", "config.json and the weights do not belong together"
        )
    return model.to(device)


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    from importlib.metadata import version

    from moult import __version__

    packages = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "safetensors")
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
