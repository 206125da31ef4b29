"""Write what is derived from the schema and the libraries: lora.schema.json, train.schema.json, config/README.md's tables.

    python scripts/tools/config_docs.py            # write them (make schema)
    python scripts/tools/config_docs.py --check    # only say whether they are up to date; exit 1 if not (a test runs this)

No rule calls it. `lora.schema.json` and `train.schema.json` hold every field of peft.LoraConfig and trl.SFTConfig of the
pinned versions with its type, so that a typo or a wrong type in the config is found before anything heavy is imported.
"""

import json
import sys
from pathlib import Path

import _library  # noqa: F401

from moult.model.quantization import bitsandbytes_for
from moult.run.cli import tool_parser

CONFIG = Path(__file__).resolve().parents[2] / "config"
BEGIN, END = "<!-- tables: made by scripts/tools/config_docs.py -->", "<!-- end of tables -->"
LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
JSON_TYPE = {int: "integer", float: "number", bool: "boolean", str: "string", dict: "object", list: "array"}


def field_schema(annotation) -> dict:
    """The JSON schema of a dataclass field's annotation. What JSON does not know (a config object) is an object."""
    import enum
    import types
    import typing

    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return {"type": ["null"]}
    if origin in (typing.Union, types.UnionType):
        parts = [field_schema(argument) for argument in arguments]
        if any("enum" in part for part in parts):
            # `SchedulerType | str`: the enum's values are the only strings that work.
            choices = [choice for part in parts for choice in part.get("enum", [])]
            free = {kind for part in parts for kind in part.get("type", [])} - {"string"}
            choices += [choice for kind, choice in (("null", None),) if kind in free]
            choices += [choice for choice in (True, False) if "boolean" in free]
            return {"enum": choices}
        merged = {"type": list(dict.fromkeys(kind for part in parts for kind in part["type"]))}
        items = [part["items"] for part in parts if "items" in part]
        return {**merged, **({"items": items[0]} if items else {})}
    if origin is typing.Literal:
        # peft's `pissa_niter_[number of iters]` is a pattern, not a value.
        free = any("[" in str(value) for value in arguments)
        return {"type": ["string"]} if free else {"enum": list(arguments)}
    if origin is list:
        inner = field_schema(arguments[0]) if arguments else {}
        return {"type": ["array"], "items": inner}
    if origin in (dict, tuple):
        return {"type": ["object" if origin is dict else "array"]}
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return {"enum": [member.value for member in annotation]}
    return {"type": [JSON_TYPE.get(annotation, "object")]}


def library_schema(config_class) -> dict:
    """{field: its JSON schema} of a dataclass of peft or trl, with the first sentence of its help."""
    import dataclasses
    import typing

    hints = typing.get_type_hints(config_class)
    schema = {}
    for field in dataclasses.fields(config_class):
        help_text = " ".join(str(field.metadata.get("help", "")).replace("%%", "%").split())
        entry = field_schema(hints[field.name])
        schema[field.name] = {**entry, "description": help_text.split(". ")[0][:200], "x-library": True}
    return schema


def generated_schemas() -> dict[Path, str]:
    bitsandbytes_for({})
    from peft import LoraConfig
    from trl import SFTConfig

    return {
        CONFIG / f"{section}.schema.json": json.dumps(library_schema(config_class), indent=1, sort_keys=True) + "\n"
        for section, config_class in (("lora", LoraConfig), ("train", SFTConfig))
    }


def shown_type(schema: dict) -> str:
    if "enum" in schema:
        return " \\| ".join(f"`{json.dumps(choice).strip(chr(34))}`" for choice in schema["enum"])
    kinds = schema.get("type", "")
    return " \\| ".join([kinds] if isinstance(kinds, str) else kinds)


def rows(prefix: str, schema: dict, root: dict):
    """(key, type, default, description) of all keys below a section that Moult itself documents."""
    from moult.workflow.config import _deref

    for key, below in schema.get("properties", {}).items():
        below = _deref(below, root)
        if "x-refused" in below or "x-library" in below:
            continue
        name = f"{prefix}{key}"
        section = "properties" in below
        limits = [f"{sign} {below[word]}" for word, sign in LIMITS.items() if word in below]
        text = below.get("description", "") + (f" ({', '.join(limits)})" if limits else "")
        default = json.dumps(below["default"], ensure_ascii=False) if "default" in below and not section else ""
        yield name, "section" if section else shown_type(below), default, text
        entries = _deref(below.get("additionalProperties") or below.get("items") or {}, root)
        if section:
            # The sections of a run, a sweep and `override` are those of the top.
            if not prefix.startswith(("runs.", "sweeps.", "override.")):
                yield from rows(f"{name}.", below, root)
        elif "properties" in entries:
            yield from rows(f"{name}.<name>." if below["type"] == "object" else f"{name}[].", entries, root)


def tables() -> str:
    """The README's tables: all keys of ours, then the refused fields, then the names of all that pass through."""
    from moult.workflow.config import load_schema

    schema = load_schema(str(CONFIG))
    lines = ["| key | type | default | what it is |", "| --- | --- | --- | --- |"]
    for name, kind, default, text in rows("", schema, schema):
        lines.append(
            f"| `{name}` | {kind} | {f'`{default}`' if default else ''} | {text.replace('|', chr(92) + '|')} |"
        )
    for section, library in (("lora", "peft.LoraConfig"), ("train", "trl.SFTConfig")):
        properties = schema["$defs"][section]["properties"]
        passed = [name for name, field in properties.items() if "x-library" in field]
        refused = {name: field["x-refused"] for name, field in properties.items() if "x-refused" in field}
        lines += [
            "",
            f"**`{section}` also takes** every other field of `{library}`: "
            + ", ".join(f"`{name}`" for name in sorted(passed))
            + ".",
        ]
        lines += ["", f"**`{section}` refuses**", "", "| field | because |", "| --- | --- |"]
        lines += [f"| `{name}` | {reason} |" for name, reason in sorted(refused.items())]
    return "\n".join(lines)


def readme() -> str:
    path = CONFIG / "README.md"
    text = path.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if something is out of date")
    check = parser.parse_args().check
    stale = []
    for produce in (generated_schemas, lambda: {CONFIG / "README.md": readme()}):
        for path, text in produce().items():
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                stale.append(path.name)
                if not check:
                    path.write_text(text, encoding="utf-8")
    print(f"{'out of date' if check else 'written'}: {', '.join(stale)}" if stale else "all up to date")
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()
