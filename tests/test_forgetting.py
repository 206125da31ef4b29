"""What shows what tuning has broken: the general text and the instructions are whole, and none is there twice."""

import json
import re

import pytest
import yaml
from jsonschema import Draft202012Validator
from workflow import ROOT, checkout, edit_config, snakemake

from moult.measuring.checks import check
from moult.measuring.forgetting import general_texts, instructions

# An answer that each instruction asks for. Those that name a fact are answered by it.
ANSWERS = {
    "one-word": "Cold.",
    "yes-or-no": "Yes",
    "only-the-number": "8",
    "list-three": "- apple\n- pear\n- plum",
    "numbered-list": "1. Spring\n2. Summer\n3. Autumn\n4. Winter",
    "json-object": '{"name": "Ada", "age": 36}',
    "json-list": "[1, 2, 3, 4, 5]",
    "repeat": "The grey goose sleeps under the bridge.",
    "upper-case": "RIVER",
    "short-sentence": "The sea is a wide and restless plain of salt water.",
    "ends-with": "The cat has washed its paws and is done.",
    "sorted": "apple, fig, pear",
    "days": "Thursday",
    "sum": "42",
    "hello-python": "print('hello')",
    "two-words": "Good morning!",
    "bracket": "[stone]",
    "table": "| Animal | Sound |\n|---|---|\n| Dog | woof |",
    "in-german": "Menschen trinken Wasser, weil ihr Körper ohne Flüssigkeit nicht leben kann.",
    "in-french": "Un parapluie sert à se protéger de la pluie quand on marche dehors.",
    "in-spanish": "Una llave sirve para abrir y cerrar la puerta de una casa.",
    "translate": "The dog is sleeping.",
    "follow-up": "Olga",
    "follow-up-format": "blue",
    "capital-france": "Paris.",
    "capital-italy": "The capital of Italy is Rome.",
    "capital-greece": "It is Athens.",
    "capital-cuba": "Havana",
    "capital-kenya": "Nairobi",
    "sum-8-9": "8 plus 9 is 17.",
    "sum-6-6": "12",
    "sum-11-12": "23",
    "minutes-2-hours": "There are 120 minutes in 2 hours.",
    "days-3-weeks": "21 days",
    "grams-4-kilograms": "4,000 grams",
    "centimetres-2-metres": "200 centimetres.",
}


def test_the_general_text_is_many_short_texts_of_many_kinds():
    texts = general_texts()
    assert len(texts) == len(set(texts.values())) == 128
    assert all(100 <= len(text.encode()) <= 1200 and text == text.strip() for text in texts.values())
    assert not any("=== " in text for text in texts.values())
    kinds = [id.split("-")[0] for id in texts]
    assert {"en", "de", "fr", "es", "zh", "ru", "ar", "code", "math", "chat"} <= set(kinds)
    assert max(map(kinds.count, kinds)) <= 32  # no kind decides alone


def test_the_instructions_are_as_the_config_has_prompts():
    entries = instructions()
    assert len({entry["id"] for entry in entries}) == len(entries)
    schema = yaml.safe_load((ROOT / "config" / "schema.yaml").read_text())
    prompts = schema["$defs"]["eval"]["properties"]["prompts"]
    Draft202012Validator({"$defs": schema["$defs"], **prompts}).validate(entries)


@pytest.mark.parametrize("entry", instructions(), ids=lambda entry: entry["id"])
def test_an_instruction_can_be_followed_and_not(entry):
    assert all(check(ANSWERS[entry["id"]], entry["expect"]).values())
    for other in ("", '{"answer": "1111"}', "I am sorry, I do not know what you mean by that."):
        assert not all(check(other, entry["expect"]).values())


@pytest.mark.slow
def test_a_tuning_that_destroys_plain_chat_is_not_called_helped(tmp_path):
    """100 times the demo's learning rate: the loss is still better than the base's, which has never seen the format."""
    folder = checkout(tmp_path)

    def faster(config):
        config["runs"]["demo"]["train"]["learning_rate"] *= 100

    edit_config(folder, faster)
    snakemake(folder, "results/demo/metrics.json")
    verdict = json.loads((folder / "results/demo/metrics.json").read_text())["verdict"]
    assert verdict["verdict"] != "helped" and "loss" in verdict["better"]
    assert "instructions passed" in verdict["worse"]
    assert any(re.match(r"instructions passed worse: -\d+\.\d points \[", reason) for reason in verdict["reasons"])
