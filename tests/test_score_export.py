"""score_export: what is said of an export is what was measured of it."""

import pytest
from exporting import NO_KL, judge, make_export, without_likelihood
from planning import Log

from moult.errors import MoultError
from moult.files import read_json, read_jsonl, write_json, write_jsonl
from moult.measuring.exported import in_words, sentence_of, worse_verdict


class Warned(Log):
    def __init__(self):
        super().__init__()
        self.warnings = []

    def warning(self, message, *values):
        self.warnings.append(message % values)


def test_an_export_that_answers_as_the_merged_model_has_its_verdict(tmp_path):
    out = make_export(tmp_path)
    log = Warned()
    found = judge(out, log)
    metrics = read_json(tmp_path / "metrics.json")
    assert found["verdict"] == metrics["verdict"] and found["merged_verdict"] == "helped"
    assert found["sentence"].startswith(
        "Q8_0: still helped; no difference to the merged model can be shown (+0.0 points ["
    )
    against = found["against_merged"]
    assert against["likelihood"]["difference"]["value"] == 0 and against["answers"]["difference"]["value"] == 0
    assert against["flips"] == {"only_merged": [], "only_export": []}
    assert found["merged_bytes"] == 1000 and found["bytes"] == 530
    assert found["checks"] == {"ready": True, "likelihood": None}
    assert not log.warnings


def test_what_is_lost_is_told_with_its_interval(tmp_path):
    found = judge(make_export(tmp_path, wrong=10))
    answers = found["against_merged"]["answers"]
    assert answers["n"] == 65  # a of the prompts, 40 rows, 24 instructions
    assert answers["difference"]["value"] == pytest.approx(-10 / 65)
    low, high = (100 * limit for limit in answers["difference"]["interval"])
    assert low < -1000 / 65 < high < 0
    assert f"Q8_0: still helped; 15.4 points below the merged model [{low:+.1f}, {high:+.1f}]" == found["sentence"]
    assert found["against_merged"]["flips"]["only_merged"] == [["row", f"r{index}"] for index in range(10)]
    assert answers["mcnemar"] == pytest.approx(2 / 2**10)


def test_nats_that_are_lost_are_told(tmp_path):
    found = judge(make_export(tmp_path, lost=0.1))
    shift = found["against_merged"]["likelihood"]["difference"]
    assert shift["value"] == pytest.approx(0.1, abs=0.01) and shift["interval"][0] > 0
    assert " nats per token worse than the merged model [+0.0" in found["sentence"]
    assert "points" not in found["sentence"]  # of the answers there is nothing to tell


def test_a_verdict_that_is_lost_is_a_warning(tmp_path):
    """The merged model is better by a nat per token, and the export has lost them again."""
    out = make_export(tmp_path, lost=1.0, wrong=40)
    log = Warned()
    found = judge(out, log)
    assert found["verdict"]["verdict"] == "inconclusive" and found["merged_verdict"] == "helped"
    assert found["sentence"].startswith("Q8_0: now inconclusive (the merged model: helped); ")
    assert " points below the merged model [-" in found["sentence"]
    assert "Q8_0 is inconclusive, and the merged model helped" in log.warnings[0]


def test_an_export_that_harms_what_was_unclear_is_hurt(tmp_path):
    out = make_export(tmp_path, lost=1.0, better=0.0, noise=0.1, right=0.0)
    found = judge(out)
    assert (found["merged_verdict"], found["verdict"]["verdict"]) == ("inconclusive", "hurt")
    assert "Q8_0: now hurt (the merged model: inconclusive); " in found["sentence"]


def test_what_the_engine_does_not_tell_is_left_out_and_said(tmp_path):
    out = make_export(tmp_path, "adapter-gguf")
    without_likelihood(out)
    found = judge(out)
    assert found["against_merged"]["likelihood"] is None and found["kl"] is None
    assert found["verdict"]["cautions"] == [f"the likelihood of the rows does not count: {NO_KL}"]
    assert "loss" not in found["verdict"]["better"] and found["sentence"].startswith(
        "adapter: still helped; no difference"
    )
    assert "nats" not in found["sentence"]


def test_an_export_of_which_nothing_tells_is_refused(tmp_path):
    out = make_export(tmp_path, "adapter-gguf")
    without_likelihood(out)
    with pytest.raises(MoultError, match="adapter-gguf: nothing was measured that both models have"):
        judge(out, prompts=[{"id": "a", "prompt": "?"}, {"id": "b", "prompt": "?"}], row_expect={})


def test_without_checks_the_likelihood_tells(tmp_path):
    """But for the instructions, which are part of Moult and have checks."""
    out = make_export(tmp_path, lost=0.1)
    for folder in (tmp_path / "base", tmp_path / "tuned", out):
        answers = [row for row in read_jsonl(folder / "answers.jsonl") if row["kind"] != "instruction"]
        write_jsonl(folder / "answers.jsonl", answers)
    found = judge(out, prompts=[{"id": "a", "prompt": "?"}, {"id": "b", "prompt": "?"}], row_expect={})
    assert found["against_merged"]["answers"] is None and found["against_merged"]["flips"] is None
    assert "nats per token worse than the merged model" in found["sentence"]


@pytest.mark.parametrize("name", ["likelihood", "answers", "general"])
def test_another_measurement_is_refused(name, tmp_path):
    out = make_export(tmp_path)
    rows = list(read_jsonl(out / f"{name}.jsonl"))
    write_jsonl(out / f"{name}.jsonl", rows[:-1])
    with pytest.raises(MoultError, match="merged model and export were measured on different"):
        judge(out)


def test_a_likelihood_that_is_missing_is_no_excuse(tmp_path):
    """Only check.json may say that the engine does not tell it."""
    out = make_export(tmp_path)
    (out / "likelihood.jsonl").write_text("")
    with pytest.raises(MoultError, match="merged model and export were measured on different sequences"):
        judge(out)


def test_prompts_in_the_training_rows_do_not_count(tmp_path):
    out = make_export(tmp_path)
    metrics = read_json(tmp_path / "metrics.json")
    told = {"policy": "exclude", "prompts": ["a"], "benchmarks": {}, "training_rows": 1}
    write_json(tmp_path / "metrics.json", {**metrics, "contamination": told})
    assert judge(out)["against_merged"]["answers"]["n"] == 64
    write_json(tmp_path / "metrics.json", {**metrics, "contamination": {**told, "policy": "report"}})
    assert judge(out)["against_merged"]["answers"]["n"] == 65


def test_what_the_verdict_of_the_run_counts_beside_it_is_said(tmp_path):
    out = make_export(tmp_path)
    metrics = read_json(tmp_path / "metrics.json")
    more = {"benchmarks": {"quiz": {}}, "seeds": {"measurements": {}}}
    write_json(tmp_path / "metrics.json", {**metrics, **more})
    assert [caution.split(" does")[0].split(" do ")[0] for caution in judge(out)["verdict"]["cautions"]] == [
        "benchmarks",
        "the difference between seeds",
    ]


# --- words ------------------------------------------------------------------------------------------------------------


def answers(value: float, low: float, high: float, p: float) -> dict:
    return {"difference": {"value": value, "interval": [low, high], "p": p}, "p": p}


def nats(value: float, low: float, high: float, p: float) -> dict:
    return {"unit": "nats per token", "difference": {"value": value, "interval": [low, high], "p": p}}


@pytest.mark.parametrize(
    ("likelihood", "of_answers", "words"),
    [
        (None, answers(-0.018, -0.031, -0.004, 0.01), "1.8 points below the merged model [-3.1, -0.4]"),
        (None, answers(0.018, 0.004, 0.031, 0.01), "1.8 points above the merged model [+0.4, +3.1]"),
        (
            None,
            answers(-0.009, -0.028, 0.009, 0.4),
            "no difference to the merged model can be shown (-0.9 points [-2.8, +0.9])",
        ),
        (
            nats(0.001, -0.001, 0.003, 0.3),
            answers(0.0, -0.03, 0.03, 1.0),
            "no difference to the merged model can be shown "
            "(+0.0 points [-3.0, +3.0], +0.001 nats per token [-0.001, +0.003])",
        ),
        (
            nats(0.02, 0.01, 0.03, 0.001),
            answers(-0.018, -0.031, -0.004, 0.01),
            "1.8 points below the merged model [-3.1, -0.4]; "
            "0.02 nats per token worse than the merged model [+0.01, +0.03]",
        ),
        (
            nats(-0.02, -0.03, -0.01, 0.001),
            answers(0.0, -0.03, 0.03, 1.0),
            "0.02 nats per token better than the merged model [-0.03, -0.01]",
        ),
        # Each by itself would be clear, but one of two may be so by chance (Holm).
        (
            nats(0.02, 0.001, 0.03, 0.04),
            answers(-0.018, -0.031, -0.001, 0.03),
            "no difference to the merged model can be shown "
            "(-1.8 points [-3.1, -0.1], +0.02 nats per token [+0.001, +0.03])",
        ),
    ],
)
def test_the_difference_in_words(likelihood, of_answers, words):
    assert in_words(likelihood, of_answers, 0.95) == words


def test_the_verdict_in_words():
    assert sentence_of("Q4_K_M", "helped", "helped", "x") == "Q4_K_M: still helped; x"
    assert sentence_of("FP8", "hurt", "helped", "x") == "FP8: now hurt (the merged model: helped); x"
    assert worse_verdict("hurt", "inconclusive") and worse_verdict("inconclusive", "helped")
    assert not worse_verdict("helped", "helped") and not worse_verdict("helped", "hurt")
