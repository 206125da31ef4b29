"""score: figures that can be trusted."""

import json
import math

import pytest
from planning import Log
from scoring import EVAL, make_sides, run

import score
from moult.data.contamination import rows_told
from moult.errors import MoultError
from moult.files import read_json, read_jsonl, write_json, write_jsonl
from moult.measuring.checks import check
from moult.measuring.table import table

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
    assert metrics["verdict"]["verdict"] == "helped" and f"\n  - {caution}\n" in table(metrics, tmp_path)
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


def add_benchmark(folder, tuned: float, name: str = "bench") -> list[str]:
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
        paths.append(str(folder / side / f"{name}.jsonl"))
        write_jsonl(paths[-1], rows)
        write_json(folder / side / f"{name}.json", summary)
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


def test_each_benchmark_is_compared_with_itself(tmp_path):
    """The settings come as JSON with sorted keys, the files in the order of the config."""
    make_sides(tmp_path)
    files = [add_benchmark(tmp_path, tuned, name) for name, tuned in (("z", 0.7), ("a", 0.3))]
    in_order = [paths[side] for side in (0, 1) for paths in files]
    asked = {name: {"metric": None, "slug": name} for name in ("a", "z")}
    metrics = run(tmp_path, benchmarks=asked, benchmark_files=in_order)["benchmarks"]
    values = {name: one["metrics"]["acc,none"]["tuned"]["value"] for name, one in metrics.items()}
    assert values == {"a": 0.3, "z": 0.7}


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
    # There was something to measure, and it does not count.
    found = {"found": [{"kind": "prompt", "question": "?"}], "contaminated_rows": rows_told(["a row"])}
    write_json(tmp_path / "contamination.json", found)
    files = [str(tmp_path / "contamination.json")]
    with pytest.raises(
        MoultError, match="nothing was measured; in the training rows: 2 of 2 prompts; they do not count"
    ):
        run(tmp_path, perplexity=False, row_expect={}, contamination_files=files)


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
