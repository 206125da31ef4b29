"""No answer is generated twice, and what is kept changes none."""

from collections.abc import Iterator

import pytest
import torch
from tiny import make_model

from moult.measuring import answers
from moult.measuring.answers import PROMPTS_AT_ONCE, KeptAnswers

REPORT = {"stop": {"generation_stop_ids": [2]}}


class Chat:
    pad_id = 0

    def decode(self, ids, special=True):
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(make_model(tmp_path_factory.mktemp("base") / "base")).eval()


@pytest.fixture
def asked(monkeypatch) -> Iterator[list[int]]:
    """How many prompts each call has generated answers to."""
    calls, generate = [], answers.generate
    monkeypatch.setattr(
        answers,
        "generate",
        lambda model, prompts, *more: (calls.append(len(prompts)), generate(model, prompts, *more))[1],
    )
    yield calls


def questions(kind: str, count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(len(kind))
    sizes = torch.randint(2, 20, (count,), generator=generator).tolist()
    return [
        {
            "kind": kind,
            "id": f"{kind}{index}",
            "group": f"{kind}{index}",
            "prompt": "?",
            "reference": None,
            "ids": torch.randint(3, 128, (size,), generator=generator).tolist(),
        }
        for index, size in enumerate(sizes)
    ]


def answer(model, folder, every: list[dict], alone: bool = False, **depends_on: str) -> list[dict]:
    return answers.answer(model, every, Chat(), REPORT, 6, KeptAnswers(folder, depends_on, alone))


def test_what_was_generated_is_not_generated_again(model, asked, tmp_path):
    every = questions("prompt", 5) + questions("row", 9) + questions("instruction", 4)
    first = answer(model, tmp_path, every)
    assert sorted(asked) == [4, 5, 9]
    asked.clear()
    assert answer(model, tmp_path, every) == first and asked == []
    assert [row["id"] for row in first] == [question["id"] for question in every]


def test_a_new_prompt_generates_no_rows_again_and_the_answers_are_those_of_a_fresh_start(model, asked, tmp_path):
    prompts, others = questions("prompt", PROMPTS_AT_ONCE + 2), questions("row", 9) + questions("instruction", 4)
    answer(model, tmp_path / "kept", prompts[:-1] + others)
    asked.clear()
    found = answer(model, tmp_path / "kept", prompts + others)
    assert asked == [2]  # the new one, and the one that shares its batch
    assert found == answer(model, tmp_path / "fresh", prompts + others)


def test_another_model_device_or_setting_is_asked_anew(model, asked, tmp_path):
    rows = questions("row", 3)
    for wanted in ({"weights": "a"}, {"weights": "b"}, {"weights": "a", "dtype": "bfloat16"}):
        answer(model, tmp_path, rows, **wanted)
    assert asked == [3, 3, 3] and len(list(tmp_path.iterdir())) == 3
    answer(model, tmp_path, rows, alone=True, weights="b")
    assert asked == [3, 3, 3] and len(list(tmp_path.iterdir())) == 1


def test_what_was_stopped_goes_on(model, asked, tmp_path, monkeypatch):
    every = questions("row", 9) + questions("instruction", 4)
    generate = answers.generate

    def stopped(model, prompts, *more):
        if asked:
            raise KeyboardInterrupt
        return generate(model, prompts, *more)

    with monkeypatch.context() as patch:
        patch.setattr(answers, "generate", stopped)
        with pytest.raises(KeyboardInterrupt):
            answer(model, tmp_path / "kept", every)
    asked.clear()
    found = answer(model, tmp_path / "kept", every)
    assert asked == [4]
    assert found == answer(model, tmp_path / "fresh", every)


def test_prompts_are_batched_in_their_order_within_the_room():
    lengths = [10, 90, 10, 10, 40]
    plan = answers.in_order([0, 1, 2, 3, 4], lengths, lambda length: length / 100)
    assert plan == [[0], [1], [2, 3], [4]]
    assert answers.in_order([], [], float) == []
    many = answers.in_order(list(range(40)), [1] * 40, lambda length: 0.0)
    assert [len(batch) for batch in many] == [16, 16, 8]
