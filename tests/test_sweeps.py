"""sweeps: the runs that they make, what is refused, the page, and what the workflow runs once for all of them."""

import json
import re
import subprocess
import sys

import pytest
from browser import needs_chromium, problems
from configs import SCHEMA, config
from workflow import ROOT, checkout, set_key, snakemake

from moult.files import read_json, write_json, write_jsonl
from moult.pages.page import duration
from moult.workflow.config import ConfigError, resolve
from moult.workflow.stages import STAGES, encoded_as, measured_as, stage_settings
from moult.workflow.sweeps import asked_for, combinations, shortened, sweep_settings

# --- the runs ---------------------------------------------------------------------------------------------------------

LR = """
sweeps:
  lr:
    dataset: a
    over: {train.learning_rate: [1.0e-4, 3.0e-4, 1.0e-3], lora.r: [8, 32]}
    seeds: [0, 1, 2]
    train: {max_steps: 9}
"""
NAMES = [f"lr-learning_rate{rate}-r{rank}" for rate in ("1e-4", "3e-4", "1e-3") for rank in (8, 32)]


def test_a_run_for_each_combination_and_seed():
    resolved = config(LR, "lora: {lora_alpha: 5}\ntrain: {warmup_steps: 3}")
    runs = resolved["runs"]
    seeds = [f"{name}-seed{seed}" for name in NAMES for seed in (1, 2)]
    assert set(runs) == {"a", "b", *NAMES, *seeds}
    run = runs["lr-learning_rate3e-4-r32"]
    assert (run["dataset"], run["seeds"], run["seed"]) == ("a", [0, 1, 2], 0)
    assert (run["train"]["learning_rate"], run["train"]["max_steps"], run["train"]["warmup_steps"]) == (3e-4, 9, 3)
    assert (run["lora"]["r"], run["lora"]["lora_alpha"]) == (32, 5)
    assert runs["lr-learning_rate3e-4-r32-seed2"] == {key: run[key] for key in run if key != "seeds"} | {"seed": 2}
    assert asked_for(resolved) == ["a", "b"]


def test_what_is_resolved_can_be_resolved_again():
    resolved = config(LR)
    assert resolve(resolved, SCHEMA) == resolved


def test_they_differ_only_where_the_swept_keys_are_read_and_share_the_rest():
    resolved = config(LR)
    one, other = NAMES[0], NAMES[-1]
    differ = {
        stage for stage in STAGES if stage_settings(resolved, stage, one) != stage_settings(resolved, stage, other)
    }
    assert differ == {"plan", "finetune", "report"}
    for owners in (encoded_as(resolved), measured_as(resolved)):
        assert {owners[name] for name in resolved["runs"] if name.startswith("lr-")} == {"a"}


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (1e-4, "1e-4"),
        (2.5e-5, "2.5e-5"),
        (3e-3, "3e-3"),
        (0.05, "0.05"),
        (0.1, "0.1"),
        (2.0, "2"),
        (64, "64"),
        (1000000, "1000000"),
        (1e6, "1e6"),
        (0.0, "0"),
        (-1, "-1"),
        (True, "_true"),
        (None, "_null"),
        ("cosine", "_cosine"),
        ("Qwen/Qwen3-8B", "_Qwen3-8B"),
        ("a b/c: d", "_c-d"),
        (".*", "7"),
        (["q_proj", "v_proj"], "7"),
        ({"a": 1}, "7"),
    ],
)
def test_a_value_in_a_name(value, name):
    assert shortened(value, 7) == name


def test_a_name_has_the_section_only_where_it_needs_it():
    keys = {"lora.bias": ["none"], "train.bias": ["x"], "lora.r": [8]}
    assert combinations("s", {"over": keys}) == [
        ("s-lora.bias_none-train.bias_x-r8", {"lora.bias": "none", "train.bias": "x", "lora.r": 8})
    ]


def test_values_are_what_the_key_takes():
    """YAML reads 1e-4 as text."""
    resolved = config("sweeps: {s: {dataset: a, over: {train.learning_rate: [1e-4, '3e-4'], train.packing: [true]}}}")
    assert [name for name in resolved["runs"] if name.startswith("s-")] == [
        "s-learning_rate1e-4-packing_true",
        "s-learning_rate3e-4-packing_true",
    ]
    assert resolved["runs"]["s-learning_rate1e-4-packing_true"]["train"]["learning_rate"] == 1e-4


def test_a_sweep_may_name_another_model_and_sweep_over_models():
    resolved = config(
        "sweeps: {m: {dataset: a, over: {model.name: [org/x, org/y]}, model: {dtype: float16}, eval: {max_rows: 9}}}"
    )
    runs = resolved["runs"]
    assert [runs[name]["model"]["name"] for name in ("m-name_x", "m-name_y")] == ["org/x", "org/y"]
    assert runs["m-name_x"]["model"]["dtype"] == "float16" and runs["m-name_x"]["model"]["chat_template"] is None
    assert runs["m-name_x"]["eval"]["max_rows"] == 9


def test_a_sweep_can_be_removed_by_another_config_file():
    assert set(config(LR, "sweeps: {lr: null}")["runs"]) == {"a", "b"}
    assert set(config(LR, "datasets: {a: null}")["runs"]) == {"b"}


def over(text: str, more: str = "") -> str:
    return f"{{lr: {{dataset: a, over: {text}{more}}}}}"


@pytest.mark.parametrize(
    ("sweeps", "problem"),
    [
        (over("{train.lerning_rate: [1, 2]}"), "over.train.lerning_rate: unknown key; did you mean learning_rate?"),
        (over("{train.lr: [1, 2]}"), "over.train.lr: unknown key; did you mean learning_rate?"),
        (over("{learning_rate: [1, 2]}"), "over.learning_rate: unknown key; did you mean train.learning_rate?"),
        (over("{train.r: [1, 2]}"), "over.train.r: unknown key here; it belongs in lora"),
        (over("{lr: [1, 2]}"), "over.lr: unknown key; did you mean train.learning_rate?"),
        (over("{train.output_dir: [a, b]}"), "over.train.output_dir: not yours to set: checkpoints go to"),
        (over("{eval.max_rows: [1, 2]}"), "over.eval.max_rows: not yours to set: it changes how runs are measured"),
        (over("{seed: [1, 2]}"), "over.seed: not yours to set: it is the sweep's seeds"),
        (over("{train.learning_rate: []}"), "over.train.learning_rate: [] should be non-empty"),
        (over("{train.learning_rate: [0.1, 1e-1]}"), "over.train.learning_rate: [0.1, 0.1] has non-unique elements"),
        (over("{train.learning_rate: 0.1}"), "over.train.learning_rate: expected array, got 0.1"),
        (over("{train.learning_rate: [0.1, fast]}"), "over.train.learning_rate.1: expected number, got 'fast'"),
        (over("{train.learning_rate: [0.1, 0]}"), "over.train.learning_rate.1: must be > 0, got 0"),
        (over("{}"), "over: {} should be non-empty"),
        (over("{lora.r: [8]}"), "over: makes one run, and nothing to rank; give a key two values or more"),
        (
            over(f"{{lora.r: {list(range(1, 21))}, lora.lora_alpha: {list(range(1, 21))}}}"),
            "over: makes 400 runs, and a sweep has at most 100; leave values out",
        ),
        (over("{lora.r: [8, 9]}", ", lora: {r: 4}"), "lora.r: is swept, too; leave one of the two out"),
        (over("{lora.r: [8, 9]}", ", seeds: [1]"), "seeds: [1] is too short"),
        (over("{lora.r: [8, 9]}", ", serve: {port: 1}"), "serve: unknown key"),
        (
            over("{model.name: [x/one, y/one]}"),
            "over: two of its runs would be named lr-name_one; leave one of the values out",
        ),
        (
            f"{{{'x' * 60}: {{dataset: a, over: {{lora.r: [8, 1000]}}}}}}",
            f"its run {'x' * 60}-r1000 has a name of 66 characters, and 64 are possible",
        ),
        ("{lr: {dataset: aa, over: {lora.r: [8, 9]}}}", "dataset: no dataset is named aa; did you mean a?"),
        ("{lr: {over: {lora.r: [8, 9]}}}", "dataset: missing"),
        (over("{lora.r: [8, 9]}", ", eval: {perplexity: false, row_expect: {exact: true}}"), "it ranks by nats"),
        (
            "{lr: {dataset: a, over: {lora.r: [8, 9]}}, lr-r8: {dataset: a, over: {train.max_steps: [8, 9]}}}\n"
            "runs: {lr-r9: {dataset: b}}",
            "makes the run lr-r9, which is there with other settings; rename the sweep",
        ),
        (
            over("{lora.r: [8, 9]}") + "\noverride: {lora: {r: 4}}",
            "over.lora.r: override.lora.r replaces all its values; leave one of the two out",
        ),
        (
            over("{lora.r: [8, 9]}") + "\ndatasets: {lr-r8: {source: c.jsonl}}",
            "dataset: lr-r8 is a dataset, and the run of that name is its own; rename the sweep",
        ),
    ],
)
def test_refused(sweeps, problem):
    with pytest.raises(ConfigError) as error:
        config(f"sweeps: {sweeps}")
    [found] = error.value.problems
    name = "lr" if "xxx" not in sweeps else "x" * 60
    assert re.fullmatch(rf"sweeps\.{name}[.:] ?{re.escape(problem)}.*", found), found


# --- the page ---------------------------------------------------------------------------------------------------------


def made(folder, settings: dict, loss, noise: float = 0.001) -> list[str]:
    """The files of the runs of a sweep, and the arguments that name them. `loss`: of a run, from its values."""
    paths: dict[str, list[str]] = {"metrics": [], "likelihoods": [], "adapters": []}
    for run, of in settings["runs"].items():
        rate = {"value": 0.5}
        seeds = {"measurements": {"rows passed": {"by_seed": [0.1, 0.2, 0.3]}}}
        metrics = {"verdict": {"verdict": "helped"}, "data": {"measured_on": "test"}}
        metrics |= {"answers": {"rows": {"passed": {"base": rate, "tuned": rate}}}, "seeds": seeds}
        paths["metrics"].append(str(folder / run / "metrics.json"))
        write_json(paths["metrics"][-1], metrics)
        for seed, trained in enumerate(of["trained"]):
            rows = [
                {"id": str(row), "group": str(row), "tokens": 10, "bytes": 40}
                | {"nll": 10 * (loss(of["values"]) + noise * seed + 0.01 * ((row * 7 + seed * 3) % 5))}
                for row in range(40)
            ]
            paths["likelihoods"].append(str(folder / trained / "likelihood.jsonl"))
            write_jsonl(paths["likelihoods"][-1], rows)
            paths["adapters"].append(str(folder / trained / "adapter.json"))
            adapter = {
                "throughput": {"seconds": 5.0, "tokens_per_second": 100.0},
                "settings": {"train": {"gpu": 2}},
                "hardware": {"device": "cuda"},
                "steps": 9,
            }
            write_json(paths["adapters"][-1], adapter)
    return [text for name, own in paths.items() for text in (f"--{name}", *own)]


def page_of(folder, name: str, resolved: dict, loss, **more) -> tuple[dict, str]:
    settings = sweep_settings(resolved, name)
    command = [sys.executable, str(ROOT / "scripts" / "sweep.py"), "--sweep", name, "--settings", json.dumps(settings)]
    command += [*made(folder, settings, loss, **more), "--page", "page.html", "--ranking", "ranking.json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return read_json(folder / "ranking.json"), (folder / "page.html").read_text(encoding="utf-8")


def test_the_page_and_the_ranking(tmp_path):
    best = {"train.learning_rate": 3e-4, "lora.r": 32}
    ranking, page = page_of(tmp_path, "lr", config(LR), lambda values: 1.0 if values == best else 1.3)
    assert ranking["winner"] == "lr-learning_rate3e-4-r32" and ranking["level"] == [ranking["winner"]]
    assert ranking["places"][0]["values"] == best and ranking["seeds"] == [0, 1, 2]
    assert ranking["places"][0]["run"] == ranking["winner"]
    assert ranking["places"][0]["passed"] == {"rows": pytest.approx(0.7)}
    assert ranking["places"][0]["device_seconds"] == 3 * 5.0 * 2
    assert "lr-learning_rate3e-4-r32 is the winner: better than each of the other 5 runs." in page
    assert page.count("<tr>") == 2 * (1 + 6) and page.count("<figure>") == 2
    assert "slightly too good" in page and "test_source" in page
    assert "style=" not in page and 'class="sortable"' in page


def test_without_a_winner_all_that_are_level_are_named(tmp_path):
    rates = {1e-4: 1.0, 3e-4: 1.0005, 1e-3: 1.5}
    ranking, page = page_of(tmp_path, "lr", config(LR), lambda values: rates[values["train.learning_rate"]])
    assert ranking["winner"] is None and len(ranking["level"]) == 4
    assert (
        "No winner: lr-learning_rate1e-4-r8 has the lowest loss, and 3 of the other 5 runs cannot be told from it."
        in page
    )
    for run in ranking["level"]:
        assert f"<strong>{run}</strong>" in page
    assert [place["behind"]["worse"] for place in ranking["places"][4:]] == [True, True]


def test_one_seed_is_said_to_be_one(tmp_path):
    text = (
        "sweeps: {s: {dataset: a, over: {train.lr_scheduler_type: [cosine, linear], lora.target_modules: [[a], [b]]}}}"
    )
    ranking, page = page_of(tmp_path, "s", config(text), lambda values: 1.0)
    assert "Each run was trained once." in page and "Each seed" not in page
    assert ranking["between_seeds"] is None and ranking["seeds"] == [0]
    assert len(ranking["level"]) == 4 and "none of the 4 runs is clearly better or worse" in page


def test_a_hundred_runs_are_a_page(tmp_path):
    text = f"sweeps: {{s: {{dataset: a, over: {{lora.r: {list(range(1, 26))}, lora.lora_alpha: [1, 2, 3, 4]}}}}}}"
    ranking, page = page_of(tmp_path, "s", config(text), lambda values: 1 + values["lora.r"] / 10)
    assert len(ranking["places"]) == 100 and ranking["pairs"] == 4950
    assert len(page) < 3_000_000 and "25 lines" in page


@needs_chromium
@pytest.mark.parametrize(
    "over",
    [
        "{train.learning_rate: [1.0e-4, 3.0e-4, 1.0e-3], lora.r: [8, 32]}",
        "{model.chat_template: ['</td><script>alert(1)</script>', chatml], train.packing: [true, false]}",
        "{lora.r: [1, 2, 3, 4, 5, 6, 7, 8, 9], lora.lora_alpha: [1, 2, 4, 8, 16, 32, 64, 128, 256]}",
    ],
)
def test_the_page_in_a_browser(over, tmp_path):
    resolved = config(f"sweeps: {{s: {{dataset: a, over: {over}, seeds: [0, 1, 2]}}}}")
    page_of(tmp_path, "s", resolved, lambda values: 1 + len(str(values)) / 1000)
    assert problems(tmp_path / "page.html") == []


@pytest.mark.parametrize(("seconds", "text"), [(5.4, "5 s"), (600, "10 min"), (100_000, "27.8 h")])
def test_device_time(seconds, text):
    assert duration(seconds) == text


# --- the workflow -----------------------------------------------------------------------------------------------------


def small_sweep(folder, over: dict, seeds: list[int]) -> None:
    """Of the demo, with few steps and no questions. Its settings are its run's own, so the sweep says them again."""
    eval_settings = {"forgetting": False, "answer_rows": 2, "max_new_tokens": 4, "resamples": 200}
    train = {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    own = {"dataset": "demo", "over": over, "seeds": seeds, "model": {"name": "config/demo/base"}}
    set_key("sweeps", "lr", value=own | {"train": train, "eval": eval_settings})(folder)


def counted(output: str) -> dict[str, int]:
    return {
        rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", output[output.index("Job stats:") :], re.M)
    }


@pytest.mark.slow
def test_what_eighteen_trainings_share_runs_once(tmp_path):
    folder = checkout(tmp_path)
    small_sweep(folder, {"train.learning_rate": [1e-3, 3e-3], "lora.r": [4, 8, 16]}, [0, 1, 2])
    jobs = counted(snakemake(folder, "-n", "results/sweeps/lr.html"))
    del jobs["total"]
    trained = {"plan", "finetune", "merge", "evaluate_tuned"}
    assert {rule for rule, count in jobs.items() if count == 18} == trained
    assert {rule for rule, count in jobs.items() if count == 1} >= {"prepare", "encode", "evaluate_base", "sweep"}
    assert jobs.pop("score") == 6 and set(jobs.values()) == {1, 18}
    everything = counted(snakemake(folder, "-n"))
    assert everything["finetune"] == 1 and "sweep" not in everything
    assert "MissingRuleException" in snakemake(folder, "-n", "results/sweeps/other.html", code=1)


@pytest.mark.slow
def test_a_sweep_of_the_demo(tmp_path):
    """Two runs with two seeds, to the page. Nothing runs again, and a changed look makes only the page."""
    folder = checkout(tmp_path)
    small_sweep(folder, {"train.learning_rate": [1e-5, 3e-3]}, [0, 1])
    snakemake(folder, "results/sweeps/lr.html")
    ranking = read_json(folder / "results" / "sweeps" / "lr.json")
    by_seed = {place["run"]: place["loss"]["by_seed"] for place in ranking["places"]}
    assert set(by_seed) == {"lr-learning_rate1e-5", "lr-learning_rate3e-3"}
    for run, losses in by_seed.items():
        likelihood = read_json(folder / "results" / run / "metrics.json")["likelihood"]
        assert losses[0] == pytest.approx(likelihood["tuned"]["nll_per_token"]["value"], rel=1e-12)
        assert len(losses) == 2 and losses[0] != losses[1]
    assert "Nothing to be done" in snakemake(folder, "-n", "results/sweeps/lr.html")
    look = folder / "scripts" / "moult" / "pages" / "look" / "sweep.html"
    look.write_text(look.read_text() + "\n")
    jobs = counted(snakemake(folder, "-n", "results/sweeps/lr.html"))
    assert jobs == {"sweep": 1, "total": 1}
