"""What differs between two runs, stage by stage: from what the stages have written, not from the config.

A stage has settings, which somebody has chosen; an environment, which the machine has; and results, which follow from all that.
So the first stage with other settings is where two runs part.
"""

from typing import NamedTuple, TypedDict

SETTING, ENVIRONMENT, RESULT = "setting", "environment", "result"

# The stages that look at a model and do not change it.
MEASURING = ("evaluate", "score")


class Difference(NamedTuple):
    """`kind`: SETTING, ENVIRONMENT or RESULT. None: the key is not there."""

    stage: str
    kind: str
    key: str
    a: object
    b: object


class Files(TypedDict):
    """Of a run the contents of metadata.json, report.json, plan.json, adapter.json, merge.json and metrics.json."""

    ledger: dict
    tokens: dict
    plan: dict
    adapter: dict
    merge: dict
    metrics: dict


def differences(a: Files, b: Files) -> list[Difference]:
    """In the order of the stages; of each stage first the settings."""
    return [
        Difference(stage, kind, key, *values)
        for (stage, parts), other in zip(stages(a).items(), stages(b).values(), strict=True)
        for kind in (SETTING, ENVIRONMENT, RESULT)
        for key, values in _changed(parts.get(kind, {}), other.get(kind, {})).items()
    ]


def stages(files: Files) -> dict[str, dict[str, dict]]:
    """{stage: {kind: {...}}}, the stages in the order in which they run."""
    ledger, tokens, plan, adapter, merge, metrics = (
        files["ledger"],
        files["tokens"],
        files["plan"],
        files["adapter"],
        files["merge"],
        files["metrics"],
    )
    base = merge["base"]
    hardware = {"versions": adapter["versions"], "hardware": adapter["hardware"]}
    return {
        "base model": {
            SETTING: {"model": {"name": base["name"], "commit": base["commit"]}},
            RESULT: {"files": {name: _short(sha) for name, sha in base["files"].items()}},
        },
        "prepare": {
            SETTING: {
                **{key: _sources(ledger[key]) for key in ("sources", "val_sources", "test_sources")},
                "near_duplicates": ledger["near_duplicates"]["policy"],
                **{key: ledger[key] for key in ("seed", "thresholds", "language_detector", "measured_on")},
            },
            RESULT: {
                "read": ledger["ledger"]["read"],
                "dropped": ledger["ledger"]["dropped"],
                **{f"{part} rows": ledger[part]["written"] for part in ("train", "val", "test")},
            },
        },
        "encode": {
            SETTING: {"max_length": tokens["max_length"], "template": _template(tokens["template"])},
            RESULT: {
                "rows left out for contamination": tokens["contaminated_rows"]["count"],
                **{
                    part: {key: tokens[part][key] for key in ("sequences", "tokens", "trained_tokens")}
                    for part in ("train", "val", "test")
                },
            },
        },
        "plan": {
            RESULT: {"parameters": plan["parameters"], "steps": plan["steps"], "merge": plan["merge"]["how"]},
        },
        "finetune": {
            SETTING: adapter["settings"],
            ENVIRONMENT: hardware,
            RESULT: {
                **{key: adapter[key] for key in ("batch", "chosen", "step", "ended")},
                "adapter": _short(adapter["adapter_sha256"]),
            },
        },
        "merge": {ENVIRONMENT: {"versions": _beside(merge["versions"], adapter["versions"])}, RESULT: {"how": merge["how"]}},
        "evaluate": {
            SETTING: {"questions": _questions(metrics)},
            RESULT: {key: metrics["data"][key] for key in ("sequences", "groups", "trained_tokens", "trained_bytes")},
        },
        "score": {SETTING: {"confidence": metrics["data"]["confidence"]}},
    }  # fmt: skip


def choices(found: list[Difference]) -> list[Difference]:
    """The settings that can be the reason why two models differ: not those of how they were measured."""
    return [one for one in found if one.kind == SETTING and one.stage not in MEASURING]


def first_to_differ(found: list[Difference]) -> str | None:
    """The first stage that has other settings; or else that has run elsewhere; or else that has another result. Only if the
    models do not differ, one of those that measure them."""
    made = [one for one in found if one.stage not in MEASURING]
    elsewhere = [one for one in made if one.kind == ENVIRONMENT]
    for part in (choices(found), elsewhere, made, found):
        if part:
            return part[0].stage
    return None


def _changed(a: dict, b: dict, prefix: str = "") -> dict[str, tuple]:
    """{key: (value in a, value in b)} of what differs, keys of keys with dots between them."""
    found: dict[str, tuple] = {}
    for key in dict.fromkeys([*a, *b]):
        ours, theirs = a.get(key), b.get(key)
        name = f"{prefix}{key}"
        if isinstance(ours, dict) and isinstance(theirs, dict):
            found |= _changed(ours, theirs, f"{name}.")
        elif ours != theirs:
            found[name] = (ours, theirs)
    return found


def _questions(metrics: dict) -> dict[str, int]:
    """How many questions of each kind count."""
    asked = {part: answers["n"] for part, answers in metrics["answers"].items() if part != "all"}
    return asked | {f"benchmark {name}": benchmark["questions"] for name, benchmark in metrics["benchmarks"].items()}


def _sources(files: list[dict]) -> dict[str, str]:
    return {
        file.get("hub") or file["path"]: f"{file['rows']:,} rows, SHA-256 {_short(file['sha256'])}" for file in files
    }


def _template(template: dict) -> str:
    return f"{template['origin']}, SHA-256 {_short(template['sha256'])}"


def _beside(versions: dict, known: dict) -> dict:
    """What is not said already."""
    return {name: version for name, version in versions.items() if known.get(name) != version}


def _short(sha: str | None) -> str:
    return (sha or "")[:12]
