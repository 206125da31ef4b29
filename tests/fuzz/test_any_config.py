"""Any config is resolved, the same way each time, or refused with all that is wrong with it."""

import copy
import random

import pytest
import yaml
from examples import examples
from fuzz.anything import SCALARS, TEXTS, deep, nested, one_error
from hypothesis import given
from hypothesis import strategies as st
from workflow import ROOT

from moult.errors import MoultError
from moult.files import canonical
from moult.workflow.config import load_schema, resolve
from moult.workflow.stages import encoded_as, measured_as, stage_settings

SCHEMA = load_schema(str(ROOT / "config"))
SHIPPED = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
STAGES = ("fetch_model", "encode", "plan", "finetune", "merge", "evaluate_base", "evaluate_tuned", "score")
VALUES = nested(depths=(50, 200))  # what the tests themselves can copy
REGEXES = ["(x)", "x{1,99999999999}", "(" * 3, "(" * 300 + ")" * 300]


def known(node: dict) -> dict:
    """A schema's node with its references followed."""
    while "$ref" in node:
        target = SCHEMA
        for part in node["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        node = {**target, **{key: value for key, value in node.items() if key != "$ref"}}
    return node


def of(node: dict, depth: int = 0):
    """Values for a schema's node: mostly of the right kind, now and then of any."""
    node = known(node)
    right = []
    properties = {name: of(below, depth + 1) for name, below in node.get("properties", {}).items()} if depth < 4 else {}
    other = node.get("additionalProperties")
    if properties:
        right.append(
            st.lists(st.sampled_from(sorted(properties)), max_size=3, unique=True).flatmap(
                lambda names: st.fixed_dictionaries({name: properties[name] for name in names})
            )
        )
    if isinstance(other, dict):
        right.append(
            st.dictionaries(st.sampled_from(["a", "b", "A", "prepared", "a.b-c"]), of(other, depth + 1), max_size=2)
        )
    if "enum" in node:
        right.append(st.sampled_from(node["enum"]))
    if "items" in node:
        right.append(st.lists(of(node["items"], depth + 1), max_size=2))
    types = node.get("type", [])
    for kind in [types] if isinstance(types, str) else types:
        right += {
            "string": [
                st.sampled_from(["a", "b", "m/n", "demo"]),
                st.sampled_from(REGEXES if "format" in node else ["x"]),
                TEXTS,
            ],
            "integer": [st.integers(-1, 9), st.sampled_from(["3", "1e3", 2.0, 10**30])],
            "number": [st.floats(0, 1), st.sampled_from(["1e-4", "inf", 10**400])],
            "boolean": [st.booleans(), st.sampled_from(["true", "false"])],
            "null": [st.none()],
            "array": [st.lists(SCALARS, max_size=2)],
            "object": [st.dictionaries(TEXTS, VALUES, max_size=2)],
        }[kind]
    return st.integers(0, 30).flatmap(lambda number: VALUES if number == 0 or not right else st.one_of(right))


CONFIGS = of(SCHEMA).filter(lambda config: isinstance(config, dict))


def shuffled(value, order: random.Random):
    if isinstance(value, dict):
        items = list(value.items())
        order.shuffle(items)
        return {key: shuffled(item, order) for key, item in items}
    return [shuffled(item, order) for item in value] if isinstance(value, list) else value


def outcome(config):
    """The resolved config in one spelling, or the set of the keys that are wrong."""
    try:
        return canonical(resolve(config, SCHEMA))
    except MoultError as error:
        one_error(error).encode()
        assert all(len(problem) < 700 for problem in error.problems)
        return frozenset(problem.partition(": ")[0] for problem in error.problems)


def check(config: dict) -> None:
    given_as = copy.deepcopy(config)
    result = outcome(config)
    assert config == given_as
    assert outcome(shuffled(config, random.Random(0))) == result
    if isinstance(result, frozenset):
        return
    resolved = resolve(config, SCHEMA)
    assert canonical(resolve(resolved, SCHEMA)) == result
    for run in resolved["runs"]:
        assert encoded_as(resolved)[run] in resolved["runs"] and measured_as(resolved)[run] in resolved["runs"]
        for stage in STAGES:
            canonical(stage_settings(resolved, stage, run)).encode()
    for dataset in resolved["datasets"]:
        canonical(stage_settings(resolved, "prepare", dataset)).encode()


@examples(60)
@given(config=CONFIGS)
def test_any_config(config):
    check(config)


@examples(150)
@given(changes=st.lists(st.tuples(st.randoms(use_true_random=False), VALUES | SCALARS), min_size=1, max_size=3))
def test_any_change_of_the_shipped_config(changes):
    """A value somewhere in it is replaced, or a key added."""
    config = copy.deepcopy(SHIPPED)
    for draw, value in changes:
        place = config
        while True:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            key = draw.choice([*keys, "new"]) if isinstance(place, dict) or not keys else draw.choice(keys)
            below = place[key] if key in keys else None
            if not isinstance(below, dict | list) or not below or draw.random() < 0.2:
                break
            place = below
        if isinstance(place, dict) or key in keys:
            place[key] = value
    check(config)


@examples(60)
@given(
    text=st.dictionaries(st.sampled_from([*SCHEMA["properties"]]), SCALARS, max_size=3).map(yaml.safe_dump)
    | st.text(max_size=40)
)
def test_any_yaml(text):
    try:
        config = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return  # Snakemake says where
    if isinstance(config, dict):
        outcome(config)


@pytest.mark.parametrize("depth", [50, 400, 5000, 100_000])
def test_any_depth(depth):
    outcome({**SHIPPED, "pathvars": {"x": deep(depth)}})
