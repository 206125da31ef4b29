"""score: a verdict that says no more than the figures do."""

import pytest
from scoring import make_sides, run

from moult.errors import MoultError
from moult.files import read_json, read_jsonl, write_json, write_jsonl
from moult.measuring.power import smallest_effect


@pytest.mark.parametrize(
    ("sides", "expected"),
    [
        ({"better": 1.0}, "helped"),
        ({"better": -1.0, "right": 0.0}, "hurt"),
        ({"better": 0.0, "right": 0.0}, "inconclusive"),
        ({"better": 0.1, "noise": 3.0, "right": 0.02}, "inconclusive"),
        ({"better": -1.0, "right": 1.0}, "inconclusive"),  # likelihood worse, answers better
        ({"better": 0.0, "noise": 0.0, "right": 1.0}, "helped"),
    ],
)
def test_verdict(sides, expected, tmp_path):
    make_sides(tmp_path, **sides)
    assert run(tmp_path)["verdict"]["verdict"] == expected


@pytest.mark.parametrize(("rows", "word"), [(2, "inconclusive"), (10, "inconclusive"), (12, "helped")])
def test_few_groups_are_no_evidence(rows, word, tmp_path):
    """Two rows are a group here. That 5 groups are all better happens by chance once in 16 times, of 6 once in 32."""
    make_sides(tmp_path, noise=0.0, rows=rows)
    for side in ("base", "tuned"):
        answers = [row for row in read_jsonl(tmp_path / side / "answers.jsonl") if row["kind"] != "instruction"]
        write_jsonl(tmp_path / side / "answers.jsonl", answers)
    metrics = run(tmp_path, prompts=[{"id": "a", "prompt": "?"}, {"id": "b", "prompt": "?"}], row_expect={})
    assert metrics["verdict"]["verdict"] == word
    if word == "inconclusive":
        reason = f"; too few to show any difference: {rows // 2} groups of rows"
        assert metrics["verdict"]["reasons"][0].endswith(reason)
        assert metrics["verdict"]["smallest_effect"] == {"loss": None}


def test_a_verdict_names_its_evidence(tmp_path):
    make_sides(tmp_path, better=-1.0)
    verdict = run(tmp_path)["verdict"]
    assert verdict["worse"] == ["loss"] and verdict["better"] == ["rows passed"]
    assert verdict["unclear"] == ["prompts passed", "instructions passed"]
    assert verdict["smallest_effect"]["prompts passed"] is None
    assert verdict["reasons"][1].endswith("; too few to show any difference: 1 prompts")
    assert verdict["reasons"][0].startswith("loss worse: +0.919 nats per token [+")
    assert verdict["reasons"][-1] == "answers that stop: 100% -> 39%"


def test_an_unclear_measurement_says_what_it_would_show(tmp_path):
    make_sides(tmp_path, better=0.0, noise=3.0, right=0.02)
    verdict = run(tmp_path)["verdict"]
    assert {"loss", "rows passed"} <= set(verdict["unclear"])
    rows = verdict["smallest_effect"]["rows passed"]
    # A quarter of the error is the likelihood's; of the rest, 40 of 65 questions are rows.
    assert rows == smallest_effect(40, 0.0, 1 - 0.05 * 0.75 * 40 / 65)
    assert verdict["reasons"][2].endswith(f"; these 40 rows show {100 * rows:.0f} points or more")
    low, high = read_json(tmp_path / "metrics.json")["likelihood"]["difference"]["nll_per_token"]["interval"]
    # The interval is one of 95 %; what it shows in 80 % of all cases is told at 98.75 %.
    shown = (high - low) / 2 / 1.95996 * (2.49771 + 0.84162)
    assert verdict["smallest_effect"]["loss"] == pytest.approx(shown, rel=1e-3)
    assert verdict["reasons"][0].endswith(f"; these 20 groups of rows show {shown:.2g} nats per token or more")


def test_what_was_lost_of_the_general_text_makes_it_hurt_beyond_the_limit(tmp_path):
    make_sides(tmp_path, forgot=0.08)
    metrics = run(tmp_path)
    lost = metrics["general_text"]
    assert lost["texts"] == 32 and lost["by_kind"] == {"en": pytest.approx(lost["difference"]["value"])}
    low, high = lost["difference"]["interval"]
    assert 0.07 < low < lost["difference"]["value"] < high < 0.09
    said = f"general text worse: {lost['difference']['value']:+.3g} nats per token [{low:+.3g}, {high:+.3g}]"
    assert metrics["verdict"]["verdict"] == "helped" and said in metrics["verdict"]["reasons"]
    verdict = run(tmp_path, forgetting_limit=0.05)["verdict"]
    assert (verdict["verdict"], verdict["worse"]) == ("hurt", ["general text"])
    assert f"{said}, more than eval.forgetting_limit (0.05) allows" in verdict["reasons"]
    # By the bound of the interval: it may be as little as the limit.
    assert run(tmp_path, forgetting_limit=(low + high) / 2)["verdict"]["verdict"] == "helped"
    assert run(tmp_path, forgetting=False)["general_text"] is None


def test_nobody_forgets_what_the_base_does_not_know(tmp_path):
    make_sides(tmp_path, forgot=5.0)
    report = read_json(tmp_path / "tokens" / "report.json")
    write_json(tmp_path / "tokens" / "report.json", {**report, "vocabulary": 16})  # a guess takes 2.77 nats
    verdict = run(tmp_path)["verdict"]
    assert verdict["verdict"] == "helped"
    reason = "general text does not count: the base does not know it (3 nats per token, and a guess takes 2.77)"
    assert reason in verdict["reasons"]


def test_instructions_that_are_no_longer_followed_are_named(tmp_path):
    make_sides(tmp_path, obeyed=(20, 3))
    verdict = run(tmp_path)["verdict"]
    assert verdict["verdict"] == "inconclusive" and verdict["worse"] == ["instructions passed"]
    assert verdict["better"] == ["loss", "rows passed"]
    assert any(reason.startswith("instructions passed worse: -70.8 points [") for reason in verdict["reasons"])


def test_instructions_alone_are_no_verdict(tmp_path):
    make_sides(tmp_path)
    with pytest.raises(MoultError, match="nothing was measured"):
        run(tmp_path, perplexity=False, prompts=[{"id": "a", "prompt": "?"}, {"id": "b", "prompt": "?"}], row_expect={})


def test_rows_of_one_group_are_worth_fewer_questions(tmp_path):
    make_sides(tmp_path, better=0.0, right=0.5)
    alone = run(tmp_path)["answers"]["rows"]["passed"]
    for side in ("base", "tuned"):
        rows = list(read_jsonl(tmp_path / side / "answers.jsonl"))
        for row in rows:
            row["group"] = str(int(row["id"][1:]) // 4) if row["kind"] == "row" else row["group"]
        write_jsonl(tmp_path / side / "answers.jsonl", rows)
    together = run(tmp_path)["answers"]["rows"]["passed"]
    assert (alone["n"], together["n"]) == (40, 40)
    assert alone["independent"] == pytest.approx(40) and together["independent"] == pytest.approx(9.2, abs=0.5)
    for side in ("tuned", "difference"):
        width = [rates[side]["interval"][1] - rates[side]["interval"][0] for rates in (alone, together)]
        assert width[1] > 1.5 * width[0]
    assert together["difference"]["p"] > alone["difference"]["p"]


def test_answers_alone_can_decide(tmp_path):
    make_sides(tmp_path)
    metrics = run(tmp_path, perplexity=False)
    assert metrics["likelihood"] is None and metrics["verdict"]["verdict"] == "helped"
