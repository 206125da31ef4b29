"""The page and the table of all runs."""

import csv
import re
from argparse import Namespace

import pytest
from browser import needs_chromium, opened, problems
from comparing import ATTACK, OPTIONS, cells, edit, edit_rows, make_run, samples, words
from planning import Log

import summary
from moult.errors import MoultError
from moult.files import read_json
from moult.measuring.answer_ranking import rank_answers


def make(results, runs: dict[str, str]) -> tuple[str, list[dict]]:
    """(the page, the lines of the table) of {run: dataset}."""
    page, table = results / "summary.html", results / "summary.tsv"
    arguments = Namespace(runs=[str(results / run) for run in runs], page=str(page), table=str(table))
    summary.summarise({run: {"dataset": dataset, **OPTIONS} for run, dataset in runs.items()}, arguments, Log())
    with table.open(newline="", encoding="utf-8") as file:
        return page.read_text(encoding="utf-8"), list(csv.DictReader(file, dialect="excel-tab"))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """good is better than the others by all measures; same is its twin but for a little noise in the losses."""
    results = tmp_path_factory.mktemp("results")
    make_run(results, "good", better=1.0, gpu=4, seconds=1800.0)
    make_run(results, "same", {"lora": {"r": 64}}, better=1.0)
    make_run(results, "bad", better=0.5, right=0.5)
    edit_rows(
        results / "same/tuned/likelihood.jsonl",
        lambda index, row: row.update(nll=row["nll"] + (-1) ** (index // 2) * 0.3 + 0.01),
    )
    return results


def test_the_best_of_a_dataset_and_whether_the_second_is_behind(three):
    page, _ = make(three, dict.fromkeys(("bad", "same", "good"), "d"))
    text = words(page)
    assert re.search(r"By loss, good is the best: [\d.]+ nats per token on the 40 rows that all have\.", text)
    assert re.search(
        r"The second, same, has \+0\.\d+ nats per token \[-[\d.e-]+, \+[\d.]+\]\. This may be chance", text
    )
    assert "corrected for 3 pairs of runs by Holm's method" in text
    against = cells(page, "Against the best of d")
    assert [line[1] for line in against] == ["good", "same", "bad", "good", "same", "bad"]
    assert [line[5] for line in against] == ["", "may be chance", "clearly", "", "may be chance", "clearly"]
    # Of 1 prompt, 40 rows and 24 instructions, 12 of the instructions pass, and half of the rows of bad.
    assert [line[2] for line in against[3:]] == [f"{100 * passed / 65:.4g}" for passed in (53, 53, 33)]


def test_datasets_are_not_compared_with_each_other(three):
    page, lines = make(three, {"bad": "d", "same": "e", "good": "d"})
    assert re.findall(r"<h2>Dataset (\w+): which run is the best\?</h2>", page) == ["d"]
    assert {line[1] for line in cells(page, "Against the best of d")} == {"good", "bad"}
    assert [(line["run"], line["dataset"]) for line in lines] == [("good", "d"), ("bad", "d"), ("same", "e")]


def test_the_table_has_all_digits(three):
    _, lines = make(three, dict.fromkeys(("good", "same"), "d"))
    metrics = read_json(three / "good/metrics.json")
    good, same = lines
    difference = metrics["likelihood"]["difference"]["nll_per_token"]
    assert float(good["loss: difference"]) == difference["value"]
    assert [float(good["loss: low"]), float(good["loss: high"])] == difference["interval"]
    assert float(good["rows passed: tuned"]) == 100 * metrics["answers"]["rows"]["passed"]["tuned"]["value"]
    assert (good["verdict"], good["base"]) == (metrics["verdict"]["verdict"], metrics["provenance"]["base"]["name"])
    assert (same["r"], same["learning_rate"], same["epochs"]) == ("64", "0.001", "2")


def test_gpu_hours_count_each_gpu_and_a_cpu_is_none(three):
    page, (good, same) = make(three, dict.fromkeys(("good", "same"), "d"))
    assert (good["hours"], good["hours_of"], good["gpus"], good["tokens"]) == ("2.0", "GPU", "4", "180000")
    assert (same["hours"], same["hours_of"], same["gpus"]) == ("1.0", "CPU", "0")
    assert "2 GPU h" in words(page) and "1 CPU h" in words(page)


def test_one_run_is_shown_and_compared_with_nothing(three):
    page, lines = make(three, {"good": "d"})
    assert "Summary of 1 run<" in page and "which run is the best" not in page and len(lines) == 1


def test_without_runs_there_is_a_page_that_says_so(tmp_path):
    page, lines = make(tmp_path, {})
    assert "The config has no run." in page and lines == []


def test_runs_without_shared_rows_say_so(three, tmp_path):
    make_run(tmp_path, "a", better=1.0)
    make_run(tmp_path, "b", better=1.0)
    edit_rows(tmp_path / "b/tuned/likelihood.jsonl", lambda index, row: row.update(id=f"other {index}"))
    text = words(make(tmp_path, {"a": "d", "b": "d"})[0])
    assert "The losses cannot be compared" in text and "have no measured rows in common" in text
    assert "By answers that pass" in text


def test_a_run_with_seeds_shows_what_is_between_them(three, tmp_path):
    folder = make_run(tmp_path, "a", better=1.0)
    spread = {
        "unit": "nats per token",
        "by_seed": [-1.0, -1.2],
        "mean": -1.1,
        "standard_deviation": 0.14,
        "interval": [-2, 0],
    }
    seeds = {"trained": [{"seed": 0}, {"seed": 1}], "measurements": {"loss": spread}}
    edit(folder / "metrics.json", lambda metrics: metrics.update(seeds=seeds))
    page, lines = make(tmp_path, {"a": "d"})
    assert "a: 2 seeds" in words(page) and "loss, 2 seeds: -1.1 nats per token on average" in words(page)
    assert lines[0]["seeds"] == "2"


def test_prompts_in_the_training_rows_do_not_count(three, tmp_path):
    """b fails only the prompt that is in the training rows."""
    for name in "ab":
        folder = make_run(tmp_path, name, better=1.0)
        found = {"policy": "exclude", "prompts": ["a"], "benchmarks": {}, "training_rows": 1}
        edit(folder / "metrics.json", lambda metrics, found=found: metrics.update(contamination=found))
    edit_rows(
        tmp_path / "b/samples.jsonl",
        lambda _, sample: sample["kind"] == "prompt" and sample["tuned"].update(checks={"contains": False}),
    )
    against = cells(make(tmp_path, {"a": "d", "b": "d"})[0], "Against the best of d")
    rates = {line[1]: line[2] for line in against if line[0].startswith("answers")}
    assert rates["a"] == rates["b"]


def test_many_rows_make_a_small_harmless_page(tmp_path):
    runs = {f"run-{number}": "d" for number in range(6)}
    for number, name in enumerate(runs):
        folder = make_run(tmp_path, name, better=number / 10, rows=1000)
        edit(folder / "metrics.json", lambda metrics: metrics["provenance"]["base"].update(name=ATTACK * 1000))
    page, _ = make(tmp_path, runs)
    assert len(page.encode()) < 300_000
    assert page.count("<script>") == 1 and "<img" not in page and "\u202e" not in page and "\x00" not in page
    assert "⟨U+202E⟩" in page and "more characters)" in page


@needs_chromium
def test_what_a_browser_makes_of_it(three):
    make(three, {"good": "d", "same": "e", "bad": "d"})
    assert problems(three / "summary.html") == []
    with opened(three / "summary.html") as (tab, _):
        column = tab.locator("#runs tbody th")
        tab.locator("select[name=from]").select_option("d")
        assert sorted(column.filter(visible=True).all_inner_texts()) == ["bad", "good"]
        tab.locator("select[name=from]").select_option("")
        tab.locator("#runs th", has_text="hours").locator("button").click()
        assert column.all_inner_texts()[0] == "good"  # two GPU hours, the others one of a CPU


# --- the ranking of answers -------------------------------------------------------------------------------------------


def test_answers_are_ranked_by_hand():
    found = rank_answers(
        {"b": samples([True] * 20 + [False] * 20), "a": samples([True] * 40), "c": samples([True] * 39 + [False])}, 0.95
    )
    assert [(place["run"], place["value"]) for place in found["places"]] == [("a", 1.0), ("c", 39 / 40), ("b", 0.5)]
    assert (found["n"], found["pairs"], found["level"]) == (40, 3, ["a", "c"])
    behind = found["places"][2]["behind"]
    assert behind["value"] == -0.5 and behind["interval"][0] < -0.5 < behind["interval"][1] < 0
    assert found["places"][0]["behind"] is None


def test_of_equal_answers_the_first_by_name_is_the_best():
    found = rank_answers({"b": samples([True, False]), "a": samples([False, True])}, 0.95)
    assert [place["run"] for place in found["places"]] == ["a", "b"] and found["level"] == ["a", "b"]


def test_answers_to_other_questions_are_not_ranked():
    with pytest.raises(MoultError, match="no checked question in common"):
        rank_answers({"a": samples([True]), "b": samples([True], reference="no")}, 0.95)
