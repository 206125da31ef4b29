"""What is uploaded of an export, and by which names."""

import re
from pathlib import Path

from moult.workflow.exports import COMPRESSED, FORMATS

# Of a Modelfile: what it names a file with.
_NAMES = re.compile(r"^(FROM|ADAPTER)[ \t]+(\S.*?)[ \t]*$", re.MULTILINE)


def gguf_name(run: str, format: str) -> str:
    """`llama-server -hf <repo>:Q8_0` and `ollama run hf.co/<repo>:Q8_0` find a file by the quantization in its name."""
    return f"{run}-{FORMATS[format].shown}.gguf"


def modelfile_name(run: str, format: str) -> str:
    return gguf_name(run, format).removesuffix(".gguf") + ".Modelfile"


def upload_of(run: str, format: str, folder: Path, files: dict[str, str]) -> dict[str, Path | bytes]:
    """{name in the repository: file, or its content} of an export.

    Args:
        folder: the export's model/.
        files: made.json's, {name: hash}.
    """
    if format in COMPRESSED:
        return {name: folder / name for name in files}
    found: dict[str, Path | bytes] = {gguf_name(run, format): folder / name for name in files if name.endswith(".gguf")}
    if "Modelfile" in files:
        own = modelfile((folder / "Modelfile").read_text(encoding="utf-8"), set(files), gguf_name(run, format))
        if own:
            found[modelfile_name(run, format)] = own.encode()
    return found


def modelfile(text: str, files: set[str], name: str) -> str | None:
    """A Modelfile for the file `name`. None if it names anything but the export's own file: that is nowhere else."""
    if any(named.removeprefix("./") not in files for _, named in _NAMES.findall(text)):
        return None
    return _NAMES.sub(lambda hit: f"{hit[1]} ./{name}", text)
