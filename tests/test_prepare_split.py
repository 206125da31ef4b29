"""prepare: samples, weights, and the split into train and val."""

from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preparing import ANSWER, SPOKEN, USER, pairs, prompts, run, stage_input, write

# --- sampling, weights ------------------------------------------------------------------------------------------------


def test_a_sample_has_its_size_and_depends_on_the_seed(tmp_path):
    source = write(tmp_path / "rows.jsonl", pairs(1000))

    backwards = write(tmp_path / "backwards.jsonl", reversed(pairs(1000)))

    def sample(size, seed=0, source=source):
        result = run(tmp_path, source=source, sample_size=size, seed=seed)
        assert result.ledger["kept"] == size == 1000 - result.ledger["dropped"]["not_sampled"]
        lines = [int(row["id"].rpartition(":")[2]) for row in result.train]
        assert lines == sorted(lines)
        return set(prompts(result.train + result.val))

    assert sample(100) == sample(100) != sample(100, seed=1)
    assert sample(100) == sample(100, source=backwards)
    # A larger sample holds the smaller one: a trial on fewer rows is a trial on some of these.
    assert sample(100) < sample(300)
    assert len(sample(300) & sample(300, seed=1)) < 200


def test_a_sample_is_drawn_from_the_rows_in_the_wanted_languages(tmp_path):
    rows = [SPOKEN | {"prompt": f"Could you please tell me more about the number {n} now?"} for n in range(700)]
    rows[::2] = [
        {"prompt": f"Wie viel ist {n} plus {n} zusammen?", "completion": "Das weiß ich nicht."} for n in range(350)
    ]
    source = write(tmp_path / "rows.jsonl", rows)
    result = run(tmp_path, source=source, sample_size=300, languages=["en"], language_detector="py3langid")
    assert result.ledger["kept"] == 300
    assert {row["language"] for row in result.train + result.val} == {"en"}


def test_more_than_there_is_is_all(tmp_path):
    assert run(tmp_path, source=write(tmp_path / "rows.jsonl", pairs(20)), sample_size=99).ledger["kept"] == 20


def test_weights_repeat_training_rows_only(tmp_path):
    sources = [
        {"path": write(tmp_path / name, pairs(400, start)), "weight": weight}
        for name, start, weight in (("a.jsonl", 0, 2), ("b.jsonl", 1000, 0.5), ("c.jsonl", 2000, 1))
    ]
    result = run(tmp_path, source=sources, val_size=0.1)
    assert len(result.val) == len(set(prompts(result.val))) == 120
    times = [Counter(prompts(row for row in result.train if row["source"] == source)) for source in range(3)]
    in_train = result.train_summary["by_source"]
    assert set(times[0].values()) == {2}
    assert len(times[0]) == in_train["0"]
    assert set(times[1].values()) == {1}
    assert 0.4 < len(times[1]) / in_train["1"] < 0.6
    assert times[2] == Counter(dict.fromkeys(times[2], 1))
    assert len({row["id"] for row in result.train}) == len(result.train) == result.train_summary["written"]
    assert result.train_summary["repeated"] == in_train["0"]
    assert result.train_summary["left_out_by_weight"] == in_train["1"] - len(times[1])
    assert not set(prompts(result.train)) & set(prompts(result.val))


def test_a_copy_in_another_source_counts_once(tmp_path):
    sources = [write(tmp_path / name, pairs(20)) for name in ("a.jsonl", "b.jsonl")]
    result = run(tmp_path, source=sources)
    assert result.ledger["dropped"] == {"duplicate": 20}
    assert result.train_summary["by_source"] == {"0": 19}


# --- splitting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("val_size", "rows"), [(0.05, 10), (0.5, 100), (1, 1), (37, 37), (0.001, 1)])
def test_val_size_is_a_share_or_a_number(tmp_path, val_size, rows):
    result = run(tmp_path, source=write(tmp_path / "rows.jsonl", pairs(200)), val_size=val_size)
    assert (len(result.val), len(result.train)) == (rows, 200 - rows)


def test_the_split_depends_on_the_seed_and_not_on_other_rows(tmp_path):
    few, more = (write(tmp_path / f"{count}.jsonl", pairs(count)) for count in (100, 110))

    def val(source, seed=0):
        return set(prompts(run(tmp_path, source=source, val_size=0.2, seed=seed).val))

    assert val(few) != val(few, seed=1)
    assert len(val(few) & val(more)) >= 16  # new rows take some places; the others stay where they were


def groups_by(value) -> list[dict]:
    return [{**row, "topic": value(index)} for index, row in enumerate(pairs(60))]


@pytest.mark.parametrize(
    "topic",
    [
        lambda index: f"topic {index % 12}",
        lambda index: index % 12,
        lambda index: index % 12 if index < 30 else str(index % 12),  # 3 and "3" are one
        lambda index: {"deep": [index % 12]},
        lambda index: f"\ud800{index % 12}",
    ],
)
def test_rows_of_a_group_stay_together(tmp_path, topic):
    rows = groups_by(topic)
    source = write(tmp_path / "rows.jsonl", rows)
    result = run(tmp_path, source=source, columns={"group": "topic"}, val_size=10)
    number = {row["prompt"]: index % 12 for index, row in enumerate(rows)}
    train, val = ({number[prompt] for prompt in prompts(part)} for part in (result.train, result.val))
    assert (len(train), len(val)) == (10, 2)
    assert not train & val
    assert len({row["group"] for row in result.train + result.val}) == 12


def test_a_table_may_have_numbers_dates_and_gaps_for_groups(tmp_path):
    import datetime

    import pyarrow
    import pyarrow.parquet

    for name, values in (
        ("numbers", [float(n % 5) for n in range(30)] + [float("nan")] * 30),
        ("dates", [datetime.date(2024, 1, 1 + n % 5) for n in range(30)] + [None] * 30),
    ):
        rows = [{**row, "topic": value} for row, value in zip(pairs(60), values, strict=True)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
        source = str(tmp_path / f"{name}.parquet")
        result = run(tmp_path, source=source, columns={"group": "topic"}, val_size=0.2)
        # A row without a group is grouped by its prompt: on its own here.
        assert result.train_summary["groups"] + result.val_summary["groups"] == 5 + 30


def test_without_a_group_rows_with_the_same_prompt_stay_together(tmp_path):
    rows = [{"prompt": f"question {n % 20}", "completion": f"answer {n}"} for n in range(100)]
    result = run(tmp_path, source=write(tmp_path / "rows.jsonl", rows), val_size=10)
    assert not set(prompts(result.train)) & set(prompts(result.val))
    assert (len(result.val), result.val_summary["groups"]) == (10, 2)


def test_a_greeting_makes_no_group(tmp_path):
    greeting = {"role": "assistant", "content": "Hello! How can I help you?"}
    rows = [{"messages": [greeting, {**USER, "content": f"q {n}"}, ANSWER]} for n in range(20)]
    result = run(tmp_path, source=write(tmp_path / "rows.jsonl", rows))
    assert (result.train_summary["groups"], result.val_summary["groups"]) == (19, 1)


def test_a_group_that_is_too_large_stays_in_train(tmp_path):
    rows = [{**row, "group": "large" if index < 90 else str(index)} for index, row in enumerate(pairs(100))]
    result = run(tmp_path, source=write(tmp_path / "rows.jsonl", rows), val_size=5)
    assert len(result.val) == 5
    assert result.train_summary["groups"] == 6


def test_the_commit_of_a_hub_dataset_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [source] = stage_input(source="org/math")["sources"]
    path = tmp_path / source["path"]
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(pairs(20)), path)
    path.with_suffix(".json").write_text('{"commit": "c0ffee"}')
    [told] = run(tmp_path, source="org/math").sources
    assert (told["hub"], told["commit"], told["path"]) == ("org/math", "c0ffee", source["path"])


def test_a_given_validation_set_is_kept_and_its_rows_leave_train(tmp_path):
    source = write(tmp_path / "rows.jsonl", pairs(50))
    given = [*pairs(5), {"prompt": "question 9", "completion": "the same question"}, {"prompt": "q", "completion": ""}]
    result = run(tmp_path, source=source, val_source=write(tmp_path / "val.jsonl", given), sample_size=40)
    assert prompts(result.val) == [f"question {n}" for n in (0, 1, 2, 3, 4, 9)]
    assert not set(prompts(result.train)) & set(prompts(result.val))
    assert result.val_ledger["read"] == 7
    assert result.val_ledger["dropped"] == {"empty": 1}
    in_val = result.ledger["dropped"]["in_val"]
    assert 0 < in_val <= 6
    assert result.ledger["dropped"] == {"not_sampled": 10, "in_val": in_val}
    assert len(result.train) == 40 - in_val
