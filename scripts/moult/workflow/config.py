"""The config: checked against its schema and completed with its defaults. stages.py cuts it into what each stage reads.

Nothing heavier than yaml and jsonschema is imported here: Snakemake parses the Snakefile again in every job.
"""

import copy
import difflib
import json
import math
import re
from functools import lru_cache
from pathlib import Path

import yaml
from jsonschema import Draft202012Validator, FormatChecker

from moult.errors import MoultError, some
from moult.files import canonical, sha256_text
from moult.workflow.conflicts import dataset_problems, run_problems
from moult.workflow.hints import unknown_key
from moult.workflow.rungs import rung_problems, start_problems
from moult.workflow.seeds import with_seeds
from moult.workflow.sweeps import over_schema, sweep_runs

# Folders below results/ that are not runs.
RESERVED = ("prepared", "models", "datasets", "benchmarks", "summary", "compare", "sweeps")

# More values than any config of thousands of runs has.
MOST_VALUES = 500_000

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_DATA_FILE = re.compile(r"\.(json|jsonl|ndjson|csv|tsv|parquet|arrow|gz)$")


class ConfigError(MoultError):
    """Everything that is wrong with the config, in one message."""

    def __init__(self, problems: list[str]):
        # They quote what was given: half a character, megabytes.
        problems = [problem.encode(errors="backslashreplace").decode() for problem in problems]
        problems = [problem if len(problem) < 600 else f"{problem[:600]} ..." for problem in problems]
        plural = "s" if len(problems) > 1 else ""
        listing = "".join(f"\n  - {problem}" for problem in problems)
        super().__init__(
            f"the config has {len(problems)} problem{plural}:{listing}",
            "fix config/config.yaml or the file given with --configfile; config/README.md lists all keys",
        )
        self.problems = problems


@lru_cache
def load_schema(folder: str) -> dict:
    """The schema in `folder` (config/), with all fields of peft.LoraConfig and trl.SFTConfig filled in."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    schema = yaml.load((Path(folder) / "schema.yaml").read_text(encoding="utf-8"), loader)
    for section in ("lora", "train"):
        own = schema["$defs"][section]["properties"]
        library = json.loads((Path(folder) / f"{section}.schema.json").read_text(encoding="utf-8"))
        for name, field in own.items():
            if "x-refused" in field:
                own[name] = {"not": {}, "x-refused": field["x-refused"]}
            elif "type" not in field and "enum" not in field:
                own[name] = {
                    key: library[name][key] for key in ("type", "enum", "items") if key in library[name]
                } | field
        schema["$defs"][section]["properties"] = {**library, **own}
    schema["$defs"]["sweep"]["properties"]["over"]["properties"] = over_schema(schema)
    return schema


def resolve(config: dict, schema: dict) -> dict:
    """The config with all defaults, and `runs` completed: every run with its whole settings, and those of further seeds.

    Raises ConfigError with every problem that can be seen without reading data or models.
    """
    known = set(schema["properties"])
    if _has_more_values_than(MOST_VALUES, config):
        raise ConfigError(
            [f"more than {MOST_VALUES:,} values; look for YAML anchors (&) that repeat or hold each other"]
        )
    try:
        config = _coerce(copy.deepcopy(dict(config)), schema, schema)
        problems = _not_json(config) or _schema_problems(config, schema)
    except RecursionError:
        problems = ["something in it is nested too deeply to read"]
    if problems:
        raise ConfigError(problems)
    removed = {name for name, dataset in config.get("datasets", {}).items() if dataset is None}
    _fill(config, schema, schema)
    for name in [name for name, dataset in config["datasets"].items() if dataset is None]:
        del config["datasets"][name]
    sweeps = config["sweeps"].items()
    config["sweeps"] = {name: sweep for name, sweep in sweeps if sweep is not None and sweep["dataset"] not in removed}
    over_datasets = config["override"].get("dataset", {})
    config["datasets"] = {name: merged(dataset, over_datasets) for name, dataset in config["datasets"].items()}
    runs, problems = _resolve_runs(config, schema, removed)
    for name, dataset in config["datasets"].items():
        problems += dataset_problems(name, dataset)
    for name, run in runs.items():
        problems += run_problems(name, run, config["datasets"].get(run["dataset"]))
        problems += _shortened(run["serve"]["vllm"], schema["$defs"]["serve"]["properties"]["vllm"]["properties"])
        problems += start_problems(name, run, runs)
    config["runs"], clashes = with_seeds(runs)
    problems += clashes or _name_problems(config)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))  # the runs share most of their settings
    return {key: value for key, value in config.items() if key in known}


# --- checking ---------------------------------------------------------------------------------------------------------


def duplicate_keys(path: str | Path) -> list[str]:
    """What a YAML file says twice, with both lines: the loader would silently take the last."""
    problems, seen = [], set()
    try:
        stack = [
            (yaml.compose(Path(path).read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)), "")
        ]
    except yaml.YAMLError:  # JSON, with tabs
        return []
    while stack:
        node, where = stack.pop()
        if id(node) in seen:  # an anchor
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            stack += [(item, f"{where}{index}.") for index, item in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                name, line = str(key.value), key.start_mark.line + 1
                if name in lines:
                    problems.append(f"{where}{name}: there twice, in lines {lines[name]} and {line} of {path}")
                lines[name] = line
                stack.append((value, f"{where}{name}."))
    return problems


def misplaced(config: dict) -> list[str]:
    """What in the folders of the runs is a link to somewhere outside of paths.results: what a run writes stays within."""
    results = Path(config["paths"]["results"])
    if results.exists() and not results.is_dir():
        return [f"paths.results: {results} is a file, and must be a folder"]
    root = results.resolve()
    folders = [results / name for name in (*RESERVED, *config["runs"])]
    inside = [entry for folder in folders if folder.is_dir() for entry in folder.iterdir()]
    return [
        f"{path}: a link to {path.resolve()}, outside of {results}; remove it, and move all with paths.results"
        for path in [*folders, *inside]
        if path.is_symlink() and not path.resolve().is_relative_to(root)
    ]


def _has_more_values_than(limit: int, config: dict) -> bool:
    """Whether walking the config would take for ever: anchors make billions of values of ten lines, or an endless one."""
    stack: list = [config]
    for _ in range(limit):
        if not stack:
            return False
        value = stack.pop()
        stack += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return True


def _deref(schema: dict, root: dict) -> dict:
    if "$ref" not in schema:
        return schema
    target = root
    for part in schema["$ref"].removeprefix("#/").split("/"):
        target = target[part]
    return {**_deref(target, root), **{key: value for key, value in schema.items() if key != "$ref"}}


def _coerce(value, schema: dict, root: dict):
    """Undo what YAML makes of numbers and words: '1e-4' is a string to it, `no` and `off` are false, 2.0 is no integer.

    `--config` makes strings of all nested values (Snakemake 9.27), so 'true' and 'null' are made what they were as well.
    """
    schema = _deref(schema, root)
    if isinstance(value, dict):
        schema = _deref(schema.get("then", schema), root)  # a source is a text, or an object of these properties
        other = schema.get("additionalProperties")
        properties = schema.get("properties", {})
        for key in value:
            below = properties.get(key, other if isinstance(other, dict) else {})
            value[key] = _coerce(value[key], below, root)
        return value
    if isinstance(value, list):
        return [_coerce(item, schema.get("items", {}), root) for item in value]
    types = schema.get("type", [])
    types = {types} if isinstance(types, str) else set(types)
    choices = schema.get("enum", [])
    if value is False and ("x-yaml-false" in schema or ("no" in choices and False not in choices)):
        return schema.get("x-yaml-false", "no")
    if isinstance(value, str) and value not in choices:
        # In our own keys that take text, 'true' is text: an answer may have to contain it.
        words = "boolean" in types and ("string" not in types or "x-library" in schema)
        if value in ("true", "false") and (words or True in choices):
            return value == "true"
        if value == "null" and "null" in types:
            return None
        if types & {"integer", "number"} and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", value):
            number = float(value)
            return int(number) if number.is_integer() and "integer" in types else number
    if isinstance(value, float) and value.is_integer() and "integer" in types and "number" not in types:
        return int(value)
    return value


_formats = FormatChecker(formats=())


@_formats.checks("regex", raises=(re.error, OverflowError, RecursionError))
def _is_regex(value) -> bool:
    return not isinstance(value, str) or re.compile(value) is not None


def _schema_problems(config: dict, schema: dict) -> list[str]:
    errors = sorted(
        Draft202012Validator(schema, format_checker=_formats).iter_errors(config),
        key=lambda error: [str(part) for part in error.absolute_path],
    )
    return list(dict.fromkeys(problem for error in errors for problem in _describe(error, schema)))


def _describe(error, schema: dict) -> list[str]:
    where = ".".join(str(part) for part in error.absolute_path)
    value = error.instance
    if error.validator == "additionalProperties":
        fields = error.schema.get("properties", {})
        return [unknown_key(where, str(key), fields, schema) for key in value if key not in fields]
    if "propertyNames" in error.absolute_schema_path:
        return [
            f"{where}.{value}: not a name; use letters, digits, '.', '_' and '-' (at most 64), a letter or digit first"
        ]
    if error.validator == "not" and "x-refused" in error.schema:
        return [f"{where}: not yours to set: {error.schema['x-refused']}"]
    if error.validator == "type":
        wanted = error.schema["type"]
        wanted = wanted if isinstance(wanted, str) else " or ".join(wanted)
        hint = ""
        if "string" in wanted and "integer" not in wanted and isinstance(value, bool | int | float):
            hint = " (quote it: YAML takes `no` for false)" if value is False else " (quote it)"
        elif value is None and wanted == "object":
            hint = " (an empty section; leave it out)"
        return [f"{where}: expected {wanted}, got {value!r}{hint}"]
    if error.validator == "enum":
        as_yaml = {True: "true", False: "false", None: "null"}
        choices = [
            as_yaml[choice] if choice is None or isinstance(choice, bool) else choice for choice in error.schema["enum"]
        ]
        close = difflib.get_close_matches(str(value), [str(choice) for choice in choices], 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return [f"{where}: {value!r} is none of {some(choices, 12)}{hint}"]
    if error.validator == "required":
        missing = [key for key in error.schema["required"] if key not in value]
        return [f"{where}.{key}: missing" for key in missing]
    if error.validator in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        sign = {"minimum": ">=", "maximum": "<=", "exclusiveMinimum": ">", "exclusiveMaximum": "<"}[error.validator]
        return [f"{where}: must be {sign} {error.validator_value}, got {value!r}"]
    if error.validator == "format":
        return [f"{where}: {value!r} is no regular expression: {error.cause}"]
    meaning = error.schema.get("description", "")
    return [f"{where}: {error.message}{f' ({meaning})' if meaning else ''}"]


def _not_json(value, where: str = "") -> list[str]:
    """What YAML can say, and JSON or a command line cannot: NaN and infinity, dates, NUL, keys that are no text."""
    if isinstance(value, dict):
        keys = [f"{where}.{key}".lstrip(".") for key in value]
        problems = [
            f"{path}: the key {key!r} is not text; quote it"
            for key, path in zip(value, keys, strict=True)
            if not isinstance(key, str)
        ]
        problems += [hit for key in value if isinstance(key, str) for hit in _not_json(key, f"{where}.{key!r}")]
        return problems + [
            hit for item, path in zip(value.values(), keys, strict=True) for hit in _not_json(item, path)
        ]
    if isinstance(value, list):
        return [hit for index, item in enumerate(value) for hit in _not_json(item, f"{where}.{index}")]
    if isinstance(value, str) and (bad := re.search("[\0\ud800-\udfff]", value)):
        return [f"{where}: holds {bad.group()!r}, which no file name or command can hold"]
    if isinstance(value, int) and abs(value) >= 2**63:
        return [f"{where}: the number is too large (the limit is 2 to the 63rd)"]
    if isinstance(value, float) and not math.isfinite(value):
        return [f"{where}: {value} is not a finite number"]
    if not isinstance(value, str | int | float | None):
        return [f"{where}: {value} is a {type(value).__name__} to YAML; quote it"]
    return []


def _fill(value: dict, schema: dict, root: dict) -> None:
    """Set what is missing to its default, below `value` and in all its sections but those that are laid over others."""
    schema = _deref(schema, root)
    for key, below in schema.get("properties", {}).items():
        below = _deref(below, root)
        if key not in value and "default" in below:
            value[key] = copy.deepcopy(below["default"])
        if key not in ("runs", "sweeps", "override") and isinstance(value.get(key), dict):
            _fill(value[key], below, root)
    other = schema.get("additionalProperties")
    if isinstance(other, dict):
        for key in value:
            if isinstance(value[key], dict) and key not in schema.get("properties", {}):
                _fill(value[key], other, root)


# --- runs -------------------------------------------------------------------------------------------------------------


def merged(base: dict, override: dict) -> dict:
    """`base` with `override` laid over it: dicts are merged, everything else is replaced."""
    result = dict(base)
    for key, value in override.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def _resolve_runs(config: dict, schema: dict, removed: set[str]) -> tuple[dict, list[str]]:
    # What a run may set and the config has too: all runs start from that.
    shared = {key: config[key] for key in schema["$defs"]["run"]["properties"] if key in config}
    no_model: dict = {}
    _fill(no_model, {"$ref": "#/$defs/model"}, schema)
    overrides: dict[str, dict] = {name: {} for name in config["datasets"]}
    overrides |= {name: run for name, run in config["runs"].items() if run is not None}
    over_runs = {key: value for key, value in config["override"].items() if key != "dataset"}
    made, problems = sweep_runs(config["sweeps"], config["override"])
    wanted = [(f"runs.{name}", name, override) for name, override in overrides.items()]
    wanted += [(f"sweeps.{sweep}", name, override) for sweep, name, override in made]
    runs: dict[str, dict] = {}
    for where, name, override in wanted:
        dataset = override.get("dataset", name)
        if dataset in removed:
            continue
        if name in config["datasets"] and dataset != name:
            what = where.split(".")[0].rstrip("s")
            problems.append(
                f"{where}.dataset: {name} is a dataset, and the run of that name is its own; rename the {what}"
            )
            continue
        if dataset not in config["datasets"]:
            key = f"{where}.dataset"
            close = difflib.get_close_matches(dataset, config["datasets"], 1)
            hint = f"; did you mean {close[0]}?" if close else f"; there are: {some(config['datasets'])}"
            problems.append(f"{key}: no dataset is named {dataset}{hint}")
            continue
        if "seed" in override and override["seed"] != override.get("seeds", [override["seed"]])[0]:
            problems.append(f"{where}.seed: the seed of a run is the first of its seeds; leave one of the two out")
        base = shared
        if "name" in override.get("model", {}):
            base = {**shared, "model": no_model}
        run = merged(merged(base, {**override, "dataset": dataset}), over_runs)
        if runs.get(name, run) != run:
            problems.append(f"{where}: makes the run {name}, which is there with other settings; rename the sweep")
        if where.startswith("sweeps.") and not run["eval"]["perplexity"]:
            problems.append(f"{where}: it ranks by nats per token; set eval.perplexity: true")
        rungs = config["sweeps"][where.removeprefix("sweeps.")].get("rungs") if where.startswith("sweeps.") else None
        problems += rung_problems(where, run, rungs) if rungs and "stop_after" not in run else []
        runs[name] = run
    return runs, problems


def _name_problems(config: dict) -> list[str]:
    problems = []
    seen: dict[str, str] = {}
    for name in config["runs"]:
        if name.lower() in RESERVED:
            problems.append(f"runs.{name}: reserved name (results/{name.lower()} holds something else)")
        if name.lower() in seen:
            problems.append(
                f"runs.{name}: there is also {seen[name.lower()]}; some file systems take the two for one folder"
            )
        seen[name.lower()] = name
    return problems


def _shortened(options: dict, refused: dict) -> list[str]:
    """vLLM takes the beginning of an option's name for the whole."""
    return [
        f"serve.vllm.{option}: vLLM takes it for {name}, which is not yours to set: {refused[name]['x-refused']}"
        for option in options
        for name in refused
        if name.startswith(option)
    ]


# --- where things are -------------------------------------------------------------------------------------------------


def is_local(name: str) -> bool:
    """Whether a model's or dataset's name is a path. What could be both is one only if it exists."""
    if name.startswith((".", "/", "~")) or any(char in name for char in "*?[") or _DATA_FILE.search(name):
        return True
    return Path(name).exists() or not _HUB_ID.match(name)


def local_model(model: dict, paths: dict) -> str | None:
    """The folder of a model that is on this machine, or None if it is to come from the hub."""
    if paths["models"]:
        mounted = Path(paths["models"]).expanduser() / model["name"]
        if mounted.exists():
            return str(mounted)
    return str(Path(model["name"]).expanduser()) if is_local(model["name"]) else None


def slug(name: str, revision: str | None = None) -> str:
    """A folder's name for a hub id or a path; distinct for distinct ones."""
    plain = re.sub(r"[^\w.-]+", "--", name.strip("./~"))
    if revision:
        plain += f"@{re.sub(r'[^A-Za-z0-9_.-]+', '-', revision)}"
    if _HUB_ID.match(name) and (revision is None or re.fullmatch(r"[\w.-]+", revision)):
        return plain
    return f"{plain}-{sha256_text(canonical([name, revision]))[:6]}"


def source_entries(source, dataset: dict) -> list[dict]:
    """`source` in its long form: a list of {path, weight, columns, format}."""
    entries = source if isinstance(source, list) else [source]
    return [
        {
            "path": entry["path"] if isinstance(entry, dict) else entry,
            "weight": entry.get("weight", 1) if isinstance(entry, dict) else 1,
            "columns": entry.get("columns", dataset["columns"]) if isinstance(entry, dict) else dataset["columns"],
            "format": entry.get("format", dataset["format"]) if isinstance(entry, dict) else dataset["format"],
        }
        for entry in entries
    ]


def fetched_dataset(config: dict, dataset: dict, hub_id: str) -> str:
    """Where fetch_dataset puts the rows of a hub dataset."""
    return f"{config['paths']['results']}/datasets/{dataset_slug(dataset, hub_id)}.parquet"


def dataset_slug(dataset: dict, hub_id: str) -> str:
    return slug("/".join([hub_id, dataset["subset"] or "", dataset["split"]]), dataset["revision"])
