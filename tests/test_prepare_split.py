"""prepare: samples, weights, and the split into train, val and test."""

import io
import re
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preparing import ANSWER, SPOKEN, USER, pairs, prompts, run, stage_input, write
from workflow import ROOT

from moult.data.records import RECORD, Rows
from moult.data.split import split
from moult.errors import MoultError

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
    assert not set(prompts(result.train)) & set(prompts(result.val + result.test))


def test_a_copy_in_another_source_counts_once(tmp_path):
    sources = [write(tmp_path / name, pairs(20)) for name in ("a.jsonl", "b.jsonl")]
    result = run(tmp_path, source=sources, val_size=1, test_size=None)
    assert result.ledger["dropped"] == {"duplicate": 20}
    assert result.train_summary["by_source"] == {"0": 19}


# --- splitting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "least", "most"), [(0.2, 130, 170), (0.4, 270, 330), (37, 37, 37), (20, 20, 20)])
@pytest.mark.parametrize("part", ["val", "test"])
def test_a_size_is_a_share_or_a_number(tmp_path, part, size, least, most):
    result = run(tmp_path, source=write(tmp_path / "rows.jsonl", pairs(750)), **{f"{part}_size": size})
    assert least <= len(getattr(result, part)) <= most
    assert sum(len(rows) for rows in (result.train, result.val, result.test)) == 750
    assert result.measured_on == "test" and result.no_test_part_because is None
    assert result.overlap == {"rows": 0, "groups": 0}


def place_of(result) -> dict[str, str]:
    """{prompt: its part}"""
    return {prompt: part for part in ("train", "val", "test") for prompt in prompts(getattr(result, part))}


def moved(before, after) -> set[tuple[str, str]]:
    """From which part to which the rows of `before` have moved."""
    now = place_of(after)
    return {(part, now[prompt]) for prompt, part in place_of(before).items() if part != now[prompt]}


def test_with_shares_no_old_row_changes_its_part(tmp_path):
    """Also where the new rows stand between the old ones, and belong to old groups."""
    old = [{**row, "topic": n % 500} for n, row in enumerate(pairs(1000))]
    new = [{**row, "topic": n % 700} for n, row in enumerate(pairs(200, 1000))]
    grown = [row for n, row in enumerate(old) for row in (row, *new[n // 5 : n // 5 + 1][: n % 5 == 0])]
    assert len(grown) == 1200
    few, more = (write(tmp_path / name, rows) for name, rows in (("few.jsonl", old), ("more.jsonl", grown)))
    sizes = {"val_size": 0.05, "test_size": 0.1, "columns": {"group": "topic"}}
    for seed in range(3):
        before, after = (run(tmp_path, source=source, seed=seed, **sizes) for source in (few, more))
        assert len(before.val) > 20 and len(before.test) > 60 and len(after.test) > len(before.test)
        assert moved(before, after) == set()
    assert moved(before, run(tmp_path, source=few, seed=3, **sizes)) >= {("train", "test"), ("test", "train")}


def test_a_size_moves_no_row_of_the_other_part(tmp_path):
    source = write(tmp_path / "rows.jsonl", pairs(500))
    result = {
        sizes: run(tmp_path, source=source, val_size=sizes[0], test_size=sizes[1])
        for sizes in ((0.1, 0.1), (0.3, 0.1), (0.1, 0.3), (40, 0.1), (0.1, 90))
    }
    first = result[0.1, 0.1]
    assert prompts(result[0.3, 0.1].test) == prompts(result[40, 0.1].test) == prompts(first.test)
    assert prompts(result[0.1, 0.3].val) == prompts(result[0.1, 90].val) == prompts(first.val)
    assert set(prompts(first.val)) < set(prompts(result[0.3, 0.1].val))
    assert (len(result[40, 0.1].val), len(result[0.1, 90].test)) == (40, 90)


def test_numbers_move_rows_only_towards_train(tmp_path):
    def grouped(count: int) -> list[dict]:  # groups of 1 to 7 rows
        return [{**row, "topic": f"{n % 13}/{n // 50}"} for n, row in enumerate(pairs(count))]

    few, more = (write(tmp_path / f"{count}.jsonl", grouped(count)) for count in (1000, 1200))
    sizes = {"val_size": 60, "test_size": 80, "columns": {"group": "topic"}}
    before, after = (run(tmp_path, source=source, **sizes) for source in (few, more))
    assert all(60 <= len(result.val) < 67 and 80 <= len(result.test) < 87 for result in (before, after))
    assert moved(before, after) == {("val", "train"), ("test", "train")}


def test_the_threshold_that_a_number_has_reached_gives_the_same_part(tmp_path):
    few, more = (write(tmp_path / f"{count}.jsonl", pairs(count)) for count in (300, 400))
    numbers = run(tmp_path, source=few, val_size=30, test_size=50)
    shares = {f"{part}_size": numbers.thresholds[part] for part in ("val", "test")}
    assert all(size < 0.25 and len(str(size)) < 8 for size in shares.values())
    pinned = run(tmp_path, source=few, **shares)
    assert moved(numbers, pinned) == set() and pinned.thresholds == numbers.thresholds
    assert moved(numbers, run(tmp_path, source=more, **shares)) == set()


def test_where_the_two_parts_meet_test_comes_first(tmp_path):
    result = run(tmp_path, source=write(tmp_path / "rows.jsonl", pairs(200)), val_size=60, test_size=0.6)
    assert len(result.test) > 100 and len(result.val) == 60 and len(result.train) == 140 - len(result.test)
    with pytest.raises(MoultError, match=r"200 rows in 200 groups cannot be split into train and test and val"):
        run(tmp_path, source=str(tmp_path / "rows.jsonl"), val_size=100, test_size=0.6)
    with pytest.raises(MoultError, match=r"val_size 0\.5 and test_size 0\.5 leave no training rows"):
        run(tmp_path, source=str(tmp_path / "rows.jsonl"), val_size=0.5, test_size=0.5)


# --- without a test part ---


def test_a_small_dataset_has_no_test_part(tmp_path, caplog):
    """One part has the rows of both and does both jobs. When it has grown, they are in either, and no training row is."""
    sizes = {"val_size": 0.1, "test_size": 0.1}
    small = run(tmp_path, source=write(tmp_path / "100.jsonl", pairs(100)), **sizes)
    assert small.measured_on == "val" and small.test == small.val and small.test_summary is None
    assert small.ledger["kept"] == 100 == len(small.train) + len(small.val)
    assert small.no_test_part_because in caplog.text and "WARNING" in caplog.text
    assert re.fullmatch(
        r"a test part would have 1?\d groups of rows, and fewer than 20 measure too little", small.no_test_part_because
    )
    grown = run(tmp_path, source=write(tmp_path / "400.jsonl", pairs(400)), **sizes)
    assert grown.measured_on == "test" and 20 <= len(grown.test) < 60
    both = set(prompts(grown.val + grown.test))
    assert set(prompts(small.val)) < both and not set(prompts(small.train)) & both


@pytest.mark.parametrize("count", [2, 3, 5, 20])
def test_no_part_is_empty(tmp_path, count):
    for seed in range(20):
        result = run(tmp_path, source=write(tmp_path / "rows.jsonl", pairs(count)), seed=seed)
        assert result.train and result.val and len(result.train) + len(result.val) == count


def test_nobody_asks_for_a_test_part(tmp_path, caplog):
    source = write(tmp_path / "rows.jsonl", pairs(500))
    result, three = run(tmp_path, source=source, test_size=None), run(tmp_path, source=source)
    assert result.no_test_part_because == "datasets.<name>.test_size is null" and result.test == result.val
    assert prompts(result.val) == prompts(three.val) and "WARNING" not in caplog.text


def test_a_large_group_that_fills_a_part_is_told(tmp_path, caplog):
    rows = [{**row, "group": "large" if index < 400 else str(index)} for index, row in enumerate(pairs(900))]
    source = write(tmp_path / "rows.jsonl", rows)
    told = set()
    for seed in range(30):
        caplog.clear()
        result = run(tmp_path, source=source, val_size=0.2, test_size=0.2, seed=seed)
        told |= {part for part in ("val", "test") if f"{part} has " in caplog.text}
        assert ("one group has 400 rows" in caplog.text) == (len(result.train) < 500)
    assert told == {"val", "test"}
    assert len(run(tmp_path, source=source, val_size=40, test_size=40).train) == 820


@pytest.mark.parametrize("groups", [100, 1_000, 10_000])
def test_how_many_rows_a_share_gives(groups):
    """The table of config/README.md, in which a group is a row."""
    counts = []
    for seed in range(200):
        random = np.random.default_rng(seed)
        records = np.zeros(groups, RECORD)
        records["group"][:, 0], records["split"] = np.arange(groups), random.random(groups)
        rows = Rows(records, io.BytesIO(), [""])
        counts.append(len(split(rows, {}, {"val": 0.05, "test": None}).val))
    shown = f"| {groups:,} | {np.mean(counts):,.0f} ± {np.std(counts):.0f} | {min(counts):,} to {max(counts):,} |"
    assert shown in (ROOT / "config/README.md").read_text(encoding="utf-8")


# --- groups ---


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
    result = run(tmp_path, source=source, columns={"group": "topic"}, val_size=10, test_size=None)
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
    result = run(tmp_path, source=write(tmp_path / "rows.jsonl", rows), val_size=10, test_size=None)
    assert not set(prompts(result.train)) & set(prompts(result.val))
    assert (len(result.val), result.val_summary["groups"]) == (10, 2)


def test_a_greeting_makes_no_group(tmp_path):
    greeting = {"role": "assistant", "content": "Hello! How can I help you?"}
    rows = [{"messages": [greeting, {**USER, "content": f"q {n}"}, ANSWER]} for n in range(20)]
    result = run(tmp_path, source=write(tmp_path / "rows.jsonl", rows), val_size=1, test_size=None)
    assert (result.train_summary["groups"], result.val_summary["groups"]) == (19, 1)


def test_a_group_that_is_too_large_stays_in_train(tmp_path):
    rows = [{**row, "group": "large" if index < 90 else str(index)} for index, row in enumerate(pairs(100))]
    result = run(tmp_path, source=write(tmp_path / "rows.jsonl", rows), val_size=5, test_size=None)
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
    # A test part of so few rows stays in train: the given validation rows are what they are.
    assert len(result.train) == 40 - in_val and result.measured_on == "val" and result.test == result.val


def test_a_given_test_set_is_kept_whatever_its_size_and_its_rows_leave_the_others(tmp_path):
    source = write(tmp_path / "rows.jsonl", pairs(500))
    given = {
        f"{part}_source": write(tmp_path / f"given-{part}.jsonl", rows)
        for part, rows in (("val", pairs(10)), ("test", pairs(6, 7)))
    }
    result = run(tmp_path, source=source, **given)
    assert prompts(result.test) == [f"question {n}" for n in range(7, 13)] and result.measured_on == "test"
    assert prompts(result.val) == [f"question {n}" for n in range(7)]
    assert result.val_ledger["dropped"] == {"in_test": 3}
    assert result.ledger["dropped"] == {"in_test": 6, "in_val": 7} and len(result.train) == 487
    assert result.test_sources[0]["rows"] == 6 and result.test_ledger["kept"] == 6
    # With one of them, the other is split off from what is left.
    result = run(tmp_path, source=source, test_source=given["test_source"])
    assert result.ledger["dropped"] == {"in_test": 6} and len(result.test) == 6 and 10 < len(result.val) < 50
    assert len(result.train) + len(result.val) == 494
    result = run(tmp_path, source=source, val_source=given["val_source"], test_size=0.1)
    assert result.ledger["dropped"] == {"in_val": 10} and len(result.val) == 10 and 20 < len(result.test) < 80
