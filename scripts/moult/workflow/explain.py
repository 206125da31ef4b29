"""Why a stage would run again, in words: what Snakemake remembers of its last run, beside what it would run with now.

Snakemake's own words (`snakemake -n -p`) quote the whole settings, before and after. Here is what differs in them.
"""

import ast
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from moult.errors import some

# Longer values are cut; of a longer line, each reason gets a line.
LONGEST = 60
LONGEST_LINE = 130

_CODE = re.compile(r"[0-9a-f]{16}")  # rules/code.smk, code_of
_ABSENT = object()


@dataclass(frozen=True)
class Record:
    """What a job ran with, or would run with.

    params:  as Snakemake keeps them: the sorted `repr` of the values, without their names
    command: the rule's command, before anything is filled in
    inputs:  paths
    """

    params: tuple[str, ...]
    command: str | None
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """A stage in the order of the workflow. It is fresh if there are no `reasons` to run it."""

    name: str
    reasons: tuple[str, ...] = ()


def own_reasons(before: Record, now: Record, changed: Iterable[str] = ()) -> list[str]:
    """What a job would do differently than the last time. `changed`: inputs with another content than then."""
    told = [f"{path} has changed" for path in changed]
    told += _inputs(before, now)
    if before.command != now.command:
        told.append("its rule has changed")
    old, new = _sorted_out(set(before.params)), _sorted_out(set(now.params))
    told += changes("", old.settings, new.settings)
    if old.code != new.code:
        told.append("its code or its container image has changed")
    # A path, a name, a fingerprint of the inputs: nothing says what it was called then.
    if old.others != new.others and not told:
        told.append("its inputs have changed")
    return told


def changes(key: str, old: object, new: object) -> Iterator[str]:
    """`train.learning_rate 0.0002 -> 0.0001` for each value that differs. Entries of a list are told by their id."""
    entries, others = _by_id(old), _by_id(new)
    if entries and others:
        yield from _entries(key, entries, others)
    elif isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from changes(f"{key}.{name}" if key else name, old.get(name, _ABSENT), new.get(name, _ABSENT))
    elif old != new:
        yield f"{key} {_shown(old)} -> {_shown(new)}"


def explanation(runs: dict[str, list[Stage]]) -> str:
    """The stages of each run, those that are stale with the reasons. Runs in which all is fresh share a line."""
    lines = []
    for run, stages in runs.items():
        stale = [stage for stage in stages if stage.reasons]
        if not stale:
            continue
        width = max(len(stage.name) for stage in stale)
        lines.append(run)
        for stage in stale:
            name = f"  {stage.name:<{width}}  "
            line = name + "; ".join(stage.reasons)
            lines.append(line if len(line) <= LONGEST_LINE else name + f"\n{' ' * len(name)}".join(stage.reasons))
        if fresh := [stage.name for stage in stages if not stage.reasons]:
            lines.append(f"  fresh: {', '.join(fresh)}")
    if fresh := [run for run, stages in runs.items() if not any(stage.reasons for stage in stages)]:
        lines.append(f"all is fresh: {', '.join(fresh)}")
    return "\n".join(lines)


@dataclass(frozen=True)
class _Params:
    settings: dict
    code: list[str]
    others: list


def _sorted_out(params: Iterable[str]) -> _Params:
    """Which param is what can be seen: settings are a JSON object, and code is a hash."""
    settings: dict = {}
    code, others = [], []
    for text in sorted(params):
        value = ast.literal_eval(text)
        if isinstance(value, str) and value.startswith("{"):
            settings |= json.loads(value)
        elif isinstance(value, str) and _CODE.fullmatch(value):
            code.append(value)
        else:
            others.append(value)
    return _Params(settings, code, others)


def _inputs(before: Record, now: Record) -> Iterator[str]:
    old, new = set(before.inputs), set(now.inputs)
    for verb, paths in (("now reads", new - old), ("no longer reads", old - new)):
        if paths:
            yield f"it {verb} {some(sorted(paths))}"


def _by_id(entries: object) -> dict | None:
    """{id: entry} of a list whose entries have ids, as eval.prompts has."""
    if not isinstance(entries, list) or not entries:
        return None
    found = {entry["id"]: entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)}
    return found if len(found) == len(entries) else None


def _entries(key: str, old: dict, new: dict) -> Iterator[str]:
    for name in (name for name in {**old, **new} if old.get(name) != new.get(name)):
        if name not in old:
            yield f"{key} has {_shown(name)}, which is new"
        elif name not in new:
            yield f"{key} no longer has {_shown(name)}"
        else:
            yield from changes(f"{key}.{_shown(name)}", old[name], new[name])
    if old == new and [*old] != [*new]:
        yield f"{key} has another order"


def _shown(value: object) -> str:
    if value is _ABSENT:
        return "(not there)"
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, sort_keys=True)
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
