"""All of Moult on one GPU, in 25 minutes: is it right, does it fit as predicted, how fast is it?

    python tests/gpu/benchmark.py --out /tmp/gpu                                   # needs envs/train.txt and one GPU
    python tests/gpu/benchmark.py --out /tmp/gpu --vllm-python /opt/vllm/bin/python   # serves as well
    python tests/gpu/benchmark.py --out /tmp/cpu --tiny                            # the same script on a CPU: tries the script

It downloads nothing: two models of random weights, in the shape of Qwen3-0.6B and Qwen3-8B, and rows made of the demo's words.
Each case is a process of its own. A case that does not fit the card is skipped, one that fails does not stop the others, and no
case starts after --minutes. After each, /tmp/gpu/result.json and result.md are written: please send result.json to us.
--write puts the table into BENCHMARKS.md.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "tools"))

from gpu_figures import table, write_into
from recipe_tables import SHAPES
from trainings import LARGE_BATCH, SMALL_BATCH, TINY, TRAININGS, Training, made_up_rows
from watch import Watch, timed_lines

from moult.errors import HOPELESS
from moult.files import canonical, read_json, read_jsonl, write_json, write_jsonl
from moult.model.manifest import describe
from moult.workflow.config import load_schema, resolve
from moult.workflow.stages import stage_settings

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"

Case = tuple[str, Callable[[], dict]]


class Skipped(Exception):
    """A case that cannot be run here, and why."""


class Failed(Exception):
    """A command that failed, and the end of what it said."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to work in: 25 GB")
    parser.add_argument("--minutes", type=float, default=25, help="no case starts after these")
    parser.add_argument(
        "--steps", type=int, default=40, help="training steps of the small model; the large one has a half"
    )
    parser.add_argument("--vllm-python", help="Python of an environment with vLLM; without it, transformers serves")
    parser.add_argument("--tiny", action="store_true", help="tiny models and few rows, also without a GPU")
    parser.add_argument("--write", action="store_true", help="put the table into BENCHMARKS.md")
    args = parser.parse_args()
    bench = Bench(args)
    for chains in bench.groups():
        bench.do_beside(chains)
    print(table(bench.result))
    if args.write:
        write_into(ROOT / "BENCHMARKS.md", table(bench.result))
    print(f"\nAll figures are in {bench.result_file}. Please send us this file.")


class Bench:
    """The state of the benchmark: where things are, how much time is left, what was found."""

    def __init__(self, args):
        self.args, self.out, self.tiny = args, args.out.resolve(), args.tiny
        self.out.mkdir(parents=True, exist_ok=True)
        self.result_file = self.out / "result.json"
        self.started, self.lock = time.monotonic(), threading.Lock()
        self.result: dict = {"schema_version": 1, "machine": self.probe("machine"), "tiny": args.tiny, "cases": {}}

    def cases(self) -> list[Case]:
        return [case for chains in self.groups() for chain in chains for case in chain]

    def groups(self) -> list[list[list[Case]]]:
        """In the order of what a reader wants to know first. The chains of a group run beside each other: what measures speed or
        memory has a group of its own. --tiny leaves out the large model, which would be the same."""
        train = {
            case.name: (case.name, lambda case=case: self.train(case))
            for case in TRAININGS
            if not (self.tiny and case.model == "large")
        }
        validations = [
            (
                f"validation, {model}, {length // 1024}k",
                lambda model=model, length=length: self.validation(model, length),
            )
            for model in (["small"] if self.tiny else ["large", "small"])
            for length in (8192, 32768)
        ]
        large: list[Case] = [
            ("model, large", lambda: self.make_model("large")),
            ("plans, large", lambda: self.make_plans("large")),
        ]
        finished: list[Case] = [
            ("merge", lambda: self.merge("padding-free")),
            ("evaluate and merge check", lambda: self.evaluate("padding-free")),
            ("serve", lambda: self.serve("padding-free")),
        ]
        small: list[Case] = [
            ("model, small", lambda: self.make_model("small")),
            ("data", self.make_data),
            ("plans, small", lambda: self.make_plans("small")),
            ("attention", self.attention),
            *(train.pop(name) for name in ("padding-free", "padded")),
            ("TRL's own script", lambda: self.trl("small", "padded")),
            train.pop("packed"),
        ]
        more: list[Case] = [("out of memory", self.out_of_memory)]
        if not self.tiny:
            more += [train.pop(case.name) for case in TRAININGS if case.model == "large"]
            more.append(("TRL's own script, 8 B", lambda: self.trl("large", "8 B, packed, checkpointed")))
        return [
            *([[case]] for case in small),
            [[("resume", self.resume)], finished, [] if self.tiny else large],
            *([[case]] for case in [*more, *validations, *train.values()]),
        ]

    def do_beside(self, chains: list[list[Case]]) -> None:
        def in_turn(chain: list[Case]) -> None:
            for name, case in chain:
                self.do(name, case)

        with ThreadPoolExecutor(len(chains)) as pool:
            list(pool.map(in_turn, chains))

    def do(self, name: str, case: Callable[[], dict]) -> None:
        """Run a case and keep what it found, whatever happens."""
        minutes = (time.monotonic() - self.started) / 60
        started, found = time.monotonic(), {}
        if minutes > self.args.minutes:
            found = {"status": "no time"}
        else:
            print(f"[{minutes:4.1f} min] {name} ...", flush=True)
            try:
                found = {"status": "done", **case()}
            except Skipped as why:
                found = {"status": "skipped", "why": str(why)}
            except Failed as why:
                found = {"status": "failed", "why": str(why)}
            found["wall_seconds"] = time.monotonic() - started
        if found["status"] != "done":
            print(f"           {found['status']}: {found.get('why', '')[-300:]}", flush=True)
        with self.lock:
            self.result["cases"][name] = found
            write_json(self.result_file, self.result)
            (self.out / "result.md").write_text(table(self.result) + "\n", encoding="utf-8")

    # --- commands ---

    def run(self, *command, name: str = "command") -> str:
        """What the command prints. Raises Failed if it fails, or takes longer than is left and ten minutes."""
        left, log = self.left(), self.log_of(name)
        words = [sys.executable, *map(str, command)]
        with log.open("w") as file:
            try:
                done = subprocess.run(words, stdout=subprocess.PIPE, stderr=file, text=True, timeout=left, cwd=self.out)
            except subprocess.TimeoutExpired:
                raise Failed(f"took more than {left:.0f} s") from None
        if done.returncode:
            said = f"{log.read_text(errors='replace')}\n{done.stdout}".strip()
            raise Failed(f"exit code {done.returncode}: {said[-2000:]}")
        return done.stdout

    def probe(self, part: str, *options) -> dict:
        said = self.run(ROOT / "tests" / "gpu" / "probe.py", part, *options, name=f"probe {part}")
        return json.loads(said.strip().splitlines()[-1])

    def stage(self, script: str, *options, case: str) -> None:
        self.run(
            SCRIPTS / f"{script}.py", *options, "--log-file", self.stage_log(case, script), name=f"{case} {script}"
        )

    def stage_log(self, case: str, script: str) -> Path:
        return self.out / "logs" / f"{self.folder(case).name}-{script}.log"

    def log_of(self, name: str) -> Path:
        return self.out / f"{self.folder(name).name}.log"

    def left(self) -> float:
        """Seconds that a command may take."""
        return max(60.0, self.args.minutes * 60 - (time.monotonic() - self.started)) + 600

    def need(self, *names: str) -> None:
        """Raises Skipped if a case that this one builds on has not come out."""
        for name in names:
            if self.result["cases"].get(name, {}).get("status") != "done":
                raise Skipped(f"'{name}' has not come out")

    # --- what the cases share ---

    def base(self, model: str) -> Path:
        """Its folder; the manifest beside it is what a stage reads, which would else hash 16 GB each time."""
        return self.out / f"{model}-base"

    def manifest(self, model: str) -> Path:
        return self.out / f"{model}-base.json"

    def make_model(self, model: str) -> dict:
        shape = TINY if self.tiny else SHAPES["Qwen/Qwen3-8B" if model == "large" else "Qwen/Qwen3-0.6B"]
        memory = self.result["machine"].get("memory", 0)
        if model == "large" and memory < 15e9:
            raise Skipped("the card is too small for 8 B, even in 4 bits")
        found = self.probe("model", "--shape", json.dumps(shape), "--out", self.base(model))
        write_json(self.manifest(model), describe(self.base(model), f"{model}-base", trust_remote_code=False))
        return found

    def make_data(self) -> dict:
        self.need("model, small")
        rows = 120 if self.tiny else 2000
        write_jsonl(self.out / "rows.jsonl", made_up_rows(rows))
        prepared = self.out / "prepared"
        files = (
            "--train",
            prepared / "train.jsonl",
            "--val",
            prepared / "val.jsonl",
            "--test",
            prepared / "test.jsonl",
        )
        options = ("--settings", self.settings("prepare", "small"), *files, "--metadata", prepared / "metadata.json")
        self.stage("prepare", *options, case="data")
        tokens = ("--out", self.out / "tokens", "--threads", 4)
        options = ("--settings", self.settings("encode", "small"), "--model", self.manifest("small"), *files, *tokens)
        self.stage("encode", *options, case="data")
        (self.out / "for-trl").mkdir(exist_ok=True)
        write_jsonl(
            self.out / "for-trl" / "train.jsonl",
            ({"messages": row["messages"]} for row in read_jsonl(prepared / "train.jsonl")),
        )
        report = read_json(self.out / "tokens" / "report.json")
        return {"sequences": report["train"]["sequences"], "tokens": report["train"]["tokens"]}

    def train_settings(self, model: str, changes: dict) -> dict:
        steps = 6 if self.tiny else self.args.steps // (2 if model == "large" else 1)
        own = {"max_steps": steps, "eval_steps": 0.5, "save_steps": 0.25, "logging_steps": 1 if self.tiny else 2}
        batch = LARGE_BATCH if model == "large" else SMALL_BATCH
        if self.tiny:
            batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
        return {**own, **batch, **changes}

    def settings(self, stage: str, model: str, train: dict | None = None, quantization: str | None = None) -> str:
        """What the rule of a stage would pass it."""
        dataset = {"source": str(self.out / "rows.jsonl"), "max_length": 1024, "max_token_loss": 0.5, "val_size": 0.05}
        config = {
            "model": {"name": str(self.base(model)), "quantization": quantization},
            "datasets": {"rows": dataset},
            "train": self.train_settings(model, train or {}),
            "eval": {"answer_rows": 16, "max_new_tokens": 32},
            "serve": {"engine": "vllm" if self.args.vllm_python else "transformers", "python": self.args.vllm_python},
        }
        return canonical(stage_settings(resolve(config, load_schema(str(ROOT / "config"))), stage, "rows"))

    def make_plans(self, model: str) -> dict:
        """plan.json of each training; of those that the plan refuses because they cannot fit, what it says."""
        self.need(f"model, {model}", "data")
        cases = [case for case in TRAININGS if case.model == model]
        with ThreadPoolExecutor(4) as pool:
            said = dict(zip([case.name for case in cases], pool.map(self.plan, cases), strict=True))
        return {"refused": {name: why for name, why in said.items() if why}}

    def plan(self, case: Training) -> str | None:
        folder = self.folder(case.name)
        folder.mkdir(exist_ok=True)
        options = ("--model", self.manifest(case.model), "--tokens", self.out / "tokens", "--out", folder / "plan.json")
        settings = self.settings("plan", case.model, case.train, case.quantization)
        try:
            self.stage("plan", "--settings", settings, *options, case=case.name)
        except Failed as why:
            if unfit := re.search(r"this run needs about[^:]*", str(why)):
                return unfit[0]
            raise
        return None

    def finetune_options(self, case: Training, folder: Path) -> list:
        return [
            *("--settings", self.settings("finetune", case.model, case.train, case.quantization)),
            *("--model", self.manifest(case.model), "--tokens", self.out / "tokens", "--plan", folder / "plan.json"),
            *("--state", folder / "state", "--adapter", folder / "adapter", "--summary", folder / "adapter.json"),
            *("--training-log", folder / "training_log.jsonl", "--threads", min(8, os.cpu_count() or 1)),
        ]

    def folder(self, name: str) -> Path:
        return self.out / re.sub(r"[^a-z0-9]+", "-", name.lower())

    # --- the cases ---

    def train(self, case: Training) -> dict:
        self.need(f"plans, {case.model}")
        if unfit := self.result["cases"][f"plans, {case.model}"]["refused"].get(case.name):
            raise Skipped(f"does not fit: {unfit}")
        folder = self.folder(case.name)
        memory = read_json(folder / "plan.json")["memory"]
        with Watch() as watch:
            self.stage("finetune", *self.finetune_options(case, folder), case=case.name)
        history = list(read_jsonl(folder / "training_log.jsonl"))
        lines = [entry for entry in history if "tokens_per_second" in entry][1:]
        said = self.stage_log(case.name, "finetune").read_text(errors="replace")
        checkpointed = "turning gradient checkpointing on" in said
        if case.train.get("gradient_checkpointing"):
            checkpointed = True
        key = "total_with_gradient_checkpointing" if checkpointed else "total"
        like = {"padded": "padding-free"}.get(case.name)  # the same rows in the same order
        return {
            **({f"compared with {like}": self.compared(like, case.name)} if like else {}),
            **{
                name: middle([line[name] for line in lines if name in line])
                for name in ("tokens_per_second", "mfu", "tflops")
            },
            "peak_allocated": max((entry.get("peak_memory_allocated", 0) for entry in history), default=0) or None,
            "peak_reserved": max((entry.get("peak_memory_reserved", 0) for entry in history), default=0) or None,
            "peak_used": watch.peak,
            "predicted": memory[key],
            "checkpointed": checkpointed,
            "plan": memory,
            "losses": [entry["loss"] for entry in history if "loss" in entry],
        }

    def trl(self, model: str, like: str) -> dict:
        """`trl sft` with TRL's defaults, besides what makes it the same work: LoRA, batch, steps, dtype.

        Without checkpointing it takes 1.6 times the memory that Moult does: the same rows for a step, in two parts.
        """
        self.need(f"model, {model}", "data")
        case = next(case for case in TRAININGS if case.name == like)
        train = self.train_settings(model, case.train)
        out = self.folder(f"trl {model}")
        checkpointed = case.train.get("gradient_checkpointing", False)
        half, parts = self.result["machine"]["device"] == "cuda", 1 if checkpointed else 2
        options = {
            "model_name_or_path": self.base(model),
            "dataset_name": self.out / "for-trl",
            "output_dir": out,
            "max_steps": train["max_steps"],
            "per_device_train_batch_size": train["per_device_train_batch_size"] // parts,
            "gradient_accumulation_steps": train["gradient_accumulation_steps"] * parts,
            "learning_rate": 2e-4,
            "lora_r": 16,
            "lora_alpha": 32,
            "lora_target_modules": "all-linear",
            "dtype": "bfloat16" if half else "float32",
            "bf16": half,
            "gradient_checkpointing": checkpointed,
            "logging_steps": train["logging_steps"],
            "save_steps": train["max_steps"],
            "report_to": "none",
        }
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        with Watch() as watch:
            command = [sys.executable, "-u", "-m", "trl.scripts.sft", *map(str, words), "--use_peft"]
            code, lines = timed_lines(command, self.log_of(f"trl {model}"), self.out, self.left())
        if code:
            raise Failed(f"exit code {code}: {self.log_of(f'trl {model}').read_text(errors='replace').strip()[-2000:]}")
        # As Moult measures: between two lines of the log, and the middle of these, without the first.
        logged = [
            (second, float(re.search(r"'num_tokens': '?([\d.e+]+)", line)[1]))
            for second, line in lines
            if "{'loss'" in line
        ]
        speeds = [(after[1] - before[1]) / (after[0] - before[0]) for before, after in pairwise(logged)]
        return {"tokens_per_second": middle(speeds), "peak_used": watch.peak, "checkpointed": checkpointed}

    def resume(self) -> dict:
        """Stop the packed run in the middle, go on, and compare with the undisturbed one."""
        self.need("packed")
        case = next(case for case in TRAININGS if case.name == "packed")
        folder = self.folder("resumed")
        folder.mkdir(exist_ok=True)
        shutil.copy(self.folder("packed") / "plan.json", folder)
        options = self.finetune_options(case, folder)
        command = [sys.executable, str(SCRIPTS / "finetune.py"), *map(str, options)]
        with (self.out / "resume.log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.out)
            lines = folder / "state" / "training_log.jsonl"
            while process.poll() is None and (not lines.exists() or len(lines.read_text().splitlines()) < 2):
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            stopped = process.wait(600)
        self.stage("finetune", *options, case="resumed")
        return {"exit_code": stopped, **self.compared("packed", "resumed")}

    def compared(self, one: str, other: str) -> dict:
        """Two trainings of the same rows in the same order: whether they were, and how far their losses are apart."""
        folders = [self.folder(name) for name in (one, other)]
        first, second = (
            [entry for entry in read_jsonl(folder / "training_log.jsonl") if "loss" in entry] for folder in folders
        )
        pairs = list(zip(first, second, strict=True))
        files = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in folders]
        return {
            "same_rows": all(mine["num_tokens"] == yours["num_tokens"] for mine, yours in pairs),
            "same_bytes": files[0] == files[1],
            "largest_difference_of_losses": max(abs(mine["loss"] - yours["loss"]) for mine, yours in pairs),
        }

    def attention(self) -> dict:
        """The attention of rows without padding, against plain torch in float64."""
        if self.result["machine"]["device"] != "cuda":
            raise Skipped("the kernel is for CUDA")
        return self.probe("attention")

    def out_of_memory(self) -> dict:
        """A batch that cannot fit: how finetune ends, and what it says."""
        if self.result["machine"]["device"] != "cuda":
            raise Skipped("a CPU would take the memory of the whole machine")
        self.need("packed")
        huge = {"packing": True, "per_device_train_batch_size": 4096, "gradient_checkpointing": False}
        case, folder = Training("huge", "small", huge), self.folder("huge")
        folder.mkdir(exist_ok=True)
        shutil.copy(self.folder("packed") / "plan.json", folder)
        options = self.finetune_options(case, folder)
        command = [sys.executable, SCRIPTS / "finetune.py", *options]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=self.left())
        if done.returncode != HOPELESS:
            raise Failed(f"exit code {done.returncode}: {done.stderr[-2000:]}")
        return {"exit_code": done.returncode, "said": " ".join(done.stderr.split())[-700:]}

    def merge(self, name: str) -> dict:
        self.need(name)
        folder, started = self.folder(name), time.monotonic()
        read = ("--model", self.manifest("small"), "--plan", folder / "plan.json", "--tokens", self.out / "tokens")
        write = ("--adapter", folder / "adapter", "--merged", folder / "merged", "--summary", folder / "merge.json")
        self.stage("merge", "--settings", self.settings("merge", "small"), *read, *write, "--threads", 4, case="merge")
        return {"seconds": time.monotonic() - started, "how": read_json(folder / "merge.json")["how"]}

    def evaluate(self, name: str) -> dict:
        self.need("merge")
        folder, started = self.folder(name), time.monotonic()
        (folder / "tuned").mkdir(exist_ok=True)
        check = folder / "tuned" / "merge_check.json"
        self.stage(
            "evaluate_model",
            *("--settings", self.settings("evaluate_tuned", "small"), "--model", folder / "merged"),
            *("--tokens", self.out / "tokens", "--likelihood", folder / "tuned" / "likelihood.jsonl"),
            *("--answers", folder / "tuned" / "answers.jsonl", "--general", folder / "tuned" / "general.jsonl"),
            *("--kept", folder / "tuned" / "kept", "--base", self.manifest("small")),
            *("--adapter", folder / "adapter", "--merge-check", check, "--threads", 4),
            case="evaluate",
        )
        found = {key: value for key, value in read_json(check).items() if isinstance(value, int | float | str)}
        return {"seconds": time.monotonic() - started, "merge_check": found}

    def validation(self, model: str, length: int) -> dict:
        self.need(f"model, {model}")
        length = length // 256 if self.tiny else length
        return self.probe("validation", "--model", self.base(model), "--length", length)

    def serve(self, name: str) -> dict:
        self.need("evaluate and merge check")
        folder, started = self.folder(name), time.monotonic()
        self.stage(
            "smoke_test",
            *("--run", "rows", "--settings", self.settings("smoke_test", "small"), "--base", self.manifest("small")),
            *("--answers", folder / "tuned" / "answers.jsonl", "--merge-check", folder / "tuned" / "merge_check.json"),
            *(
                "--rows",
                self.out / "prepared" / "test.jsonl",
                "--adapter",
                folder / "adapter",
                "--merged",
                folder / "merged",
            ),
            *("--merge", folder / "merge.json", "--plan", folder / "plan.json", "--result", folder / "smoke_test.json"),
            *("--threads", 4),
            case="serve",
        )
        result = read_json(folder / "smoke_test.json")
        checks = {check: outcome["passed"] for check, outcome in result["checks"].items()}
        return {
            "seconds": time.monotonic() - started,
            "engine": result["engine"],
            "checks": checks,
            "speed": result["speed"],
        }


def middle(numbers: list[float]) -> float | None:
    return sorted(numbers)[len(numbers) // 2] if numbers else None


if __name__ == "__main__":
    main()
