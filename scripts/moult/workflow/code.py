"""What a stage's code is: its script and the modules of the library that it imports, by content and not by time.

Both sides use this: the rules, so that a real edit reruns a stage and a `git checkout` does not; and finetune, which keeps the
hash with its checkpoints, so that no weights of other code are taken for its own. Standard library only.
"""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

# How a stage runs (its log, console, progress, redaction) and how a page looks cannot change what others read. The rules of
# pages track the look themselves (rules/pages.smk). The `__init__` of a room is a docstring.
UNTRACKED = ("moult/run/", "moult/pages/")

_IMPORT = re.compile(r"^\s*from (moult(?:\.\w+)+) import", re.MULTILINE)


def closure(script: str, read: Callable[[str], str]) -> dict[str, str]:
    """{path: text} of a script and of every module of the library that it imports, directly or through others.

    Args:
        script: path relative to scripts/, such as "merge.py".
        read: gives the text of such a path.
    """
    found = {script: read(script)}
    waiting = [script]
    while waiting:
        for module in _IMPORT.findall(found[waiting.pop()]):
            parts = module.split(".")
            rooms = ["/".join([*parts[:depth], "__init__.py"]) for depth in range(1, len(parts))]
            for path in [*rooms, f"{'/'.join(parts)}.py"]:
                if path not in found:
                    found[path] = read(path)
                    waiting.append(path)
    return found


def code_hash(texts: dict[str, str], *more: str) -> str:
    """The hash of a closure, but for what cannot change a result; and of `more` texts that the stage depends on."""
    tracked = [f"{path}\0{text}" for path, text in sorted(texts.items()) if not _untracked(path)]
    return hashlib.sha256("\0".join([*tracked, *more]).encode()).hexdigest()[:16]


def _untracked(path: str) -> bool:
    return path.startswith(UNTRACKED) or path.endswith("__init__.py")


def hash_of_script(script: Path) -> str:
    """The hash of a script as it lies on the disk, with the library beside it."""
    return code_hash(closure(script.name, lambda path: (script.parent / path).read_text(encoding="utf-8")))
