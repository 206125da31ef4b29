"""config/README.md and the two generated schemas say what the schema and the pinned libraries say."""

import copy

import config_docs
import pytest
from workflow import ROOT

from moult.workflow.config import load_schema


@pytest.mark.slow
def test_all_derived_files_are_up_to_date(run_script):
    result = run_script("tools/config_docs", "--check")
    assert (result.returncode, result.stdout) == (0, "all up to date\n"), "run: make schema"


def test_an_outdated_readme_is_said_and_left_alone(tmp_path, monkeypatch, capsys):
    for name in ("README.md", "schema.yaml", "lora.schema.json", "train.schema.json"):
        (tmp_path / name).write_text((ROOT / "config" / name).read_text())
    (tmp_path / "README.md").write_text((ROOT / "config/README.md").read_text().replace("| `seed` |", "| `sead` |"))
    monkeypatch.setattr(config_docs, "CONFIG", tmp_path)
    monkeypatch.setattr(config_docs, "generated_schemas", dict)  # importing peft and trl takes seconds
    for arguments, said, code in (
        (["--check"], "out of date", 1),
        ([], "written", 0),
        (["--check"], "all up to date", 0),
    ):
        before = (tmp_path / "README.md").read_text()
        monkeypatch.setattr("sys.argv", ["config_docs", *arguments])
        with pytest.raises(SystemExit) as stop:
            config_docs.main()
        assert (stop.value.code, said in capsys.readouterr().out) == (code, True)
        assert ((tmp_path / "README.md").read_text() == before) == bool(arguments)
    assert (tmp_path / "README.md").read_text() == (ROOT / "config/README.md").read_text()


def undescribed(schema: dict, where: str = "") -> list[str]:
    """The keys of our own schema that say nothing about themselves."""
    found = []
    for key, field in schema.get("properties", {}).items():
        name = f"{where}.{key}".lstrip(".")
        target = schema_of(field)
        if not (target.get("description") or field.get("x-refused")):
            found.append(name)
        found += undescribed(field, name)
    for below in ("additionalProperties", "items", "then"):
        if isinstance(schema.get(below), dict):
            found += undescribed(schema[below], f"{where}.<{below}>")
    return found


def schema_of(field: dict) -> dict:
    definition = field.get("$ref", "").removeprefix("#/$defs/")
    return {**SCHEMA["$defs"].get(definition, {}), **field}


SCHEMA = load_schema(str(ROOT / "config"))


def test_every_key_has_a_description():
    ours = copy.deepcopy(SCHEMA)
    for section in ("lora", "train"):  # the libraries describe their own fields, or do not
        fields = ours["$defs"][section]["properties"]
        ours["$defs"][section]["properties"] = {key: field for key, field in fields.items() if "x-library" not in field}
    assert undescribed(ours) + [hit for name, part in ours["$defs"].items() for hit in undescribed(part, name)] == []


def test_every_default_is_allowed_by_its_own_schema():
    from jsonschema import Draft202012Validator

    def check(schema: dict) -> int:
        count = 0
        for field in schema.get("properties", {}).values():
            if "default" in field:
                Draft202012Validator({"$defs": SCHEMA["$defs"], **schema_of(field)}).validate(field["default"])
                count += 1
            count += check(field)
        return count

    assert check(SCHEMA) + sum(check(part) for part in SCHEMA["$defs"].values()) > 50


def test_the_readme_lists_keys_refused_fields_and_fields_that_pass():
    text = (ROOT / "config/README.md").read_text()
    for line in (
        "| `train.learning_rate` | number | `0.0002` | ",
        "| `datasets.<name>.columns.group` | ",
        "| `eval.prompts[].expect.regex` | ",
        "| `output_dir` | checkpoints go to results/<run>/trainer_state |",
        "`use_rslora`",
        "`neftune_noise_alpha`",
    ):
        assert line in text


@pytest.mark.parametrize(
    ("annotation", "schema"),
    [
        (int | None, {"type": ["integer", "null"]}),
        (list[str] | str | None, {"type": ["array", "string", "null"], "items": {"type": ["string"]}}),
        (dict[str, int], {"type": ["object"]}),
        (tuple[int, int], {"type": ["array"]}),
        (type("Thing", (), {}), {"type": ["object"]}),
    ],
)
def test_a_dataclass_field_becomes_its_schema(annotation, schema):
    assert config_docs.field_schema(annotation) == schema


def test_enums_and_literals_become_choices():
    import enum
    from typing import Literal

    kind = enum.Enum("kind", {"A": "a", "B": "b"})
    assert config_docs.field_schema(kind | str | None) == {"enum": ["a", "b", None]}
    assert config_docs.field_schema(Literal["x", "y"]) == {"enum": ["x", "y"]}
    assert config_docs.field_schema(Literal["x", "x_[number of steps]"]) == {"type": ["string"]}


def test_no_sentence_of_the_schema_is_cut_at_a_comma():
    """YAML takes `{description: this, and that}` for two keys, the second without a value."""

    def cut(value) -> list[str]:
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        found = [str(key) for key in value if " " in str(key)] if isinstance(value, dict) else []
        return found + [key for item in items for key in cut(item)]

    assert cut(SCHEMA) == []
