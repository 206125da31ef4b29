"""eval.benchmarks: what an entry names, where its results go, and what can be wrong with a task of the user's own.

lm-eval lives in an environment of its own, so nothing of it is imported here. Of a task in a file only what Moult must know is
read: which data files it has (the inputs of its rules, and what a container has to see).
"""

import functools
import glob
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from moult.errors import MoultError
from moult.files import sha256_text

# Builders of `datasets` that read local files and run no code of theirs. Any other dataset_path is a name on the hub.
FORMATS = ("arrow", "csv", "json", "parquet", "text")

# Keys of a task that lead out of its file, to what Moult would not notice a change of.
ELSEWHERE = ("class", "group", "include", "task_list")


class Benchmark(NamedTuple):
    """An entry of eval.benchmarks.

    name: in metrics.json: the task, or the name of the file without its ending. slug: of its files below results/.
    task, path: one of the two. limit: the first so many questions of each task; None: all. num_fewshot, metric: None is the
    task's own.
    """

    name: str
    slug: str
    task: str | None
    path: str | None
    limit: int | None
    num_fewshot: int | None
    metric: str | None

    def where(self) -> dict[str, str]:
        """What identifies its questions, whoever asks them."""
        return {"path": self.path} if self.path else {"task": self.task or ""}

    def asked(self) -> dict:
        """What a model's answers depend on."""
        return {**self.where(), "limit": self.limit, "num_fewshot": self.num_fewshot}


def benchmarks_of(run: dict) -> list[Benchmark]:
    """The benchmarks of a run, in the order of the config."""
    return [
        Benchmark(
            name=entry.get("task") or Path(entry["path"]).stem,
            slug=entry.get("task") or _slug(entry["path"]),
            task=entry.get("task"),
            path=entry.get("path"),
            limit=entry.get("limit"),
            num_fewshot=entry.get("num_fewshot"),
            metric=entry.get("metric"),
        )
        for entry in run["eval"]["benchmarks"]
    ]


def benchmarks_by_slug(runs: dict[str, dict]) -> dict[str, dict[str, Benchmark]]:
    """{slug: {run: its entry}} of all runs that ask something."""
    found: dict[str, dict[str, Benchmark]] = {}
    for name, run in runs.items():
        for benchmark in benchmarks_of(run):
            found.setdefault(benchmark.slug, {})[name] = benchmark
    return found


def _slug(path: str) -> str:
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', Path(path).stem)}-{sha256_text(path)[:6]}"


def benchmark_problems(run: dict) -> list[str]:
    """What is wrong with eval.benchmarks, as far as it can be told without lm-eval."""
    entries = run["eval"]["benchmarks"]
    if any(("task" in entry) == ("path" in entry) for entry in entries):
        return ["eval.benchmarks: give each entry either task (a name that lm-eval knows) or path (a task's YAML file)"]
    found = benchmarks_of(run)
    problems = [
        f"eval.benchmarks: {name} is there twice"
        for name, count in Counter(one.name for one in found).items()
        if count > 1
    ]
    for benchmark in found:
        if benchmark.path:
            try:
                files_of(benchmark.path)
            except MoultError as error:
                problems.append(f"eval.benchmarks: {error.what}; {error.fix}")
    return problems


def files_of(path: str) -> list[str]:
    """The file of a task and the local files with its questions. Raises MoultError if it is no task that Moult can run."""
    task = read_task(path)
    source = task.get("dataset_path")
    if not isinstance(source, str):
        raise MoultError(
            f"{path}: no dataset_path", "give json (with dataset_kwargs.data_files), or a dataset of the hub"
        )
    if source not in FORMATS:
        return [path]
    given = (task.get("dataset_kwargs") or {}).get("data_files")
    patterns = [file for one in (given.values() if isinstance(given, dict) else [given]) for file in _listed(one)]
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise MoultError(
            f"{path}: dataset_path is {source}, and there are no data files",
            "name them: dataset_kwargs: {data_files: {test: questions.jsonl}}",
        )
    files = [path]
    for pattern in patterns:
        matched = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 (as `datasets` does it)
        if not matched:
            raise MoultError(f"{path}: {pattern} does not exist", "data files are relative to the working directory")
        files += matched
    return files


def read_task(path: str) -> dict:
    """A task's YAML. Raises MoultError for what leads out of the file, for lists of tasks, and for code."""
    return _read_task(path, Path(path).stat().st_mtime_ns if Path(path).is_file() else None)


@functools.lru_cache
def _read_task(path: str, modified: int | None) -> dict:
    import yaml

    if modified is None:
        raise MoultError(f"{path} does not exist", "give the path of a task's YAML file, or a task that lm-eval knows")
    try:
        task = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.constructor.ConstructorError as error:
        place = f"{path}:{error.problem_mark.line + 1}" if error.problem_mark else path
        raise MoultError(
            f"{place}: runs Python of its own (!function), and Moult runs none",
            "write it with Jinja, and with the filters and metrics of lm-eval",
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MoultError(f"{path}: not YAML ({' '.join(str(error).split())[:200]})", "fix it") from None
    if not isinstance(task, dict) or not isinstance(task.get("task"), str):
        raise MoultError(f"{path}: not a task of lm-eval: it has no name (task: my_task)", "add the name")
    if elsewhere := [key for key in ELSEWHERE if key in task]:
        raise MoultError(f"{path}: {elsewhere[0]} leads to another file", "write the whole task into this one")
    if task.get("unsafe_code"):
        raise MoultError(f"{path}: unsafe_code runs what a model writes", "leave the task out")
    return task


def _listed(value) -> list:
    return value if isinstance(value, list) else [value] if value is not None else []
