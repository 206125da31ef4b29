"""config/recipes: every whole config is planned and dry-run, and the tables in the README are what the command makes."""

import sys
from argparse import Namespace

import pytest
import yaml
from config_only import make_config_only
from planning import EVAL, Log
from tiny import make_tokens
from workflow import ROOT, checkout, snakemake

import plan
from moult.files import read_json

sys.path.insert(0, str(ROOT / "scripts" / "tools"))

import recipe_tables

RECIPES = sorted((ROOT / "config" / "recipes").glob("*.yaml"))
README = (ROOT / "config" / "recipes" / "README.md").read_text(encoding="utf-8")

each_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def target_of(path) -> str:
    """What a recipe is for: the page of its sweep, or the metrics of its dataset's own run."""
    config = yaml.safe_load(path.read_text())
    if "sweeps" in config:
        (sweep,) = config["sweeps"]
        return f"results/sweeps/{sweep}.html"
    (dataset,) = config["datasets"]
    return f"results/{dataset}/metrics.json"


def test_there_are_recipes_and_no_more_in_the_table():
    assert len(RECIPES) == 11
    assert all(f"[{path.name}]({path.name})" in README for path in RECIPES)


@pytest.mark.slow
@each_recipe
def test_a_recipe_is_planned(path, tmp_path):
    """From the config of its model alone, with rows as long as it allows; what plan needs is what the README says."""
    section, settings, length = recipe_tables.plan_settings(yaml.safe_load(path.read_text()))
    shape = recipe_tables.SHAPES[section["name"]]
    base = make_config_only(tmp_path / "base", shape)
    files = list((tmp_path / "base").glob("*.safetensors"))
    assert all(file.stat().st_blocks < 10_000 for file in files)  # holes
    tokens = make_tokens(tmp_path / "tokens", length=length, vocabulary=shape["vocab_size"])
    log, out = Log(), tmp_path / "plan.json"
    plan.plan(settings, Namespace(model=str(base), tokens=str(tokens), eval=EVAL, out=str(out)), log)
    result = read_json(out)
    memory = result["memory"]
    assert memory["how"] == "simulated" and memory["attention"] == "flash"
    gigabytes = settings["train"]["gpu_memory"]
    if gigabytes:
        assert recipe_tables.fitting(memory, gigabytes) != "no"
        assert not any("may run out of memory" in line for line in log.lines)
    assert result["batches"] == recipe_tables.EXACT


@pytest.mark.slow
@each_recipe
def test_a_recipe_is_dry_run(path, tmp_path):
    folder = checkout(tmp_path)
    for dataset in yaml.safe_load(path.read_text())["datasets"].values():
        if dataset["source"].startswith("data/"):
            (folder / "data").mkdir(exist_ok=True)
            (folder / dataset["source"]).touch()
    profile = ["--profile", "slurm"] if "slurm" in path.stem else []
    command = [*profile, target_of(path), "-n", "--configfile", f"config/recipes/{path.name}"]
    output = snakemake(folder, *command, cores=None if profile else 1)
    assert "finetune" in output and "score" in output


def test_what_the_recipes_say_to_type_names_them():
    for path in RECIPES:
        text = path.read_text()
        assert f"--configfile config/recipes/{path.name}" in text
        assert f" {target_of(path)} " in text


def test_a_row_of_the_tables():
    """One recipe; all of them are in make test-all."""
    path = ROOT / "config" / "recipes" / "laptop-0.6b.yaml"
    assert f"| {' | '.join(recipe_tables.recipe_row(path))} |" in README


@pytest.mark.slow
def test_the_tables_are_what_the_command_makes():
    assert recipe_tables.page() == README
