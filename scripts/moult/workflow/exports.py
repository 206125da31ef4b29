"""The formats that a run can be exported to (`exports` of a run): what each is called, and which engine serves it."""

from typing import NamedTuple

from moult.errors import MoultError

LLAMA_CPP, OF_THE_RUN = "llama.cpp", "of the run"


class Format(NamedTuple):
    """A format.

    shown: its name for people. engine: what serves it: LLAMA_CPP, or OF_THE_RUN for serve.engine.
    kl_limit: largest mean KL(merged || export) in nats per token, unless the config has another; None: it is not measured.
    """

    shown: str
    engine: str
    kl_limit: float | None


# Measured on the demo, over all positions of 8 rows, and on a random model of 256-wide layers: BF16 3e-6 and 1e-6, Q8_0 5e-5 and
# 2e-5, Q6_K (wide) 2e-4, Q5_K_M 3e-3 and 6e-4, Q4_K_M 4e-4 and 2e-3, FP8 5e-4, W8A8 7e-5, W4A16 1e-3 (demo). The limits leave
# room for other models. Another training of the demo is at 0.40.
FORMATS = {
    "gguf-bf16": Format("BF16", LLAMA_CPP, 0.001),
    "gguf-q8_0": Format("Q8_0", LLAMA_CPP, 0.005),
    "gguf-q6_k": Format("Q6_K", LLAMA_CPP, 0.01),
    "gguf-q5_k_m": Format("Q5_K_M", LLAMA_CPP, 0.03),
    "gguf-q4_k_m": Format("Q4_K_M", LLAMA_CPP, 0.1),
    "adapter-gguf": Format("adapter", LLAMA_CPP, None),
    "fp8": Format("FP8", OF_THE_RUN, 0.05),
    "w8a8": Format("W8A8", OF_THE_RUN, 0.05),
    "w4a16": Format("W4A16", OF_THE_RUN, 0.2),
}
GGUF = [name for name, format in FORMATS.items() if format.engine == LLAMA_CPP]
COMPRESSED = [name for name in FORMATS if name not in GGUF]
# What `make publish` uploads together, and its card describes: all GGUF files in one repository, each of the others in its own.
UPLOADS = {"gguf": GGUF, **{name: [name] for name in COMPRESSED}}


# An adapter, and the file of the base that lies beside it, because llama.cpp serves both together.
ADAPTER, BASE_FILE = "adapter-gguf", "base-BF16.gguf"


def gguf_file(run: str, format: str) -> str:
    """`llama-server -hf <repo>:Q8_0` and `ollama run hf.co/<repo>:Q8_0` find a file by the quantization in its name."""
    return f"{run}-{FORMATS[format].shown}.gguf"


def kl_limit(format: str, export: dict) -> float | None:
    """The limit of the run (export.kl_limit), or else of the format."""
    own = FORMATS[format].kl_limit
    return own if own is None or export["kl_limit"] is None else export["kl_limit"]


def listed_for(what: str, run: dict) -> list[str]:
    """The formats of an upload that the config lists for a run. Raises MoultError if there are none."""
    listed = [name for name in run["exports"] if name in UPLOADS[what]]
    if not listed:
        raise MoultError(
            f"the run has no exports for {what} (exports: {run['exports']})",
            f"add to its `exports` in the config: {', '.join(UPLOADS[what])}",
        )
    return listed
