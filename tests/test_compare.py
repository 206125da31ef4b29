"""The page of two runs: which is better, where they part, and what flipped."""

import re
from argparse import Namespace

import pytest
from browser import needs_chromium, problems
from comparing import (
    ATTACK,
    LEDGER,
    OPTIONS,
    cells,
    edit,
    edit_rows,
    make_dataset,
    make_run,
    noisy,
    row,
    rows,
    samples,
    words,
)
from planning import Log
from workflow import checkout, snakemake

import compare
from moult.data.changed_rows import changed_rows
from moult.errors import MoultError
from moult.files import write_jsonl
from moult.measuring.differences import Difference, choices, first_to_differ


def make(results, a: str = "a", b: str = "b", datasets: tuple[str, str] = ("d", "d")) -> str:
    page = results / "compare.html"
    arguments = Namespace(
        runs=[str(results / name) for name in (a, b)],
        prepared=[str(results / "prepared" / name) for name in datasets],
        tokens=[str(results / name / "tokens") for name in (a, b)],
        page=str(page),
    )
    compare.compare(OPTIONS, arguments, Log())
    return page.read_text(encoding="utf-8")


def headline(page: str) -> str:
    return words(re.search(r"<strong>(.*?)</strong>", page, re.DOTALL)[1])


@pytest.fixture
def results(tmp_path):
    """a and b are the same, but for their names."""
    make_dataset(tmp_path, "d", [row("x:1", "one")])
    for name in "ab":
        make_run(tmp_path, name, better=1.0)
    return tmp_path


def test_two_runs_that_are_the_same(results):
    page = make(results)
    assert headline(page) == "There is no clear difference between a and b. Nothing differs between them."
    text = words(page)
    assert "Nothing differs." in text and "Both have the same prepared rows." in text
    assert "0 pass only with a, 0 only with b." in text


def test_one_setting_that_made_it_better(results, tmp_path):
    make_run(results, "c", {"lora": {"r": 8}}, better=1.5)
    page = make(results, "a", "c")
    assert headline(page) == (
        "c is better than a; their answers may be equally good. "
        "Changed from a to c: only lora.r (4 → 8); the first stage that differs is finetune."
    )
    text = words(page)
    assert (
        "Loss: c has -0.5 nats per token [-0.5, -0.5] against a, on 40 rows. Less is better. This is more than chance"
        in text
    )
    assert "No other setting differs: the reason is this one, or the luck of the training" in text
    assert cells(page, "What differs") == [["finetune", "setting", "lora.r", "4", "8"]]


def test_several_settings_and_a_seed(results):
    make_run(results, "c", {"lora": {"r": 8}, "dtype": "float16", "seed": 4}, better=1.5)
    page = make(results, "c", "a")
    assert headline(page).startswith(
        "c is better than a; their answers may be equally good. "
        "Changed from c to a: dtype (float16 → bfloat16), lora.r (8 → 4) and seed (4 → 3); the first stage"
    )
    assert "3 settings differ: the reason may be any of them, or all of them together." in words(page)
    make_run(results, "s", {"seed": 4}, better=1.5)
    assert "Only the seed differs, so what is different is the luck of the training." in words(make(results, "a", "s"))


def test_the_same_settings_on_another_machine(results):
    edit(results / "b/adapter.json", lambda adapter: adapter["versions"].update(torch="3"))
    page = make(results)
    assert headline(page).endswith(
        "They have the same settings; the first stage that differs is finetune, in its software or hardware."
    )
    assert cells(page, "What differs") == [["finetune", "environment", "versions.torch", "not there", "3"]]


@pytest.mark.parametrize(
    ("file", "change", "line"),
    [
        ("merge.json", lambda x: x["base"].update(name="other"), ["base model", "setting", "model.name", "base", "other"]),
        (
            "merge.json",
            lambda x: x["base"]["files"].update({"model.safetensors": "4" * 64}),
            ["base model", "result", "files.model.safetensors", "2" * 12, "4" * 12],
        ),
        ("tokens/report.json", lambda x: x.update(max_length=9), ["encode", "setting", "max_length", "256", "9"]),
        ("tokens/report.json", lambda x: x["test"].update(tokens=8), ["encode", "result", "test.tokens", "90", "8"]),
        ("plan.json", lambda x: x["steps"].update(total=3), ["plan", "result", "steps.total", "9", "3"]),
        ("adapter.json", lambda x: x.update(step=3), ["finetune", "result", "step", "7", "3"]),
        ("merge.json", lambda x: x.update(how="peft"), ["merge", "result", "how", "streamed", "peft"]),
        ("metrics.json", lambda x: x["data"].update(sequences=3), ["evaluate", "result", "sequences", "40", "3"]),
        ("metrics.json", lambda x: x["data"].update(confidence=0.9), ["score", "setting", "confidence", "0.95", "0.9"]),
    ],
)  # fmt: skip
def test_where_two_runs_part(results, file, change, line):
    edit(results / "b" / file, change)
    assert cells(make(results), "What differs") == [line]


def test_a_setting_comes_before_the_results_that_follow_from_it():
    found = [
        Difference("plan", "result", "parameters", 1, 2),
        Difference("finetune", "environment", "versions.torch", 1, 2),
        Difference("finetune", "setting", "lora.r", 1, 2),
        Difference("score", "setting", "confidence", 0.9, 0.95),
    ]
    assert choices(found) == [found[2]]
    # Without what came first, and so on.
    firsts = [
        first_to_differ([one for one in found if one not in left]) for left in ([], found[2:3], found[1:3], found[:3])
    ]
    assert firsts == ["finetune", "finetune", "plan", "score"]
    assert first_to_differ([]) is None


def test_how_they_were_measured_is_no_reason(results):
    edit(results / "b/metrics.json", lambda metrics: metrics["answers"]["prompts"].update(n=1))
    page = make(results)
    assert headline(page).endswith("They differ only in how they were measured.")
    assert "differ: the reason" not in words(page)


def test_answers_that_flipped(results):
    def lose(index, sample):
        if sample["kind"] == "row" and sample["id"] in ("r1", "r2", "r3", "r4", "r5", "r6", "r7"):
            sample["tuned"].update(checks={"exact": False, "json": False}, answer=ATTACK)

    edit_rows(results / "b/samples.jsonl", lose)
    page = make(results)
    text = words(page)
    assert "7 pass only with a, 0 only with b." in text and "p = 0.016 (McNemar's exact test)" in text  # 2 / 2^7
    assert headline(page).startswith("a is better than b")
    assert page.count("<article ") == page.count('data-direction="lost"') == 7
    assert "<img" not in page and page.count("<script>") == 1 and "⟨U+202E⟩" in page


def test_the_loss_and_the_answers_may_not_agree(results):
    make_run(results, "c", better=2.0, right=0.5)
    assert headline(make(results, "a", "c")).startswith("c has the lower loss, but a answers better. ")


def test_the_rows_that_changed_most():
    changes = [{"change": number / 100} for number in range(-50, 200)]
    found = [one["change"] for one in compare.changed_most(changes)]
    assert found[: compare.ROWS] == [-(50 - n) / 100 for n in range(compare.ROWS)]
    assert found[compare.ROWS :] == [(199 - n) / 100 for n in range(compare.ROWS)]
    assert compare.changed_most([{"change": 0.0}]) == []


def test_rows_of_other_tokenizers_are_in_bits_per_byte():
    a, b = rows(lambda index: 1.0, 2, tokens=10), rows(lambda index: 1.0, 2, tokens=20)
    (first, _) = compare.row_losses([a, b], "bits per byte", {"r0": "text"})
    assert first["b"] == pytest.approx(2 * first["a"]) == pytest.approx(20 / 0.6931471805599453 / 40)
    assert first["text"] == "text"


def test_runs_with_nothing_in_common(results):
    edit_rows(results / "b/tuned/likelihood.jsonl", lambda index, row: row.update(id=f"other {index}"))
    edit_rows(results / "b/samples.jsonl", lambda index, sample: sample.update(id=f"other {index}"))
    page = make(results)
    assert headline(page).startswith("a and b have nothing in common that was measured. ")
    assert words(page).count("cannot be compared") == 2


# --- rows -------------------------------------------------------------------------------------------------------------


def test_what_became_of_rows(tmp_path):
    a = [row("x:1", "one"), row("x:2", "two"), row("x:3", "three"), row("x:3", "three")]
    b = [row("x:1", "one"), row("x:2", "TWO"), row("x:4", "three"), {**row("x:5", "five"), "group": "other"}]
    write_jsonl(tmp_path / "a.jsonl", a)
    write_jsonl(tmp_path / "b.jsonl", b)
    found = changed_rows(tmp_path / "a.jsonl", tmp_path / "b.jsonl", 10)
    assert {key: found[key] for key in ("rows", "added", "removed", "changed", "moved")} == {
        "rows": (4, 4), "added": 2, "removed": 1, "changed": 1, "moved": 1}  # fmt: skip
    assert found["examples"] == {"added": b[2:], "removed": [a[2]], "changed": [(a[1], b[1])]}
    same = changed_rows(tmp_path / "a.jsonl", tmp_path / "a.jsonl", 10)
    assert [same[key] for key in ("added", "removed", "changed", "moved")] == [0, 0, 0, 0]


def test_a_group_or_language_is_not_the_text_of_a_row(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [row("x:1", "one")])
    write_jsonl(tmp_path / "b.jsonl", [{**row("x:1", "one"), "group": "other", "language": "de", "source": 3}])
    assert changed_rows(tmp_path / "a.jsonl", tmp_path / "b.jsonl", 10)["changed"] == 0


def test_examples_are_the_first_and_no_more(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [])
    write_jsonl(tmp_path / "b.jsonl", [row(f"x:{n}", str(n)) for n in range(30)])
    found = changed_rows(tmp_path / "a.jsonl", tmp_path / "b.jsonl", 3)
    assert (found["added"], [one["id"] for one in found["examples"]["added"]]) == (30, ["x:0", "x:1", "x:2"])


def test_two_datasets(results):
    make_dataset(results, "e", [row("x:1", "ONE"), row("x:2", ATTACK)], sources=[{**LEDGER["sources"][0], "rows": 51}])
    page = make(results, datasets=("d", "e"))
    text = words(page)
    assert "a has 1 rows, b has 2. By their ids 1 were added, 0 removed, and 1 have another text." in text
    assert "user: ONE" in text and "user: one" in text and "<img" not in page
    assert cells(page, "What differs")[0][:3] == ["prepare", "setting", "sources.one.jsonl"]


def test_rows_of_two_datasets_with_one_name_are_not_compared():
    a = rows(noisy(1))
    b = [{**one, "group": "another"} for one in rows(noisy(2))]
    with pytest.raises(MoultError, match="no measured rows in common"):
        compare.compare_likelihoods(a, b, **OPTIONS)


# --- size, the browser, and the rule -----------------------------------------------------------------------------------


def test_five_thousand_rows_of_any_text_make_a_small_page(results):
    for name, passed in (("a", True), ("b", False)):
        measured = rows(noisy(passed, 1.0 + passed), 5_000)
        write_jsonl(results / name / "tuned/likelihood.jsonl", measured)
        write_jsonl(
            results / name / "samples.jsonl", samples([passed] * 5_000, prompt=ATTACK * 20, reference="x" * 1_200)
        )
        edit_rows(results / name / "samples.jsonl", lambda _, sample: sample["tuned"].update(answer=ATTACK * 20))
    page = make(results)
    assert len(page.encode()) < 3_000_000
    assert "5,000 pass only with a" in words(page) and "Of each kind the first 100 are here" in words(page)
    assert page.count("<script>") == 1 and "<img" not in page and "\u202e" not in page and "\x00" not in page


@needs_chromium
def test_what_a_browser_makes_of_it(results):
    make_dataset(results, "e", [row("x:1", "ONE"), row("x:2", ATTACK)])
    make_run(results, "c", {"lora": {"r": 8}}, better=1.5, noise=0.4, right=0.7)
    edit_rows(
        results / "c/tuned/likelihood.jsonl", lambda index, row: row.update(nll=max(0, row["nll"] + (-1) ** index * 5))
    )
    make(results, "a", "c", datasets=("d", "e"))
    assert problems(results / "compare.html") == []


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("demo..typo", "the config has no run typo\n  -> take two of its runs: demo"),
        ("demo..demo", "that is the same run\n  -> name two runs"),
    ],
)
def test_a_target_that_names_no_two_runs(pair, said, tmp_path):
    target = f"results/compare/{pair}.html"
    text = snakemake(checkout(tmp_path), "-n", target, code=1)
    assert f"{target}: {said}" in text
