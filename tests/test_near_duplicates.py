"""prepare: near copies of rows are found, and end in one part."""

import json
import random

import numpy as np
import pytest
from preparing import pairs, prompts, run, write

from moult.data import near_duplicates
from moult.data.near_duplicates import SHINGLE, SIMILAR, VALUES, Signer, first_alike

WORDS = ["".join(random.Random(n).choices("abcdefghijklmnop", k=6)) for n in range(3000)]


def text(number: int, length: int = 60) -> str:
    return " ".join(random.Random(f"text {number}").choices(WORDS, k=length))


def changed(said: str, words: int, seed: int = 0) -> str:
    """The text with so many words replaced, far from each other."""
    parts = said.split()
    for place in range(words):
        parts[(seed + place * (len(parts) // words)) % len(parts)] = f"changed{seed}x{place}"
    return " ".join(parts)


def signatures_of(texts: list[str]) -> bytes:
    signer = Signer()
    for text in texts:
        signer.add(text)
    return signer.end()


def values_of(*texts: str) -> np.ndarray:
    return np.frombuffer(signatures_of(list(texts)), "<u2").reshape(-1, VALUES)


def in_common(one: str, other: str) -> float:
    first, second = values_of(one, other)
    return float((first == second).mean())


def jaccard(one: str, other: str) -> float:
    def shingles(said: str) -> set:
        words = said.lower().split()
        return {tuple(words[(at + step) % len(words)] for step in range(SHINGLE)) for at in range(len(words))}

    both = shingles(one), shingles(other)
    return len(both[0] & both[1]) / len(both[0] | both[1])


# --- signatures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [1, 2, 4, 8])
def test_signatures_have_as_many_numbers_in_common_as_texts_have_shingles(words):
    texts = [text(number, 100) for number in range(150)]
    found = [in_common(one, changed(one, words, seed)) for seed, one in enumerate(texts)]
    assert np.mean(found) == pytest.approx(jaccard(texts[0], changed(texts[0], words)), abs=0.02)
    assert np.std(found) < 0.08


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("What is the capital?", "what is THE capital", True),
        ("What is the capital?", "What is a capital?", False),
        ("What is 5 - 3?", "What is 5 / 3?", False),
        ("Qu\u2019est-ce que c\u2019est ?", "Qu'est - ce que c'est", True),
        ("a, b; c", "a b c.", True),
        ("\u4f60\u597d\uff0c\u4e16\u754c\u3002", "\u4f60\u597d\u4e16\u754c", True),
        ("\u4f60\u597d\u4e16\u754c", "\u4f60\u4e16\u597d\u754c", False),
        ("\u0928\u092e\u0938\u094d\u0924\u0947", "\u0928\u092e\u0938\u094d\u0924", False),
        ("...", "???", False),
        ("...", "...", True),
        ("\U0001f600", "\U0001f601", False),
        ("x", "x\n", True),
        ("", "a", False),
    ],
)
def test_words_count_and_not_case_or_punctuation(one, other, same):
    assert in_common(one, other) == (1 if same else pytest.approx(0, abs=0.5))


def test_a_signature_depends_on_its_text_alone(monkeypatch):
    texts = [text(n, n) for n in range(50)] + ["", "...", "a", "\u4f60\u597d", text(1, 3000)]
    alone = b"".join(signatures_of([one]) for one in texts)
    assert signatures_of(texts) == alone and len(alone) == len(texts) * near_duplicates.SIZE
    for size in (1, 100, 10**9):
        monkeypatch.setattr(near_duplicates, "_PIECE", size)
        assert signatures_of(texts) == alone
    assert signatures_of([]) == b""
    # The same on every machine and with every version: what it is made from is pinned.
    assert values_of("What is the capital of France?")[0, :4].tolist() == KNOWN


KNOWN = [33307, 49375, 50810, 54103]


# --- what is alike ----------------------------------------------------------------------------------------------------


def roots_of(texts: list[str], same=None, tmp=None) -> list[int]:
    file = tmp.open("w+b")
    file.write(signatures_of(texts))
    same = np.arange(len(texts)) if same is None else np.array(same)
    return first_alike(file, np.arange(len(texts)), same).tolist()


def test_near_copies_have_the_first_for_root_in_any_order(tmp_path, monkeypatch):
    texts = [text(number, 60 + number) for number in range(40)]
    copies = [changed(one, 1, seed) for seed, one in enumerate(texts)]
    far = [changed(one, 20, seed) for seed, one in enumerate(texts)]
    both = [*texts, *copies, *far]
    assert roots_of(both, tmp=tmp_path / "a") == [*range(40), *range(40), *range(80, 120)]
    order = random.Random(0).sample(range(120), 120)
    roots = roots_of([both[index] for index in order], tmp=tmp_path / "b")
    for place, index in enumerate(order):
        mates = [at for at, other in enumerate(order) if index < 80 and other < 80 and other % 40 == index % 40]
        assert roots[place] == min(mates or [place])
    monkeypatch.setattr(near_duplicates, "_BLOCK", 7)
    assert roots_of([both[index] for index in order], tmp=tmp_path / "c") == roots


def test_what_belongs_together_anyway_is_joined_with_the_near_copies(tmp_path):
    texts = [text(0), text(1), text(2), changed(text(2), 1), text(4)]
    assert roots_of(texts, [0, 0, 2, 0, 4], tmp_path / "a") == [0, 0, 0, 0, 4]


def test_most_planted_copies_are_found(tmp_path):
    """With one word of 40 changed (78 % in common) in 95 %; of rows with 50 % in common few are joined."""
    for words, length, low, high in ((1, 40, 0.85, 1), (2, 120, 0.95, 1), (4, 60, 0, 0.08)):
        texts = [text(number, length) for number in range(200)]
        copies = [changed(one, words, seed) for seed, one in enumerate(texts)]
        roots = roots_of([*texts, *copies], tmp=tmp_path / f"{words}")
        found = np.mean([roots[200 + index] == index for index in range(200)])
        assert low <= found <= high, (words, length, found)
        assert (jaccard(texts[0], copies[0]) > SIMILAR) == (low > 0)


# --- in prepare -------------------------------------------------------------------------------------------------------


def rows_of(count: int, start: int = 0) -> list[dict]:
    return [{"prompt": text(n), "completion": text(-n, 30)} for n in range(start, start + count)]


def near(row: dict) -> dict:
    return {**row, "prompt": changed(row["prompt"], 1)}


def place_of(result) -> dict[str, str]:
    return {prompt: part for part in ("train", "val", "test") for prompt in prompts(getattr(result, part))}


def test_a_near_copy_ends_in_the_same_part_and_group(tmp_path):
    rows = rows_of(400)
    copies = [near(row) for row in rows[:200]]
    source = write(tmp_path / "rows.jsonl", [*rows, *copies])
    result = run(tmp_path, source=source, val_size=0.15, test_size=0.15)
    place = place_of(result)
    assert set(place.values()) == {"train", "val", "test"}
    assert all(place[row["prompt"]] == place[copy["prompt"]] for row, copy in zip(rows, copies, strict=False))
    assert result.near_duplicates == {"policy": "group", "rows": 400, "groups": 200, "largest": 2, "left_apart": 0}
    group = {row["messages"][0]["content"]: row["group"] for row in result.train + result.val + result.test}
    assert group[rows[3]["prompt"]] == group[copies[3]["prompt"]] and len(set(group.values())) == 400
    assert result.test_summary["groups"] == len({row["group"] for row in result.test}) < len(result.test)
    # The first row's group is the one that it has without its copy.
    apart = run(tmp_path, source=source, val_size=0.15, test_size=0.15, near_duplicates="ignore")
    assert apart.near_duplicates is None
    first = {row["id"]: row["group"] for row in apart.train + apart.val + apart.test}
    assert all(row["group"] == first[row["id"]] for row in result.train if int(row["id"].split(":")[1]) <= 400)
    place = place_of(apart)
    assert any(place[row["prompt"]] != place[copy["prompt"]] for row, copy in zip(rows, copies, strict=False))


def test_dropped_are_all_but_the_first(tmp_path):
    rows = rows_of(60)
    source = write(tmp_path / "rows.jsonl", [*rows, *(near(row) for row in rows[:10])])
    result = run(tmp_path, source=source, near_duplicates="drop")
    assert result.ledger["dropped"] == {"near_duplicate": 10} and result.ledger["kept"] == 60
    assert result.ledger["examples"]["near_duplicate"][0] == "rows.jsonl:61"
    assert set(place_of(result)) == {row["prompt"] for row in rows}


@pytest.mark.parametrize("policy", ["group", "drop", "ignore"])
def test_near_copies_of_given_rows_leave_train(tmp_path, policy):
    rows = rows_of(100)
    given = {f"{part}_source": tmp_path / f"given-{part}.jsonl" for part in ("val", "test")}
    sources = {
        "val_source": write(given["val_source"], [near(row) for row in rows[:5]]),
        "test_source": write(given["test_source"], [near(row) for row in rows[5:12]]),
    }
    source = write(tmp_path / "rows.jsonl", rows)
    result = run(tmp_path, source=source, near_duplicates=policy, **sources)
    assert (len(result.val), len(result.test)) == (5, 7)
    assert result.ledger["dropped"] == ({} if policy == "ignore" else {"in_val": 5, "in_test": 7})


def test_rows_of_a_template_are_left_apart_and_told(tmp_path, caplog):
    rows = [{"prompt": f"{text(0, 90)} {n}", "completion": "yes"} for n in range(300)]
    others = rows_of(700, 1)
    source = write(tmp_path / "rows.jsonl", [*rows, *others, near(others[0])])
    result = run(tmp_path, source=source)
    assert result.near_duplicates == {"policy": "group", "rows": 2, "groups": 1, "largest": 2, "left_apart": 300}
    assert "300 of 1,001 rows are near copies of each other" in caplog.text
    of_template = {part for prompt, part in place_of(result).items() if prompt.startswith(rows[0]["prompt"][:300])}
    assert of_template == {"train", "val", "test"}
    dropped = run(tmp_path, source=source, near_duplicates="drop").ledger["dropped"]
    assert dropped == {"near_duplicate": 1}


@pytest.mark.parametrize(
    "prompt", ["What is {} plus {}?", "I have {} apples and buy {} more. How many apples do I have?"]
)
def test_short_rows_that_differ_in_a_number_are_not_near_copies(tmp_path, prompt):
    rows = [
        {"prompt": prompt.format(a, b), "completion": f"It is {a + b}."} for a in range(2, 32) for b in range(2, 12)
    ]
    assert run(tmp_path, source=write(tmp_path / "rows.jsonl", rows)).near_duplicates["rows"] == 0


def test_the_bytes_are_the_same_with_weights_languages_and_processes(tmp_path):
    english = "Could you please tell me what people usually say about the number {} when they talk of numbers at home?"
    rows = [{"prompt": english.format(n // 2) + " Please!" * (n % 2), "completion": text(n // 2)} for n in range(240)]
    sources = [{"path": write(tmp_path / "rows.jsonl", rows), "weight": 2}]
    found = [
        run(tmp_path, threads=threads, source=sources, languages=["en"], unknown_language="keep", test_size=0.2)
        for threads in (1, 2)
    ]
    assert vars(found[0]) == vars(found[1])
    result = found[0]
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    for line, row in zip(lines, result.train, strict=True):
        assert json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=False) == line
    assert result.near_duplicates["groups"] > 100 and len({row["id"] for row in result.train}) == len(result.train)


def test_small_rows(tmp_path):
    assert run(tmp_path, source=write(tmp_path / "rows.jsonl", pairs(20))).near_duplicates["rows"] == 0
