"""Two tuned models on the same rows: the difference, its p-value, and what several comparisons may claim."""

import random

import pytest
from comparing import noisy, rows, samples

from moult.errors import MoultError
from moult.measuring.paired import (
    BITS,
    NATS,
    clear_pairs,
    compare_answers,
    compare_likelihoods,
    mcnemar,
    shared_rows,
)
from moult.measuring.seeds import student, student_p

OPTIONS = {"confidence": 0.95, "resamples": 2000, "seed": 0}


def test_the_difference_of_two_models_by_hand():
    a, b = rows(lambda index: 1.0 + index % 3), rows(lambda index: 1.5 + index % 3)
    found = compare_likelihoods(a, b, **OPTIONS)
    assert (found["n"], found["groups"], found["unit"]) == (60, 60, NATS)
    assert (found["a"], found["b"]) == (pytest.approx(2.0), pytest.approx(2.5))
    # The rows differ, the differences do not: paired, there is no doubt. Only the sign test leaves some.
    assert found["difference"]["value"] == pytest.approx(0.5)
    assert found["difference"]["interval"] == [pytest.approx(0.5), pytest.approx(0.5)]
    assert found["difference"]["p"] < 1e-6


def test_only_rows_that_both_have_count_and_their_order_does_not():
    a, b = rows(noisy(1)), rows(noisy(2))
    whole = compare_likelihoods(a, b, **OPTIONS)
    extra = [{**row, "id": f"other {row['id']}", "nll": 1e6} for row in b]
    assert compare_likelihoods(a, extra[:5] + b[::-1] + extra[5:], **OPTIONS) == whole
    assert compare_likelihoods(a, b[:20], **OPTIONS)["n"] == 20


def test_a_row_in_several_sequences_is_compared_part_by_part():
    a = rows(lambda index: 1.0, 2) + rows(lambda index: 3.0, 2)
    b = rows(lambda index: 2.0, 2) + rows(lambda index: 3.0, 2)
    shared = shared_rows({"a": a, "b": b[:3]})
    assert [(row["id"], row["nll"]) for row in shared["b"]] == [("r0", 20.0), ("r1", 20.0), ("r0", 30.0)]
    assert [row["nll"] for row in shared["a"]] == [10.0, 10.0, 30.0]


def test_other_tokenizers_are_compared_in_bits_per_byte():
    a, b = rows(lambda index: 1.0, tokens=10), rows(lambda index: 1.0, tokens=20)
    found = compare_likelihoods(a, b, **OPTIONS)
    assert found["unit"] == BITS
    assert found["a"] == pytest.approx(10 / 0.6931471805599453 / 40)
    assert found["b"] == pytest.approx(2 * found["a"])


def test_a_row_of_which_more_was_cut_off_is_another_text():
    a, b = rows(noisy(1)), rows(noisy(2))
    b[0] = {**b[0], "tokens": 5, "bytes": 20}
    found = compare_likelihoods(a, b, **OPTIONS)
    assert (found["n"], found["unit"]) == (59, NATS)


@pytest.mark.parametrize("b", [[], [{"id": "other", "group": "g", "nll": 1.0, "tokens": 1, "bytes": 1}]])
def test_without_shared_rows_there_is_nothing_to_compare(b):
    with pytest.raises(MoultError, match="a, b have no measured rows in common"):
        compare_likelihoods(rows(noisy(1)), b, **OPTIONS)


def test_the_same_model_twice_is_not_different():
    a = rows(noisy(1))
    difference = compare_likelihoods(a, a, **OPTIONS)["difference"]
    assert (difference["value"], difference["p"]) == (0.0, 1.0)


def test_p_goes_on_where_no_resample_is_left():
    """With 200 resamples the smallest share is 0.5 %, and of 6 groups even all together show only 2^-5."""
    clear = compare_likelihoods(rows(noisy(1)), rows(noisy(2, 1.25)), confidence=0.95, resamples=200, seed=0)
    clearer = compare_likelihoods(rows(noisy(1)), rows(noisy(2, 1.4)), confidence=0.95, resamples=200, seed=0)
    assert 1e-12 < clearer["difference"]["p"] < clear["difference"]["p"] < 0.005
    few = compare_likelihoods(rows(noisy(1), 6), rows(noisy(2, 9.0), 6), **OPTIONS)
    assert few["difference"]["p"] == 2**-5
    one = compare_likelihoods(rows(noisy(1), 6, per_group=6), rows(noisy(2, 9.0), 6, per_group=6), **OPTIONS)
    assert one["difference"]["p"] == 1.0


def test_equal_models_are_called_different_as_rarely_as_promised():
    """Of 300 pairs without a true difference at most 5 %, give or take chance (3 standard errors: 3.8 %)."""
    found = [
        compare_likelihoods(rows(noisy(2 * n), 40), rows(noisy(2 * n + 1), 40), confidence=0.95, resamples=500, seed=n)
        for n in range(300)
    ]
    assert 0.012 < sum(pair["difference"]["p"] < 0.05 for pair in found) / 300 < 0.088


def test_groups_of_rows_are_worth_less_than_as_many_rows():
    shift = [random.Random(index).gauss(0.1, 0.3) for index in range(20)]
    a = rows(lambda index: 1.0, per_group=3)
    grouped = [{**row, "nll": row["nll"] + 10 * shift[int(row["group"][1:])]} for row in a]
    apart = [[{**row, "group": row["id"]} for row in own] for own in (a, grouped)]
    widths = [
        high - low
        for low, high in (
            compare_likelihoods(*pair, **OPTIONS)["difference"]["interval"] for pair in ((a, grouped), apart)
        )
    ]
    assert widths[0] > 1.4 * widths[1]


def test_student_p_is_the_inverse_of_student():
    for df in (1, 2, 9, 500):
        assert student_p(student(0.95, df), df) == pytest.approx(0.05, abs=1e-9)
    assert student_p(0.0, 7) == 1.0


# --- answers ----------------------------------------------------------------------------------------------------------


def test_mcnemar_by_hand():
    """(2, 8) and (1, 5): the sums of binomial coefficients; no flips at all, and as many in both directions."""
    assert mcnemar(2, 8) == mcnemar(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar(1, 5) == pytest.approx(2 * 7 / 64)
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1.0
    assert mcnemar(0, 5000) == 0.0 or mcnemar(0, 5000) < 1e-300


def test_flips_in_both_directions():
    a = samples([True, True, False, False, True])
    b = samples([True, False, True, True, True])
    found = compare_answers(a, b, 0.95)
    assert (found["n"], found["a"]["value"], found["b"]["value"]) == (5, 0.6, 0.8)
    assert (found["only_a"], found["only_b"]) == ([[1, 1]], [[2, 2], [3, 3]])
    assert found["difference"]["value"] == pytest.approx(0.2)
    assert found["mcnemar"] == 1.0
    assert found["p"] == max(found["mcnemar"], found["difference"]["p"])


def test_the_same_question_by_its_words():
    """A row's prompt is written by the chat template, which another model has otherwise; a prompt that was edited is another."""
    a, b = samples([True, False]), samples([False, True], prompt="<|user|>?")
    assert compare_answers(a, b[::-1], 0.95)["only_a"] == [[0, 1]]
    a, b = samples([True, False], "prompt"), samples([False, True], "prompt")
    b[1]["prompt"] = "What?"
    assert compare_answers(a, b, 0.95)["n"] == 1


@pytest.mark.parametrize(
    "b",
    [
        [],
        samples([True], reference="no"),
        samples([True], tuned={"answer": "", "stopped": True, "checks": {"json": True}}),
        samples([True], tuned={"answer": "", "stopped": True, "checks": {}}),
    ],
)
def test_without_shared_questions_there_is_nothing_to_compare(b):
    with pytest.raises(MoultError, match="no checked question in common"):
        compare_answers(samples([True]), b, 0.95)


def test_several_pairs_are_corrected():
    assert clear_pairs({"ab": 0.01, "ac": 0.024, "bc": 0.04}, 0.95) == {"ab", "ac", "bc"}
    assert clear_pairs({"ab": 0.01, "ac": 0.026, "bc": 0.9}, 0.95) == {"ab"}
    assert clear_pairs({"ab": 0.02, "ac": 0.9, "bc": 0.9}, 0.95) == set()
    assert clear_pairs({}, 0.95) == set()
