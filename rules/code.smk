"""The workflow's own files: where the jobs find them, and what the code of a stage is.

Snakemake reads this again in every job, so nothing heavier than yaml and jsonschema is imported (scripts/moult/workflow/).
"""

import importlib
import os
import sys
from functools import lru_cache
from os import environ
from pathlib import Path


@lru_cache
def own_file(path):
    """Where the jobs find a file of this workflow, given relative to the Snakefile.

    In a checkout that is the working directory, its plain path: a command that `snakemake -p` prints can be run by hand.
    Otherwise (a module, from another folder or from GitHub) Snakemake's cached copy, which containers see as well.
    """
    cached = workflow.source_path(f"../{path}")
    original = os.path.relpath(os.path.normpath(str(cached.flags["sourcecache_entry"])))
    return original if not original.startswith("..") and os.path.exists(original) else str(cached)


def read_own(path):
    """The text of a file of ours below scripts/. It is then where the jobs find it."""
    return Path(own_file(f"scripts/{path}")).read_text(encoding="utf-8")


# The library has to be there before it can be imported, and this module of it says which files that takes.
for path in (
    "moult/__init__.py",
    "moult/workflow/__init__.py",
    "moult/workflow/code.py",
    "moult/workflow/functions.py",
):
    library = Path(own_file(f"scripts/{path}"))
sys.path.insert(0, str(library.parents[2].resolve()))

from moult.workflow.code import closure, code_hash
from moult.workflow.functions import known

for module in ("config", "console", "container", "environments", "exports", "failures", "slurm", "stages"):
    closure(f"moult/workflow/{module}.py", read_own)
for module in ("data/readers", "measuring/table"):  # which files a dataset's source means; the results for people
    closure(f"moult/{module}.py", read_own)
importlib.invalidate_caches()  # the folders have been filled since Python looked into them

# The stages run with the Python that runs Snakemake; inside a container `python` is the image's.
environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"


def untracked(value):
    """Param: worth `value(wildcards)`, and no reason to rerun a job if it changes.

    Snakemake (9.27) compares no param whose function takes `input`: it is taken for a consequence of the input files.
    """
    return known(lambda wildcards, input: value(wildcards))


def script_of(stage):
    """Param: the script of a stage. The path is not tracked: outside of a checkout it is another one at each start. What the
    script and its library hold is in `code_of`."""
    code_of(stage)  # brings the modules that it imports to where the jobs find them
    return untracked(lambda wildcards: own_file(f"scripts/{stage}.py"))


@lru_cache
def code_of(stage, *data, starts=None):
    """Param: a hash of a stage's script, of the modules that it imports, and of `data`, files of the workflow that it reads.
    An edit reruns the stage, a checkout does not (scripts/moult/workflow/code.py). `starts` is a module that it runs in a
    process of its own: what that imports counts too.

    The image that the config names is part of it, with --use-singularity or without, so that runs with it and without it
    agree: a new version or digest reruns the stages, a moved file does not. (Snakemake's own trigger is off: see
    profiles/default. What lies in the file is not looked at: hence the version in its name.)
    """
    texts = [Path(own_file(path)).read_text(encoding="utf-8") for path in data]
    modules = closure(f"{stage}.py", read_own) | (closure(starts, read_own) if starts else {})
    return code_hash(modules, *texts, image_identity())
