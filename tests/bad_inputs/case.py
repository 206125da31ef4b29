"""A case, the sound input that it spoils, and how a stage is run as its rule does it."""

import functools
import json
import re
import resource
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import forked
import yaml
from workflow import FOLDERS, ROOT, write_rows

# In the environment of all cases, as a token: neither console nor log may show it.
SECRET = "correct-horse-battery-staple"

# Sound: 40 rows, the demo's base as `base`, two steps.
ROWS = [{"prompt": f"How many is {n} and {n}, please tell me?", "completion": f"It is {2 * n}."} for n in range(40)]
CONFIG = {
    "model": {"name": "base"},
    "datasets": {"demo": None, "d": {"source": "rows.jsonl", "val_size": 2, "test_size": None}},
    "lora": {"r": 2},
    "train": {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1},
    "eval": {"answer_rows": 2, "max_new_tokens": 4, "resamples": 100, "merge_check_rows": 1},
}
STAGES = {
    "fetch_model": "results/models/org--model.json",
    "inspect_model": "results/models/base-*.json",
    "prepare": "results/prepared/d/metadata.json",
    "encode": "results/d/tokens/report.json",
    "plan": "results/d/plan.json",
    "finetune": "results/d/adapter.json",
    "merge": "results/d/merge.json",
    "evaluate_base": "results/d/base/answers.jsonl",
    "evaluate_tuned": "results/d/tuned/answers.jsonl",
    "score": "results/d/metrics.json",
}


@dataclass
class Case:
    """One bad input.

    name: what is wrong.
    says: all that the user reads. `{folder}` is the working directory; `<...>` stands for what differs between machines.
    config: laid over CONFIG, as a dict or as the text of a YAML file.
    rows: of rows.jsonl, or the file's whole text.
    make: makes or spoils files in the working directory before anything runs.
    spoil: the same, between two stages: before the one that is the `target`.
    target: the stage whose output is asked for. Whichever stage it is that stops, it says so.
    code: exit code.
    environment: variables.
    largest_file: bytes that a file may have, as on a disk that is nearly full.
    in_unit_test: the test of its gate that `make test` has, where the case itself is left to make test-all.
    """

    name: str
    says: str
    config: dict | str = field(default_factory=dict)
    rows: list | str | bytes | None = None
    make: Callable[[Path], None] | None = None
    spoil: Callable[[Path], None] | None = None
    target: str = "plan"
    code: int = 1
    environment: dict = field(default_factory=dict)
    largest_file: int | None = None
    in_unit_test: str = ""

    def stops_in_a_stage(self) -> bool:
        return re.match(r"\w+ (failed|unfinished)", self.says) is not None

    def config_and_target(self) -> tuple[str, str]:
        return self.config if isinstance(self.config, str) else yaml.safe_dump(self.config), self.target

    def lay_out(self, folder: Path) -> None:
        for name in FOLDERS:
            (folder / name).symlink_to(ROOT / name)
        shutil.copy(ROOT / "Snakefile", folder)
        shutil.copytree(ROOT / "config" / "demo" / "base", folder / "base")
        if isinstance(self.rows, bytes):
            (folder / "rows.jsonl").write_bytes(self.rows)
        elif isinstance(self.rows, str):
            (folder / "rows.jsonl").write_text(self.rows)
        else:
            write_rows(folder, ROWS if self.rows is None else self.rows)
        (folder / "mine.yaml").write_text(yaml.safe_dump(CONFIG))
        (folder / "case.yaml").write_text(self.config_and_target()[0])
        if self.make:
            self.make(folder)


# --- running ----------------------------------------------------------------------------------------------------------


def run(case: Case, command: list[str], folder: Path, largest_file: int | None = None) -> tuple[int, str]:
    variables = {"XDG_CACHE_HOME": str(folder / ".cache"), "MOULT_TEST_TOKEN": SECRET, **case.environment}
    limit = largest_file and functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (largest_file, largest_file))
    return forked.run(command, folder, variables, limit)


_JOB = re.compile(r"^(?:local)?rule (\w+):\n((?: {4}[^\n]*\n)+)Shell command:\s*(.*?)\n\s*\n", re.MULTILINE | re.DOTALL)


@dataclass
class End:
    """How a case ended: exit code, what the console showed, the message in it, outputs that must not exist, the log.

    `log` is None where Snakemake itself has stopped.
    """

    code: int
    console: str
    said: str
    outputs: list[Path] = field(default_factory=list)
    log: Path | None = None


def ask_snakemake(case: Case, folder: Path) -> tuple[int, str]:
    """Exit code and console of a dry run, which prints the commands of the jobs."""
    snakemake = ["snakemake", "--cores", "1", "-n", "-p", "--configfile", "mine.yaml", "case.yaml", "--"]
    return run(case, [*snakemake, STAGES[case.target]], folder)


def jobs_in(text: str) -> dict[str, tuple[str, str]]:
    """{rule: (what Snakemake says of the job, its command)}, in the order in which they run."""
    jobs = {name: (job, command) for name, job, command in _JOB.findall(text)}
    return {name: jobs[name] for name in STAGES if name in jobs}


def go(case: Case, folder: Path, asked: dict) -> End:
    """Run the case as a user would.

    Snakemake looks at the input and prints the commands of its jobs; these run one after the other until one fails. The commands
    follow from the config alone, so `asked` keeps what Snakemake has said of each, for the next case that it lets pass.
    """
    key = case.config_and_target()
    code, text = asked[key] if case.stops_in_a_stage() and key in asked else ask_snakemake(case, folder)
    if code:
        return End(code, text, _words_of_snakemake(text, folder))
    asked[key] = code, text
    for name, (job, command) in jobs_in(text).items():
        if case.spoil and name == case.target:
            case.spoil(folder)
        _python, *words = shlex.split(command)
        code, text = run(case, words, folder, case.largest_file)
        if code:
            outputs, log = (re.search(rf"^ +{key}: (.*)$", job, re.MULTILINE).group(1) for key in ("output", "log"))
            return End(
                code, text, _words_of_stage(text, folder), [folder / path for path in outputs.split(", ")], folder / log
            )
    return End(0, text, "")


def _words_of_stage(text: str, folder: Path) -> str:
    """What stands below the stage's progress, without the clock, the run and the name of the log."""
    text = re.sub(r"^\d\d:\d\d:\d\d \w+ +(?:d: )?", "\0", text, flags=re.MULTILINE)
    failed = [part for part in text.split("\0") if part.strip()][-2:]
    said = "".join(part for part in failed if re.match(r"\w+ (failed|unfinished)|what to do|\(log", part))
    return re.sub(r" ?\(log: .*\)\n*$", "", said).replace(str(folder), "{folder}").strip()


def _words_of_snakemake(text: str, folder: Path) -> str:
    """What stands below Snakemake's own lines."""
    said = re.split(r"^(?:WorkflowError.*:|Building DAG of jobs\.\.\.)\n", text, flags=re.MULTILINE)[-1]
    said = re.split(r'^  File "', said, flags=re.MULTILINE)[0]
    return said.replace(str(folder), "{folder}").strip()


# --- spoiling ---------------------------------------------------------------------------------------------------------


def edit_json(path: str, **changes) -> Callable[[Path], None]:
    """Set keys of a JSON file; None takes one out."""

    def edit(folder: Path) -> None:
        content = {**json.loads((folder / path).read_text()), **changes}
        (folder / path).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return edit


def write(path: str, content: str | bytes) -> Callable[[Path], None]:
    def put(folder: Path) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content.encode() if isinstance(content, str) else content)

    return put


def edit_tensors(change: Callable[[dict], None], file: str = "base/model.safetensors") -> Callable[[Path], None]:
    """Change the {name: tensor} of a safetensors file."""

    def edit(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return edit


# --- what is said -----------------------------------------------------------------------------------------------------


def problems(*found: str) -> str:
    """What is said of a config."""
    plural = "s" if len(found) > 1 else ""
    return (
        f"the config has {len(found)} problem{plural}:" + "".join(f"\n  - {problem}" for problem in found) + "\n"
        "  -> fix config/config.yaml or the file given with --configfile; config/README.md lists all keys"
    )
