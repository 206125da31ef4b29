"""Questions of the evaluation in the training rows: found, named, and handled as configured."""

import json
from argparse import Namespace

import pyarrow.parquet
import pytest
from configs import config
from planning import Log
from tokenizers_for_tests import DEMO

import contamination
import encode
import score
from moult.data.contamination import Questions, question_of, rows_told, words_of
from moult.data.portions import portions
from moult.errors import MoultError
from moult.files import read_json, write_json, write_jsonl
from moult.measuring.contamination import Contamination
from moult.workflow.stages import encoded_as, stage_settings

LONG = (
    "Janet's ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes muffins for her friends every day "
    "with four. She sells the remainder at the farmers' market daily for $2 per fresh duck egg."
)
SHORT = "What is the capital of Japan?"


def row(*contents: str, id: str = "r") -> dict:
    roles = ("user", "assistant")
    return {"id": id, "messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]}


def share(question: str, *contents: str) -> float:
    return Questions([question]).found_in(row(*contents)).get(0, 0.0)


# --- what counts as found ---------------------------------------------------------------------------------------------


def test_words_are_compared_without_case_and_punctuation():
    assert words_of("What's  NEW, Düsseldorf?") == ["what", "s", "new", "düsseldorf"]
    assert words_of("ＡＢＣ ﬁne") == ["abc", "fine"]
    assert words_of("東京はdocument") == ["東", "京", "は", "document"]


@pytest.mark.parametrize(
    "text",
    [
        LONG,
        f"Please solve this.\n\n{LONG.upper()}\nThink step by step.",
        LONG.replace(",", " ").replace(".", " -- "),
        LONG.replace("16", "17"),  # one word changed
    ],
)
def test_a_long_question_is_found_whatever_stands_around_it(text):
    assert share(LONG, text, "18") >= 0.5
    assert share(LONG, "Write a riddle.", text) >= 0.5  # an answer that holds it gives it away, too


def test_a_part_is_not_enough_and_every_place_is_looked_at():
    words = LONG.split()
    assert share(LONG, " ".join(words[: len(words) // 2])) == 0
    whole = Questions([LONG])
    for before in range(20):  # 13-grams begin anywhere; every seventh word is looked up
        assert whole.found_in(row(f"{'so ' * before}{LONG} {'well ' * before}")) == {0: 1.0}


def test_a_short_question_must_be_the_whole_of_a_turn():
    assert share(SHORT, "what is the capital of japan", "Tokyo") == 1
    assert share(SHORT, f"Tell me. {SHORT}", "Tokyo") == 0
    assert share(SHORT, "Ask me something.", SHORT) == 0
    assert Questions([SHORT]).found_in({"id": "t", "text": SHORT}) == {0: 1.0}
    assert share("?!", "?!", "no words, nothing to find") == 0


def test_of_several_questions_each_is_told():
    questions = Questions([SHORT, LONG, LONG, "What is the capital of Egypt?"])
    assert questions.found_in(row(SHORT, "Tokyo", LONG, "18")) == {0: 1.0, 1: 1.0, 2: 1.0}


def test_a_prompt_asks_its_last_turn():
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": SHORT}]
    assert question_of({"messages": turns}) == question_of({"prompt": SHORT}) == SHORT


# --- the stage --------------------------------------------------------------------------------------------------------


def searched(folder, rows: list[dict], threads: int = 1) -> tuple[dict, list[str], list[str]]:
    write_jsonl(folder / "train.jsonl", rows)
    items = [
        {"task": "t", "doc_id": number, "question": text} for number, text in enumerate([LONG, "unasked " * 20, LONG])
    ]
    write_jsonl(folder / "gsm.jsonl", items)
    settings = {"prompts": [SHORT, "What is new?"], "benchmarks": {"gsm": 2}}
    paths = {name: str(folder / f"{name}.json") for name in ("report", "rows")}
    arguments = Namespace(
        train=str(folder / "train.jsonl"), questions=[str(folder / "gsm.jsonl")], threads=threads, **paths
    )
    log = Log()
    contamination.search(settings, arguments, log)
    return read_json(paths["report"]), read_json(paths["rows"]), log.lines


def encoded(folder, rows: list[dict], left_out: list[str]) -> dict:
    """The report of encode, which has left these rows out of train."""
    for part, of_part in (("train", rows), ("val", rows[:2]), ("test", rows[:2])):
        write_jsonl(folder / f"{part}.jsonl", ({"group": one["id"], "source": 0, **one} for one in of_part))
    write_json(folder / "left_out.json", left_out)
    write_json(folder / "model.json", {"folder": str(DEMO)})
    settings = {"max_length": 64, "overlength": "error", "max_token_loss": 0.1, "unrenderable": "error"}
    settings |= {"chat_template": None, "chat_template_kwargs": {}, "trust_remote_code": False}
    paths = {part: str(folder / f"{part}.jsonl") for part in ("train", "val", "test")}
    paths |= {"model": str(folder / "model.json"), "out": str(folder / "tokens"), "templates": ""}
    encode.encode(settings, Namespace(**paths, threads=1, without=[str(folder / "left_out.json")]), Log())
    return read_json(folder / "tokens" / "report.json")


def test_rows_that_are_left_out_do_not_train_and_are_counted(tmp_path):
    rows = [row("How many?", str(number), id=f"d:{number}") for number in range(5)]
    report = encoded(tmp_path, rows, ["d:1", "d:3"])
    assert [report[part]["rows"] for part in ("train", "val", "test")] == [3, 2, 2], "only train leaves them out"
    trained = pyarrow.parquet.read_table(tmp_path / "tokens" / "train.parquet")["id"].to_pylist()
    assert trained == ["d:0", "d:2", "d:4"]
    assert report["contaminated_rows"] == rows_told(["d:3", "d:1"])


def test_if_every_row_is_left_out_it_says_why(tmp_path):
    rows = [row("How many?", "2", id=f"d:{number}") for number in range(2)]
    with pytest.raises(MoultError, match="every train row has a question of the evaluation") as error:
        encoded(tmp_path, rows, ["d:0", "d:1"])
    assert "eval.contamination: exclude" in error.value.fix and not (tmp_path / "tokens" / "train.parquet").exists()


def test_what_is_planted_is_found_named_and_told(tmp_path):
    rows = [row(f"question {number}", "answer", id=f"d:{number}") for number in range(600)]
    rows[7] = row(f"Hello! {LONG}", "18", id="d:7")
    rows[400] = row(SHORT, "Tokyo", id="d:400")
    rows.append(rows[400])  # a weight repeats it
    report, ids, lines = searched(tmp_path, rows)
    assert ids == ["d:400", "d:7"]
    assert report["contaminated_rows"] == rows_told(ids) | {"count": 2}
    assert report["looked_for"] == {"prompts": 2, "gsm": 2}  # within the limit
    prompt, item = report["found"]
    assert prompt == {"kind": "prompt", "question": SHORT, "coverage": 1.0, "row_count": 1, "rows": ["d:400"]}
    assert (item["benchmark"], item["task"], item["doc_id"], item["rows"]) == ("gsm", "t", 0, ["d:7"])
    assert any(
        "1 of 2 prompts, 1 of 2 gsm: questions of the evaluation are in 2 of 601 training rows" in x for x in lines
    )
    assert searched(tmp_path, rows, threads=2)[:2] == (report, ids)


def test_nothing_found_is_told_too(tmp_path):
    report, ids, lines = searched(tmp_path, [row("question", "answer")])
    assert (report["found"], ids) == ([], [])
    assert "none of 4 questions is in the 1 training rows" in lines[-1]


# --- what the runs share ----------------------------------------------------------------------------------------------


def test_all_runs_of_a_dataset_are_looked_for_together():
    prompts = "eval: {prompts: [{id: p, prompt: one}]}"
    resolved = config(
        prompts,
        "runs: {v: {dataset: a, eval: {prompts: [{id: p, prompt: two}], benchmarks: [{task: x, limit: 5}]}}, "
        "w: {dataset: a, eval: {benchmarks: [{task: x, limit: 9}, {task: y}]}}}",
    )
    assert stage_settings(resolved, "contamination", "a") == {
        "prompts": ["one", "two"],
        "benchmarks": {"x": 9, "y": None},
    }
    assert stage_settings(resolved, "contamination", "b") == {"prompts": ["one"], "benchmarks": {}}


def test_runs_with_other_questions_share_tokens_but_not_with_those_that_drop_rows():
    resolved = config(
        "runs: {v: {dataset: a, eval: {prompts: [{id: p, prompt: q}]}}, d: {dataset: a, eval: {contamination: drop}}}"
    )
    assert encoded_as(resolved) == {"a": "a", "b": "b", "v": "a", "d": "d"}


# --- what becomes of it -----------------------------------------------------------------------------------------------


def test_encode_leaves_out_the_rows(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [row("x", id=f"d:{number}") for number in range(9)])
    left = [json.loads(line)["id"] for part in portions(tmp_path / "train.jsonl", {"d:3", "d:8"}) for line in part]
    assert left == [f"d:{number}" for number in (0, 1, 2, 4, 5, 6, 7)]


FOUND = {
    "contaminated_rows": rows_told(["d:1"]),
    "found": [
        {"kind": "prompt", "question": SHORT},
        {"kind": "benchmark", "benchmark": "gsm", "task": "t", "doc_id": 4},
        {"kind": "benchmark", "benchmark": "another run's", "task": "t", "doc_id": 5},
    ],
}


def of_policy(policy: str) -> Contamination:
    prompts = [{"id": "tokyo", "prompt": SHORT}, {"id": "new", "prompt": "What is new?"}]
    benchmarks = {"GSM": {"slug": "gsm", "metric": None}}
    return Contamination.of(FOUND, {"contamination": policy, "prompts": prompts, "benchmarks": benchmarks})


@pytest.mark.parametrize(
    ("policy", "left_out", "then"),
    [
        ("exclude", (["tokyo"], {("t", 4)}), "they do not count"),
        ("drop", ([], set()), "these rows were left out"),
        ("report", ([], set()), "they count all the same"),
    ],
)
def test_the_policy_decides_what_counts(policy, left_out, then):
    found = of_policy(policy)
    assert (found.prompts_left_out(), found.questions_left_out("gsm")) == left_out
    assert found.told() == {"policy": policy, "prompts": ["tokyo"], "benchmarks": {"GSM": 1}, "training_rows": 1}
    assert found.reason() == f"in the training rows: 1 of 2 prompts, 1 questions of GSM; {then}"


def test_rows_that_were_not_left_out_stop_the_score(tmp_path):
    write_json(tmp_path / "c.json", FOUND)
    settings = {"contamination": "drop", "prompts": [], "benchmarks": {}}
    assert score.contaminated([str(tmp_path / "c.json")], settings, {"contaminated_rows": rows_told(["d:1"])})
    with pytest.raises(MoultError, match=r"encode has left out other rows than those of .*c.json \(0, not 1\)"):
        score.contaminated([str(tmp_path / "c.json")], settings, {"contaminated_rows": rows_told([])})
    assert score.contaminated([], settings, {}) is None
