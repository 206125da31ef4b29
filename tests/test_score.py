"""score: figures that can be trusted, and a verdict that says no more than they do."""

import json
import math
import random
from argparse import Namespace

import pytest
from planning import Log

import score
from moult.data.contamination import rows_told
from moult.errors import MoultError
from moult.files import read_json, read_jsonl, write_json, write_jsonl
from moult.measuring.checks import check
from moult.measuring.forgetting import instructions
from moult.measuring.intervals import PairedDifference, design_effect, p_value, quantiles, resample, wilson
from moult.measuring.power import smallest_effect
from moult.training.throughput import summary

SETTINGS = {
    "lora": {"r": 4},
    "train": {"learning_rate": 1.0},
    "dtype": "bfloat16",
    "quantization": None,
    "seed": 3,
    "trust_remote_code": False,
}
ADAPTER = {
    "validation_loss": {"published": 0.5, "last": 0.5},
    "adapter_sha256": "a",
    "versions": {},
    "hardware": {},
    "step": 7,
    "chosen": "lowest validation loss",
    "steps": 9,
    "ended": {"step": 9, "because": "last step"},
    "throughput": summary([]),
}
MEASURED = {"measured_on": "test", "no_test_part_because": None}
EVAL = {
    "perplexity": True,
    "confidence": 0.95,
    "resamples": 500,
    "merge_kl_limit": 0.05,
    "merge_top1_limit": 0.95,
    "quantization_kl_limit": 0.05,
    "benchmarks": {},
    "contamination": "exclude",
    "prompts": [{"id": "a", "prompt": "?", "expect": {"contains": "yes"}}, {"id": "b", "prompt": "?"}],
    "row_expect": {"exact": True, "json": True},
    "forgetting": True,
    "forgetting_limit": 0.1,
}


INSTRUCTION = next(entry for entry in instructions() if entry["id"] == "capital-france")


def make_sides(
    folder,
    better: float = 1.0,
    noise: float = 0.5,
    rows: int = 40,
    right: float = 1.0,
    forgot: float = 0.0,
    obeyed: tuple[int, int] = (12, 12),
) -> None:
    """Measurements in which the tuned model is `better` nats per token better, give or take `noise`, and answers the share
    `right` of the rows as they should be. It predicts the general text worse by `forgot` nats per token, and of 24
    instructions base and tuned follow the numbers `obeyed`."""
    generator = random.Random(1)
    for side in ("base", "tuned"):
        gain = better if side == "tuned" else 0.0
        measured = []
        for index in range(rows):
            tokens = 5 + index % 7
            nll = tokens * (3.0 - gain + generator.gauss(0, noise))
            group = f"g{index // 2}"
            measured.append(
                {
                    "id": f"r{index}",
                    "group": group,
                    "source": index % 2,
                    "nll": nll,
                    "tokens": tokens,
                    "correct": 2,
                    "bytes": tokens * 4,
                }
            )
        answers = [
            {
                "kind": "prompt",
                "id": name,
                "group": name,
                "prompt": "?",
                "reference": None,
                "answer": "yes",
                "stopped": True,
                "prompt_ids": [ord(name)],
            }
            for name in "ab"
        ]
        for index in range(rows):
            good = side == "tuned" and index < right * rows
            answer = '{"a": 1}' if good else "nothing"
            answers.append(
                {
                    "kind": "row",
                    "id": f"r{index}",
                    "group": f"r{index}",
                    "prompt": "?",
                    "reference": '{"a": 1}',
                    "answer": answer,
                    "stopped": side == "base",
                    "prompt_ids": [index],
                }
            )
        for index in range(24):
            expect = INSTRUCTION["expect"]["contains"] if index < obeyed[side == "tuned"] else "nothing"
            answers.append(
                {
                    "kind": "instruction",
                    "id": INSTRUCTION["id"],
                    "group": str(index),
                    "prompt": "?",
                    "reference": None,
                    "answer": expect,
                    "stopped": True,
                    "prompt_ids": [index],
                }
            )
        lost = forgot if side == "tuned" else 0.0
        general = [
            {"id": f"en-{index}", "nll": 50 * (3 + lost * (0.9 + 0.02 * (index % 11))), "tokens": 50, "correct": 9}
            for index in range(32)
        ]
        write_jsonl(folder / side / "general.jsonl", general)
        write_jsonl(folder / side / "likelihood.jsonl", measured)
        write_jsonl(folder / side / "answers.jsonl", answers)
    merge_check = {
        "mean_kl": 1e-7,
        "max_kl": 1e-6,
        "top1_agreement": 1.0,
        "positions": 50,
        "rows": 8,
        "dtype": "float32",
    }
    write_json(folder / "tuned" / "merge_check.json", merge_check)
    sources = [{"path": f"{name}.jsonl", "sha256": "0", "source": number} for number, name in enumerate(("one", "two"))]
    write_json(
        folder / "metadata.json",
        {"overlap": {"rows": 0}, "sources": sources, "val_sources": [], "test_sources": [], **MEASURED},
    )
    write_json(
        folder / "tokens" / "report.json", {"template": {"sha256": "t"}, "vocabulary": 1000, "val": {"sequences": rows}}
    )
    write_json(folder / "adapter.json", {**ADAPTER, "settings": SETTINGS})
    write_json(folder / "merge.json", {"base": {"name": "b", "commit": None, "files": {}}, "files": {}})


def run(folder, log=None, benchmark_files=(), contamination_files=(), **settings) -> dict:
    arguments = {name: str(folder / name) for name in ("base", "tuned", "tokens")}
    arguments |= {"run": "demo", "prepared": str(folder / "metadata.json")}
    arguments |= {name: str(folder / f"{name}.json") for name in ("adapter", "merge", "metrics")}
    arguments |= {
        "samples": str(folder / "samples.jsonl"),
        "benchmarks": list(benchmark_files),
        "contamination": list(contamination_files),
    }
    arguments["seed_tuned"] = []
    score.score({"eval": {**EVAL, **settings}, "seed": 0}, Namespace(**arguments), log or Log())
    return read_json(folder / "metrics.json")


# --- figures ----------------------------------------------------------------------------------------------------------


def test_figures_are_sums_over_tokens(tmp_path):
    make_sides(tmp_path)
    metrics = run(tmp_path)
    rows = list(read_jsonl(tmp_path / "tuned" / "likelihood.jsonl"))
    nll = sum(row["nll"] for row in rows) / sum(row["tokens"] for row in rows)
    tuned = metrics["likelihood"]["tuned"]
    assert tuned["nll_per_token"]["value"] == pytest.approx(nll)
    assert tuned["perplexity"]["value"] == pytest.approx(math.exp(nll))
    assert tuned["bits_per_byte"]["value"] == pytest.approx(nll / 4 / math.log(2))
    assert tuned["token_accuracy"]["value"] == pytest.approx(2 * len(rows) / sum(row["tokens"] for row in rows))
    difference = metrics["likelihood"]["difference"]["nll_per_token"]
    assert difference["value"] == pytest.approx(nll - metrics["likelihood"]["base"]["nll_per_token"]["value"])
    assert difference["interval"][0] < difference["value"] < difference["interval"][1]
    assert metrics["data"] == {
        "measured_on": "test",
        "no_test_part_because": None,
        "sequences": 40,
        "groups": 20,
        "trained_tokens": sum(row["tokens"] for row in rows),
        "confidence": 0.95,
        "trained_bytes": sum(row["bytes"] for row in rows),
        "rows_shared_with_train": 0,
    }
    assert metrics["by_source"]["1: two.jsonl"]["tokens"] == sum(row["tokens"] for row in rows if row["source"] == 1)


def test_the_data_have_names_to_publish(tmp_path):
    make_sides(tmp_path)
    metadata = read_json(tmp_path / "metadata.json")
    metadata["sources"][0] |= {"path": "/data/one.jsonl"}
    metadata["sources"][1] |= {"path": "results/datasets/org--two.parquet", "hub": "org/two", "commit": "c" * 40}
    write_json(tmp_path / "metadata.json", metadata)
    metrics = run(tmp_path)
    assert metrics["provenance"]["data"] == [
        {"name": "one.jsonl", "commit": None, "sha256": "0"},
        {"name": "org/two", "commit": "c" * 40, "sha256": "0"},
    ]
    assert set(metrics["by_source"]) == {"0: one.jsonl", "1: org/two"}


def test_the_settings_of_the_training_are_told(tmp_path):
    make_sides(tmp_path)
    training = {"lora": {"r": 4}, "train": {"learning_rate": 1.0}, "dtype": "bfloat16", "quantization": None}
    assert run(tmp_path)["provenance"]["training"] == training


def test_sources_are_those_of_the_measured_rows(tmp_path):
    """With a test_source its numbers are not the training sources'; several files of one source have one name."""
    make_sides(tmp_path)
    metadata = read_json(tmp_path / "metadata.json")
    names = [("held", 0), ("out", 0), ("other", 1)]
    files = [{"path": f"{name}.jsonl", "sha256": "0", "source": source} for name, source in names]
    write_json(tmp_path / "metadata.json", {**metadata, "test_sources": files, "val_sources": files[:1]})
    assert list(run(tmp_path)["by_source"]) == ["0: held.jsonl and 1 more", "1: other.jsonl"]
    write_json(tmp_path / "metadata.json", {**metadata, **WITHOUT_TEST, "val_sources": files})
    assert list(run(tmp_path)["by_source"]) == ["0: held.jsonl and 1 more", "1: other.jsonl"]


WITHOUT_TEST = {"measured_on": "val", "no_test_part_because": "too small"}


def test_rows_that_have_chosen_the_checkpoint_are_told(tmp_path):
    make_sides(tmp_path)
    caution = "the measured rows have also chosen the checkpoint: slightly too good (too small)"
    assert caution not in run(tmp_path)["verdict"]["reasons"]
    write_json(tmp_path / "metadata.json", read_json(tmp_path / "metadata.json") | WITHOUT_TEST)
    metrics = run(tmp_path)
    assert metrics["verdict"]["reasons"][-1] == caution
    assert {key: metrics["data"][key] for key in WITHOUT_TEST} == WITHOUT_TEST
    # Nothing was chosen.
    write_json(tmp_path / "adapter.json", read_json(tmp_path / "adapter.json") | {"chosen": "last step"})
    assert caution not in run(tmp_path)["verdict"]["reasons"]


def test_the_same_measurements_give_the_same_file(tmp_path):
    make_sides(tmp_path)
    run(tmp_path)
    first = (tmp_path / "metrics.json").read_bytes()
    run(tmp_path)
    assert (tmp_path / "metrics.json").read_bytes() == first


def test_samples_show_both_answers_and_their_checks(tmp_path):
    make_sides(tmp_path)
    metrics = run(tmp_path)
    samples = list(read_jsonl(tmp_path / "samples.jsonl"))
    assert len(samples) == 42 + 24
    assert samples[0]["base"] == {"answer": "yes", "stopped": True, "checks": {"contains": True}}
    assert samples[2]["base"]["checks"] == {"exact": False, "json": False}
    assert samples[2]["tuned"]["checks"] == {"exact": True, "json": True}
    assert metrics["checks"] == [
        {"id": "a", "base": {"contains": True}, "tuned": {"contains": True}},
        {"id": "b", "base": {}, "tuned": {}},
    ]
    rates = metrics["answers"]["rows"]
    assert (rates["passed"]["base"]["value"], rates["passed"]["tuned"]["value"], rates["n"]) == (0.0, 1.0, 40)
    assert metrics["answers"]["prompts"]["passed"]["n"] == 1  # b expects nothing


# --- verdict ----------------------------------------------------------------------------------------------------------


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
        reason = f"; these {rows // 2} groups of rows are too few to show any difference"
        assert metrics["verdict"]["reasons"][0].endswith(reason)


def test_a_verdict_names_its_evidence(tmp_path):
    make_sides(tmp_path, better=-1.0)
    verdict = run(tmp_path)["verdict"]
    assert verdict["worse"] == ["loss"] and verdict["better"] == ["rows passed"]
    assert verdict["unclear"] == ["prompts passed", "instructions passed"]
    assert verdict["smallest_effect"]["prompts passed"] is None
    assert verdict["reasons"][1].endswith("; these 1 prompts are too few to show any difference")
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


# --- gates ------------------------------------------------------------------------------------------------------------


def test_different_questions_are_not_compared(tmp_path):
    make_sides(tmp_path)
    rows = list(read_jsonl(tmp_path / "base" / "answers.jsonl"))
    rows[5]["prompt_ids"] = [7, 7]
    write_jsonl(tmp_path / "base" / "answers.jsonl", rows)
    with pytest.raises(MoultError, match="were measured on different questions \\(r3\\)"):
        run(tmp_path)
    assert not (tmp_path / "metrics.json").exists()


def test_different_rows_are_not_compared(tmp_path):
    make_sides(tmp_path)
    rows = list(read_jsonl(tmp_path / "base" / "likelihood.jsonl"))
    write_jsonl(tmp_path / "base" / "likelihood.jsonl", rows[:-1])
    with pytest.raises(MoultError, match="were measured on different sequences"):
        run(tmp_path)


def test_a_merge_that_is_not_the_adapter_stops_it(tmp_path):
    make_sides(tmp_path)
    check = read_json(tmp_path / "tuned" / "merge_check.json")
    write_json(tmp_path / "tuned" / "merge_check.json", {**check, "mean_kl": 0.2})
    with pytest.raises(MoultError, match=r"mean KL 0\.2 nats per token, above eval\.merge_kl_limit 0\.05"):
        run(tmp_path)
    assert run(tmp_path, merge_kl_limit=0.3)["merged_vs_adapter"]["mean_kl"] == 0.2


@pytest.mark.parametrize(
    ("agreed", "positions", "stops"), [(200, 300, True), (4, 6, True), (6, 7, False), (293, 300, False)]
)
def test_a_merged_model_with_other_first_choices_stops_it_whatever_the_divergence(agreed, positions, stops, tmp_path):
    """Of 7 positions one may differ by rounding."""
    make_sides(tmp_path)
    check = read_json(tmp_path / "tuned" / "merge_check.json")
    check |= {"mean_kl": 0.01, "positions": positions, "top1_agreement": agreed / positions}
    write_json(tmp_path / "tuned" / "merge_check.json", check)
    if not stops:
        assert run(tmp_path)["merged_vs_adapter"] == check
        return
    with pytest.raises(MoultError, match=r"66\.67% of [0-9]+ positions, below eval\.merge_top1_limit 0\.95"):
        run(tmp_path)
    assert run(tmp_path, merge_top1_limit=0.5)["merged_vs_adapter"] == check


def add_quantization(folder, mean_kl: float) -> None:
    path, one = folder / "tuned" / "merge_check.json", {"max_kl": 0.1, "top1_agreement": 1.0}
    found = {
        "kind": "nf4",
        "trained_vs_merged": {"mean_kl": mean_kl, **one},
        "base_vs_quantized": {"mean_kl": 0.03, **one},
    }
    write_json(path, {**read_json(path), "quantization": found})


def test_what_the_quantization_has_cost(tmp_path):
    make_sides(tmp_path)
    assert run(tmp_path)["quantization"] is None
    add_quantization(tmp_path, 0.001)
    # finetune has measured the validation rows, not the test rows.
    assert run(tmp_path)["quantization"]["nll_per_token"] is None
    write_json(tmp_path / "metadata.json", read_json(tmp_path / "metadata.json") | WITHOUT_TEST)
    metrics = run(tmp_path)
    cost = metrics["quantization"]
    assert (cost["trained_vs_merged"]["mean_kl"], cost["base_vs_quantized"]["mean_kl"]) == (0.001, 0.03)
    assert cost["nll_per_token"] == {
        "trained": 0.5,
        "merged": metrics["likelihood"]["tuned"]["nll_per_token"]["value"],
    }
    assert "quantization" not in metrics["merged_vs_adapter"]
    # Fewer rows than finetune has validated on: another mean.
    write_json(
        tmp_path / "tokens" / "report.json", {"template": {"sha256": "t"}, "vocabulary": 1000, "val": {"sequences": 41}}
    )
    assert run(tmp_path)["quantization"]["nll_per_token"] is None


def test_a_merged_model_that_is_not_what_was_trained_is_said_and_stops_nothing(tmp_path):
    make_sides(tmp_path)
    for kl, said in ((0.001, False), (0.1, True)):
        add_quantization(tmp_path, kl)
        log = Log()
        run(tmp_path, log=log)
        assert any("above eval.quantization_kl_limit 0.05" in line for line in log.lines) == said


def add_benchmark(folder, tuned: float) -> list[str]:
    """A benchmark of 200 questions, of which the base answers half, and the tuned model this share."""
    paths = []
    for side, right in (("base", 0.5), ("tuned", tuned)):
        value = {"task": "t", "doc_hash": "d", "prompt_hash": "p"}
        rows = [value | {"doc_id": n, "values": {"acc,none": float(n < right * 200)}} for n in range(200)]
        summary = {
            "metrics": [{"name": "acc,none", "higher_is_better": True}],
            "limit": None,
            "tasks": {"t": {"num_fewshot": 0, "version": "1"}},
            "cut": 0,
            "versions": {"lm_eval": "0"},
        }
        paths.append(str(folder / side / "bench.jsonl"))
        write_jsonl(paths[-1], rows)
        write_json(folder / side / "bench.json", summary)
    return paths


def test_a_benchmark_counts_in_the_verdict(tmp_path):
    make_sides(tmp_path, better=0.0, right=0.0)
    asked = {"bench": {"metric": None, "slug": "bench"}}
    for tuned, kind in ((0.7, "better"), (0.3, "worse"), (0.5, "unclear")):
        metrics = run(tmp_path, benchmarks=asked, benchmark_files=add_benchmark(tmp_path, tuned))
        assert "benchmark bench" in metrics["verdict"][kind]
        assert metrics["benchmarks"]["bench"]["metrics"]["acc,none"]["difference"]["value"] == pytest.approx(
            tuned - 0.5
        )
    reason = next(reason for reason in metrics["verdict"]["reasons"] if "bench" in reason)
    assert reason.startswith("benchmark bench inconclusive: +0 points [")
    assert "these 200 questions show" in reason


def test_questions_in_the_training_rows_do_not_count(tmp_path):
    make_sides(tmp_path)
    found = [{"kind": "prompt", "question": "yes or no?"}]
    found += [{"kind": "benchmark", "benchmark": "bench", "task": "t", "doc_id": n} for n in range(200)]
    path = tmp_path / "contamination.json"
    write_json(path, {"found": found, "contaminated_rows": rows_told(["a row"])})
    prompts = [{**EVAL["prompts"][0], "prompt": "yes or no?"}, EVAL["prompts"][1]]
    asked = {"bench": {"metric": None, "slug": "bench"}}
    options = {"prompts": prompts, "benchmarks": asked, "benchmark_files": add_benchmark(tmp_path, 0.7)}
    metrics = run(tmp_path, contamination_files=[str(path)], **options)
    assert metrics["answers"]["prompts"]["n"] == 1
    assert metrics["benchmarks"]["bench"]["left_out"] == 200
    assert metrics["contamination"]["prompts"] == ["a"]
    verdict = metrics["verdict"]
    assert not any("bench" in name for kind in ("better", "worse", "unclear") for name in verdict[kind])
    assert "in the training rows: 1 of 2 prompts, 200 questions of bench; they do not count" in verdict["reasons"]
    metrics = run(tmp_path, contamination_files=[str(path)], **options, contamination="report")
    assert (metrics["answers"]["prompts"]["n"], metrics["benchmarks"]["bench"]["left_out"]) == (2, 0)


def test_nothing_measured_is_no_verdict(tmp_path):
    make_sides(tmp_path)
    with pytest.raises(MoultError, match="nothing was measured"):
        run(tmp_path, perplexity=False, prompts=[{"id": "a", "prompt": "?"}, {"id": "b", "prompt": "?"}], row_expect={})


def test_the_schema_refuses_what_it_does_not_know(tmp_path):
    from jsonschema import Draft202012Validator, ValidationError

    make_sides(tmp_path)
    metrics = run(tmp_path)
    schema = json.loads(score.SCHEMA.read_text())
    Draft202012Validator.check_schema(schema)
    with pytest.raises(ValidationError):
        Draft202012Validator(schema).validate({**metrics, "data": {**metrics["data"], "rows_shared_with_train": 3}})


# --- checks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expect", "reference", "good", "bad"),
    [
        ({"contains": "Paris"}, None, "It is Paris.", "It is paris."),
        ({"contains": ["a", "b"]}, None, "b and a", "a only"),
        ({"contains": True}, "42", "The answer is 42.", "The answer is 41."),
        ({"exact": "yes"}, None, " yes\n", "yes."),
        ({"exact": True}, "yes ", "yes", "no"),
        ({"regex": r"\d{2}$"}, None, "is 42", "is 4"),
        ({"match": r"#### (\S+)"}, "x\n#### 12", "so 3 #### 3 and #### 12", "#### 12 then #### 13"),
        ({"match": r"#### (\S+)"}, "x\n#### 12", "#### 12", "12"),
        ({"json": True}, None, '{"a": 1}', '{"a": 1'),
        ({"json": True}, None, "[1]", "5"),
        ({"json": False}, None, "plain", "{}"),
        ({"language": "fr"}, None, "Je ne sais pas ce que vous voulez dire.", "I do not know what you mean by that."),
        ({"max_chars": 3}, None, "abc", "abcd"),
        ({"min_chars": 3}, None, "abc", "ab"),
    ],
)
def test_checks(expect, reference, good, bad):
    (name,) = expect
    assert check(good, expect, reference) == {name: True}
    assert check(bad, expect, reference) == {name: False}


# --- intervals --------------------------------------------------------------------------------------------------------


def difference(base: list[bool], tuned: list[bool]) -> list[float]:
    """The interval of questions that are each a group of its own."""
    return PairedDifference(base, tuned, list(map(str, range(len(base))))).interval(0.95)


def bootstrap(columns, weights, resamples: int, seed: int) -> list[list[float]]:
    return quantiles(resample(columns, weights, resamples, seed), 0.95, len(weights))


def test_the_design_effect_of_groups():
    apart = list("abcdefgh")
    assert design_effect([1, 0, 0, 1, 1, 1, 0, 0], apart) == pytest.approx(1.0)
    twice = [letter for letter in apart for _ in range(2)]
    assert design_effect([1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0], twice) == pytest.approx(2.0, rel=0.1)
    assert design_effect([1.0] * 16, twice) == 2.0  # nothing to estimate it from
    assert design_effect([1, 0] * 8, twice) == 1.0  # less alike within than between: worth no more for that


def test_p_is_the_level_from_which_the_interval_leaves_0_out():
    paired = PairedDifference([False] * 20, [True] * 6 + [False] * 14, list(map(str, range(20))))
    p = p_value(paired.interval)
    assert paired.interval(1 - p - 1e-4)[0] > 0 >= paired.interval(1 - p + 1e-4)[0]
    same = PairedDifference([True, False] * 5, [False, True] * 5, list(map(str, range(10))))
    assert p_value(same.interval) == pytest.approx(1.0, abs=1e-6)


def test_wilson_against_published_values():
    """Newcombe, Statistics in Medicine 17:857 (1998), table I: 81/263, 15/148, 0/20, 1/29."""
    for passed, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson(passed, n, 0.95) == pytest.approx([low, high], abs=6e-5)


def test_paired_difference_is_antisymmetric_and_careful_with_few():
    base, tuned = [False] * 8 + [True] * 2, [True] * 7 + [False] + [True] * 2
    low, high = difference(base, tuned)
    assert low < 0.7 < high
    assert difference(tuned, base) == pytest.approx([-high, -low])
    # Three of three better is no certainty, as a bootstrap would have it.
    low, high = difference([False] * 3, [True] * 3)
    assert 0 < low < 0.5 and high == pytest.approx(1.0)
    assert difference([True], [True])[0] < 0 < difference([True], [True])[1]


def test_intervals_cover_what_they_promise():
    """Of 400 simulated comparisons about 95 in 100 cover the true difference."""
    generator = random.Random(3)
    covered = 0
    for _ in range(400):
        pairs = []
        for _ in range(60):
            skill = generator.random()
            pairs.append((generator.random() < skill, generator.random() < min(1.0, skill + 0.2)))
        low, high = difference([b for b, _ in pairs], [t for _, t in pairs])
        covered += low <= 0.18 <= high  # E[min(1, s + .2) - s] = .2 * .8 + .02
    assert 0.92 < covered / 400 < 0.985


@pytest.mark.parametrize("clusters", [6, 10])
def test_bootstrap_of_few_groups_finds_no_difference_where_there_is_none(clusters):
    """As often as 95 % allows; of plain quantiles 14 and 10 in 100 did."""
    import numpy as np

    generator = np.random.default_rng(1)
    found = 0
    for trial in range(1000):
        tokens = generator.integers(20, 80, size=clusters).astype(float)
        tuned = tokens * generator.normal(0, 1, size=clusters)
        low, high = bootstrap(np.stack([0 * tuned, tuned], axis=1), tokens, 1000, trial)[2]
        found += not low <= 0 <= high
    assert 0.03 < found / 1000 < 0.075


def test_bootstrap_covers_and_resamples_whole_groups():
    import numpy as np

    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        tokens = generator.integers(5, 50, size=80).astype(float)
        shared = generator.normal(2.0, 0.5, size=80)
        base = tokens * (shared + generator.normal(0, 0.2, size=80))
        tuned = tokens * (shared - 0.3 + generator.normal(0, 0.2, size=80))
        intervals = bootstrap(np.stack([base, tuned], axis=1), tokens, 300, trial)
        covered += intervals[2][0] <= -0.3 <= intervals[2][1]
        # The two go up and down together, so their difference is surer than either.
        assert intervals[2][1] - intervals[2][0] < (intervals[0][1] - intervals[0][0])
    assert 0.9 < covered / 200 < 0.99
