"""What is uploaded of an export, and by which names."""

import re
from pathlib import Path

from moult.workflow.exports import COMPRESSED, gguf_file

# Of a Modelfile: what it names a file with.
_NAMES = re.compile(r"^(?:FROM|ADAPTER)[ \t]+(\S.*?)[ \t]*$", re.MULTILINE)


def modelfile_name(run: str, format: str) -> str:
    return gguf_file(run, format).removesuffix(".gguf") + ".Modelfile"


def upload_of(run: str, format: str, folder: Path, files: dict[str, str]) -> dict[str, Path]:
    """{name in the repository: file} of an export.

    Not the base that lies beside an adapter: asked for by its quantization, it would be taken for the tuned model.

    Args:
        folder: the export's model/.
        files: made.json's, {name: hash}.
    """
    if format in COMPRESSED:
        return {name: folder / name for name in files}
    name = gguf_file(run, format)
    found = {name: folder / name}
    if "Modelfile" in files and set(_NAMES.findall((folder / "Modelfile").read_text(encoding="utf-8"))) == {
        f"./{name}"
    }:
        found[modelfile_name(run, format)] = folder / "Modelfile"
    return found
