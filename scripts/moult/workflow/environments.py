"""The environments beside the workflow's own, which hold what cannot be in it."""

import functools
import subprocess
from pathlib import Path

from moult.errors import MoultError


@functools.lru_cache
def check_python(python: str, package: str, key: str, fix: str) -> None:
    """Raises MoultError if there is no such Python, or it does not have the package. It is asked once. `key`: of the config."""
    try:
        command = [python, "-c", f"import importlib.metadata; importlib.metadata.version({package!r})"]
        done = subprocess.run(command, capture_output=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        why = error.strerror if isinstance(error, OSError) else "it does not answer"
        raise MoultError(f"{key}: {python}: {why}", fix) from None
    if done.returncode:
        raise MoultError(f"{python} does not have {package}", fix)


LM_EVAL = (
    "lm_eval",
    "eval.lm_eval.python",
    "make its environment (config/README.md, Benchmarks) and set eval.lm_eval.python to its Python, or use "
    "--use-singularity, or empty eval.benchmarks",
)
EXPORTS = (
    "llmcompressor",
    "export.python",
    "make its environment (make export-env; export.python is for another place), or use --use-singularity, or empty exports",
)
VLLM = (
    "vllm",
    "serve.python",
    "set serve.python to a Python that has vLLM; or use --use-singularity; or serve.engine: transformers, for a trial on a CPU; "
    "or leave fp8, w8a8 and w4a16 out of exports",
)


def python_of_exports(export: dict) -> str | None:
    """The Python of the exports outside a container: export.python, or that of `make export-env`. None if there is neither."""
    made = Path(".venv-export/bin/python")
    return export["python"] or (str(made) if made.exists() else None)
