"""Kill the workflow at random instants, give the same command again until it ends, and compare with an undisturbed run.

    python tests/torture/torture.py --kills 200 --seed 0 --out table.md

Works in a copy of the checkout, on the demo's data and base, shortened. A round goes through the whole workflow with up to
ten kills: the stage, the instant, the victim (the stage, Snakemake, or both) and the signal are drawn from the round's
seed. Half of the instants are times, the other half the n-th change of a file. A round has survived if

- each command that was not killed ends well, and nothing of a killed one lives on;
- results/ holds the files of the undisturbed run, with the same bytes, and nothing is left to do;
- no half-written file, no lock, no state that was moved aside is left, and no log is lost.

A failure prints what reproduces it, and keeps the round's folder. Exit code: 0 if all rounds have survived, otherwise 1.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from watching import STAGES, Changes, Command, processes_in, say
from workflow import checkout

from moult.training.throughput import SPEED

KILLS_PER_ROUND = 10
PATIENCE = 120  # seconds for what was killed to end; a trainer may be saving
GRACE = 30  # seconds from SIGTERM or SIGINT to SIGKILL, as Slurm's KillWait

# Each has its own undisturbed run to be compared with.
VARIANTS = {
    "best": {},
    "best, packed": {"packing": True},
    "last": {"load_best_model_at_end": False, "eval_strategy": "epoch", "save_strategy": "epoch"},
    "last, packed": {"load_best_model_at_end": False, "packing": True},
}
STEPS, SAVE_STEPS = 60, 6
CONFIG = {
    "datasets": {"demo": {"max_rows": 200, "max_length": 128}},
    "runs": {
        "demo": {
            "lora": {"lora_dropout": 0.1},
            "train": {
                "max_steps": STEPS,
                "save_steps": SAVE_STEPS,
                "eval_steps": 10,
                "logging_steps": 1,
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 2,
            },
            "eval": {"answer_rows": 4, "max_new_tokens": 8, "resamples": 200},
        }
    },
}

# What a round's kills are drawn from. Most is at stake in finetune.
DECK = ["snakemake", *STAGES.values(), "evaluate", *["finetune"] * 4]


class Failure(Exception):
    """A promise that was broken."""


@dataclass(eq=False)
class Kill:
    """One kill: when it is due (`fraction` of the stage's time, or of its changes of files), whom it hits, and how."""

    stage: str
    fraction: float
    at_change: bool
    victim: str
    number: signal.Signals
    hurry: bool  # the next command does not wait for what is left of the killed one
    landed_in: str = ""
    reached: int | None = None  # the step of training, if it was at work
    attempts: set[str] = field(default_factory=set)  # logs of finetune until then
    lost: int | None = None
    hung: bool = False  # it did not end within GRACE


def draw(rng: random.Random, count: int) -> list[Kill]:
    return [
        Kill(
            stage=stage,
            fraction=rng.random(),
            at_change=rng.random() < 0.5,
            victim=rng.choice(["stage", "snakemake", "both"]),
            number=rng.choices([signal.SIGKILL, signal.SIGTERM, signal.SIGINT], [0.7, 0.15, 0.15])[0],
            hurry=rng.random() < 0.3,
        )
        for stage in rng.sample(DECK, count)
    ]


# --- the undisturbed run ----------------------------------------------------------------------------------------------


@dataclass
class Reference:
    folder: Path
    seconds: dict[str, float]  # of each stage, until the next one starts
    changes: dict[str, int]


def make_folder(folder: Path, source: Path, variant: str) -> Path:
    """A checkout to run `variant` in. `source` is one that nobody edits meanwhile."""
    shutil.copytree(source, folder)
    config = json.loads(json.dumps(CONFIG))
    config["runs"]["demo"]["train"].update(VARIANTS[variant])
    (folder / "torture.yaml").write_text(yaml.safe_dump(config))
    return folder


def run_undisturbed(folder: Path) -> Reference:
    command = Command(folder)
    seconds, counts = {}, {}
    stage, started, changes = "snakemake", command.started, Changes(folder)
    try:
        while command.process.poll() is None:
            changes.update()
            if command.look() != stage:
                seconds[stage], counts[stage] = command.stage_started - started, changes.count
                stage, started, changes = command.stage, command.stage_started, Changes(folder)
            time.sleep(0.002)
    finally:
        end_all(folder)
    seconds[stage], counts[stage] = time.time() - started, changes.count
    if command.process.returncode:
        raise SystemExit(f"the undisturbed run has failed; its output is in {folder / 'output.txt'}")
    return Reference(folder, seconds, counts)


# --- one round --------------------------------------------------------------------------------------------------------


def torture(folder: Path, reference: Reference, pending: list[Kill], rng: random.Random, tell) -> list[Kill]:
    """Run the workflow in `folder` until it ends, with the kills in `pending`. Returns those that have landed.

    Raises Failure at the first promise that is broken.
    """
    landed: list[Kill] = []
    logs: dict[str, int] = {}
    while True:
        command = Command(folder)
        hurry = False
        try:
            kill = wait_for_kill(command, reference, pending, rng)
            if kill is None:
                break
            hurry = kill.hurry and kill.number == signal.SIGKILL and kill.victim == "snakemake"
            kill.landed_in = command.look()
            say(folder, f"{kill.number.name} to {kill.victim} in {kill.landed_in}{', next at once' if hurry else ''}")
            landed.append(kill)
            pending.remove(kill)
            command.send(kill.victim, kill.number)
            wait_for_end(command, kill, none_left=not hurry)
            if kill.landed_in == "finetune":
                kill.reached = step_reached(folder, command.stage_started)
                kill.attempts = set(attempts(folder, "finetune"))
        finally:
            if not hurry:
                end_all(folder)
        lost = {name for name, size in logs.items() if attempts(folder).get(name, -1) < size}
        if lost:
            raise Failure(f"logs lost: {', '.join(sorted(lost))}")
        logs = attempts(folder)
        tell()
    check(folder, reference)
    measure_loss(folder, landed)
    return landed


def wait_for_kill(command: Command, reference: Reference, pending: list[Kill], rng: random.Random) -> Kill | None:
    """Wait until one of `pending` is due. None if the workflow has ended before. Raises Failure if it has failed."""
    seen, due, changes = None, None, None
    no_start = rng.random() < 0.5  # otherwise the first commands would be killed while they start, and no other
    while command.process.poll() is None:
        stage = command.look()
        if stage != seen:
            seen, changes = stage, Changes(command.folder)
            if due is not None and due.at_change:
                return due  # fewer changes than in the undisturbed run
            if due is None and not (stage == "snakemake" and no_start):
                due = next((kill for kill in pending if kill.stage == stage), None)
                started = command.stage_started
        if due is not None and due.at_change:
            if changes.update() >= due.fraction * reference.changes[due.stage]:
                return due
        elif due is not None and time.time() - started >= due.fraction * reference.seconds[due.stage]:
            return due
        time.sleep(0.002)
    if command.process.returncode:
        raise Failure(f"a command that nobody has killed ended with {command.process.returncode} ({command.look()})")
    return None


def wait_for_end(command: Command, kill: Kill, none_left: bool) -> None:
    """Wait for the killed command, and for all that it has started. Raises Failure if something lives on."""
    try:
        command.process.wait(GRACE)
    except subprocess.TimeoutExpired:
        # Snakemake's handler of SIGTERM takes a lock that the main thread, which it interrupts, may hold (9.27,
        # JobScheduler.exit_gracefully): then it hangs.
        kill.hung = True
        os.killpg(command.process.pid, signal.SIGKILL)
        command.process.wait()
    deadline = time.time() + PATIENCE
    while none_left and (left := processes_in(command.folder)):
        if time.time() > deadline:
            raise Failure(f"lives on after the kill: {[process.cmdline()[:3] for process in left]}")
        time.sleep(0.1)


def end_all(folder: Path) -> None:
    for process in processes_in(folder):
        process.kill()


# --- what must hold ---------------------------------------------------------------------------------------------------


def published(folder: Path) -> dict[str, bytes]:
    """{path: content} of results/ without the checkpoints, and without what differs between equal runs."""
    found = {}
    for path in sorted((folder / "results").rglob("*")):
        name = path.relative_to(folder / "results").as_posix()
        if path.is_file() and "trainer_state/" not in name:
            found[name] = path.read_bytes()
            if path.name == "training_log.jsonl":
                rows = [json.loads(line) for line in path.read_text().splitlines()]
                kept = [{key: value for key, value in row.items() if key not in SPEED} for row in rows]
                found[name] = json.dumps(kept).encode()
            elif path.name in ("adapter.json", "metrics.json"):
                content = json.loads(path.read_text())
                del content["throughput"]
                found[name] = json.dumps(content).encode()
    return found


def attempts(folder: Path, stage: str = "*") -> dict[str, int]:
    """{path: size} of what each attempt has logged."""
    logs = sorted((folder / "logs").glob(f"*/attempts/{stage}-*.log"))
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in logs}


def names(folder: Path) -> set[str]:
    # No benchmarks: Snakemake writes one when a stage has ended, and one that was killed meanwhile does not.
    found = [path for path in (folder / "logs").glob("*/*") if path.is_file()]
    return {path.relative_to(folder).as_posix() for path in found}


def check(folder: Path, reference: Reference) -> None:
    """Raises Failure if the finished run in `folder` differs from the undisturbed one."""
    left = [path for path in folder.rglob("*") if ".tmp-" in path.name]
    state = folder / "results/demo/trainer_state"
    left += [*state.glob("staging"), *state.glob("old-*"), *state.glob("broken-*")]
    left += [path for name in ("locks", "incomplete") for path in (folder / ".snakemake" / name).glob("*")]
    if left:
        raise Failure(f"left over: {', '.join(path.relative_to(folder).as_posix() for path in left)}")
    ours, theirs = published(folder), published(reference.folder)
    for what, wrong in (
        ("missing", theirs.keys() - ours.keys()),
        ("not in the undisturbed run", ours.keys() - theirs.keys()),
        ("other bytes", {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]}),
        ("missing", names(reference.folder) - names(folder)),
    ):
        if wrong:
            raise Failure(f"{what}: {', '.join(sorted(wrong))}")
    again = Command(folder)
    again.process.wait()
    if again.process.returncode or "Nothing to be done" not in (folder / "output.txt").read_text()[-2000:]:
        raise Failure("the finished run has something left to do")


# --- work lost --------------------------------------------------------------------------------------------------------


def step_reached(folder: Path, started: float) -> int | None:
    """The last step that the killed attempt has logged. None if it had not begun to train."""
    path = folder / "results/demo/trainer_state/training_log.jsonl"
    if not path.exists() or path.stat().st_mtime < started:
        return None
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
    return json.loads(lines[-1])["step"] if lines else 0


def measure_loss(folder: Path, landed: list[Kill]) -> None:
    """Fill in the steps that each kill has cost: those that the next attempt has trained again."""
    begun = {}
    for name in sorted(attempts(folder, "finetune"), key=lambda name: (folder / name).stat().st_mtime):
        text = (folder / name).read_text()
        if found := re.search(r"checkpoint-(\d+)(?:, of| is the last step)", text):
            begun[name] = int(found[1])
        elif "training on" in text:
            begun[name] = 0
    for kill in landed:
        if kill.reached is not None:
            later = [step for name, step in begun.items() if name not in kill.attempts]
            kill.lost = max(0, kill.reached - later[0]) if later else 0


# --- the report -------------------------------------------------------------------------------------------------------


@dataclass
class Round:
    seed: int
    variant: str
    kills: list[Kill]
    failure: str = ""


def report(rounds: list[Round], seconds: float) -> str:
    kills = [kill for each in rounds for kill in each.kills]
    survived = [kill for each in rounds if not each.failure for kill in each.kills]
    lost = [kill.lost for kill in survived if kill.lost is not None]
    lines = [
        "| | |",
        "|---|---|",
        f"| kills survived | **{len(survived)} of {len(kills)}** |",
        f"| rounds of the whole workflow | {len(rounds)} (seeds {rounds[0].seed} to {rounds[-1].seed}) |",
        f"| signals | {counts(kill.number.name for kill in kills)} |",
        f"| victims | {counts(kill.victim for kill in kills)} |",
        f"| variants | {counts(each.variant for each in rounds)} |",
        f"| had to be killed {GRACE} s after SIGTERM or SIGINT | {sum(kill.hung for kill in kills)} |",
        f"| seconds per kill | {seconds / max(1, len(kills)):.1f} |",
    ]
    if lost:
        lines.append(
            f"| steps lost, of {STEPS}, in {len(lost)} kills while training | "
            f"median {statistics.median(lost):g}, largest {max(lost)} (a checkpoint every {SAVE_STEPS}; in `last` every epoch) |"
        )
    lines += ["", "| stage | kills | survived |", "|---|---|---|"]
    for stage in dict.fromkeys(DECK):
        here = [kill for kill in kills if kill.landed_in == stage]
        lines.append(f"| {stage} | {len(here)} | {sum(kill in survived for kill in here)} |")
    failed = [each for each in rounds if each.failure]
    if failed:
        lines += ["", "| failed round | variant | what |", "|---|---|---|"]
        for each in failed:
            lines.append(f"| `--seed {each.seed} --kills {len(each.kills)}` | {each.variant} | {each.failure} |")
    return "\n".join(lines) + "\n"


def counts(values) -> str:
    return ", ".join(f"{name} {count}" for name, count in Counter(values).most_common())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first round; the next has the next one")
    parser.add_argument("--out", type=Path, help="write the table to this file, too")
    args = parser.parse_args()

    work = Path(tempfile.mkdtemp(prefix="torture-")).resolve()
    source = work / "checkout"
    source.mkdir()
    checkout(source)
    references: dict[str, Reference] = {}
    rounds: list[Round] = []
    started = time.monotonic()
    with tqdm(total=args.kills, unit="kill") as bar:
        while bar.n < args.kills:
            seed = args.seed + len(rounds)
            variant = list(VARIANTS)[seed % len(VARIANTS)]
            if variant not in references:
                bar.set_postfix_str(f"undisturbed: {variant}")
                folder = make_folder(work / f"undisturbed-{len(references)}", source, variant)
                references[variant] = run_undisturbed(folder)
            rng = random.Random(seed)
            drawn = draw(rng, min(KILLS_PER_ROUND, args.kills - bar.n))
            this = Round(seed, variant, [])
            rounds.append(this)
            bar.set_postfix_str(f"seed {seed}, failed rounds: {sum(bool(each.failure) for each in rounds)}")
            folder = make_folder(work / f"seed-{seed}", source, variant)
            pending = list(drawn)
            try:
                torture(folder, references[variant], pending, rng, bar.update)
                shutil.rmtree(folder)
            except Failure as failure:
                this.failure = str(failure)
                tqdm.write(f"seed {seed}: {failure} (folder: {folder})", file=sys.stderr)
            this.kills = [kill for kill in drawn if kill.landed_in]
    failed = any(each.failure for each in rounds)
    text = report(rounds, time.monotonic() - started)
    print(text)
    if args.out:
        args.out.write_text(text)
    if not failed:
        shutil.rmtree(work)
    sys.exit(failed)


if __name__ == "__main__":
    main()
