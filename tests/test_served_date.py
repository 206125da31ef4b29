"""A template that prints today's date: trained and measured with a frozen one, served as its authors meant it."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
import requests
from serving import CHECKS, Log, demo_smoke_test, result_of, settings_for
from tokenizers_for_tests import DATED, UNLESS_SYSTEM, WITH_VARIABLE, make_tokenizer, system, user
from workflow import checkout, snakemake

from moult.model.chat import Chat, date_variable
from moult.serving.checks import CannotTell, Failed, ServerTest
from moult.serving.client import Client, Question, Reply
from moult.serving.launch import Served, Server, address, free_port, transformers_command

MESSAGES = [user("What is the capital of Japan?")]
# By the clock of this time zone it is tomorrow.
LATER = {"TZ": "LATER-24"}


# --- one question, and a server with a clock of its own ---


@pytest.fixture
def tested(tmp_path):
    """tested(template, how far its clock is ahead): a test of a server that renders with it, and a reply of it."""

    def start(template: str, ahead: timedelta, messages: list[dict] = MESSAGES) -> ServerTest:
        chat, servers = (Chat(str(make_tokenizer(tmp_path / "model")), template) for _ in range(2))
        servers.date = datetime.now() + ahead
        dated = template != UNLESS_SYSTEM or messages[0]["role"] != "system"
        variables = date_variable(chat, messages) if dated else {}
        ids = chat.prompt_ids(messages)
        question = Question(
            "prompt",
            "one",
            ids,
            1.0,
            "Tokyo.",
            [5, 2],
            [9.0, 9.0],
            True,
            messages,
            {"exact": "Tokyo."},
            dated,
            variables,
        )
        test = ServerTest(Client("http://there", None, "m"), [question], 0.01, 0.001, chat)
        test.client.tokens_of = lambda question, variables: servers.prompt_ids(question.messages, variables=variables)
        count = len(servers.prompt_ids(messages, variables=variables))
        test.replies = [Reply("Kyoto.", [6, 2], "length", count, 2, datetime.now(), 0.1)]
        return test

    return start


@pytest.mark.parametrize("template", [DATED, WITH_VARIABLE])
@pytest.mark.parametrize("hours", [0, -14, 14, 24])
def test_a_server_s_own_date_is_no_difference(template, hours, tested):
    """Also where a midnight or a time zone is in between."""
    assert tested(template, timedelta(hours=hours)).check_prompt_tokens() == "1 the same, 1 with the server's date"


@pytest.mark.parametrize("template", [DATED, WITH_VARIABLE])
def test_another_date_is_a_difference(template, tested):
    with pytest.raises(Failed, match="one: the server makes"):
        tested(template, timedelta(days=40)).check_prompt_tokens()


def test_another_number_of_tokens_is_a_difference(tested):
    test = tested(DATED, timedelta())
    test.client.tokens_of = lambda *_: None
    assert test.check_prompt_tokens() == "1 the same, 1 by their number only, 1 with the server's date"
    test.replies[0] = Reply("Kyoto.", [6, 2], "length", test.replies[0].prompt_tokens + 1, 2, datetime.now(), 0.1)
    with pytest.raises(Failed, match="the server counts"):
        test.check_prompt_tokens()


def test_answers_to_another_prompt_are_not_compared(tested):
    test = tested(DATED, timedelta())
    for compare in (
        partial(test.held_against, test.questions, test.replies),
        test.check_expectations,
        test.check_stop_reasons,
    ):
        with pytest.raises(CannotTell, match="prints today's date, has no variable for it, and printed 2026-01-01"):
            compare()


@pytest.mark.parametrize(
    ("template", "messages"), [(WITH_VARIABLE, MESSAGES), (UNLESS_SYSTEM, [system("Be kind."), *MESSAGES])]
)
def test_answers_to_the_measured_prompt_are(template, messages, tested):
    test = tested(template, timedelta(), messages)
    for compare, words in (
        (partial(test.held_against, test.questions, test.replies), "1 of 1 differ"),
        (test.check_expectations, "exact held at evaluate"),
        (test.check_stop_reasons, "ends with 'length'"),
    ):
        with pytest.raises(Failed, match=words):
            compare()


def test_what_can_be_compared_is(tested):
    with_date, without = (
        tested(UNLESS_SYSTEM, timedelta()),
        tested(UNLESS_SYSTEM, timedelta(), [system("Be kind."), *MESSAGES]),
    )
    good = Reply("Tokyo.", [5, 2], "stop", 9, 2, datetime.now(), 0.1)
    said = with_date.held_against([*with_date.questions, *without.questions], [*with_date.replies, good])
    assert said.startswith("1 of 1 the same; 1 cannot be compared: the template prints today's date")


# --- a run, its server, and the folder that is published ---


@pytest.fixture(scope="module", params=["without a variable", "with a variable"])
def dated_run(request, tmp_path_factory):
    """(a folder in which a run with such a template has been made and tested, what its smoke test has found)."""
    folder = checkout(tmp_path_factory.mktemp("dated"))
    template = {"without a variable": DATED, "with a variable": WITH_VARIABLE}[request.param]
    (folder / "dated.jinja").write_text(template)
    # What config/demo sets, with few steps: what the model has learnt does not matter.
    (folder / "mine.yaml").write_text(
        "runs: {demo: {model: {chat_template: dated.jinja}, eval: {answer_rows: 2}, "
        "train: {max_steps: 4, warmup_steps: 0, learning_rate: 1.0e-4}}}"
    )
    snakemake(folder, "results/demo/smoke_test.json", "--configfile", "mine.yaml")
    unknown = (
        {"answers", "expectations", "stop_reasons", "concurrency"} if request.param.startswith("without") else set()
    )
    return folder, {name: None if name in unknown else True for name in CHECKS}


@pytest.mark.slow
def test_the_smoke_test_passes_today_and_later(dated_run, monkeypatch):
    folder, expected = dated_run
    result = result_of(folder / "results/demo", 0)
    assert {name: check["passed"] for name, check in result["checks"].items()} == expected
    assert result["date"] == {
        "measured": "2026-01-01",
        "prompts": len(result["answers"]),
        "variables": {"date_string": "01 Jan 2026"} if all(expected.values()) else {},
    }
    for name, value in LATER.items():
        monkeypatch.setenv(name, value)
    code, checks, said = demo_smoke_test(folder, "--configfile", "mine.yaml")
    assert (code, checks) == (0, expected), said


@pytest.mark.slow
def test_the_tokens_and_the_card_say_which_date_was_measured(dated_run):
    folder, _ = dated_run
    report = json.loads((folder / "results/demo/tokens/report.json").read_text())
    assert report["template"]["date"] == "2026-01-01"
    snakemake(folder, "results/demo/cards/merged.md", "--configfile", "mine.yaml")
    for kind in ("adapter", "merged"):
        card = (folder / "results/demo" / kind / "README.md").read_text()
        assert (
            "The chat template can print today's date. It was trained and measured with 2026-01-01 in its place."
            in card
        )


# What anybody does who has the published folder: the text and its tokens.
PLAINLY = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("results/demo/merged")
text = tokenizer.apply_chat_template(json.loads(sys.argv[1]), add_generation_prompt=True, tokenize=False)
print(json.dumps([text, tokenizer(text, add_special_tokens=False)["input_ids"]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("clock", [{}, LATER], ids=["today", "later"])
def test_the_server_renders_what_plain_transformers_renders_of_the_published_folder(clock, dated_run, monkeypatch):
    folder, _ = dated_run
    monkeypatch.chdir(folder)
    template = Path("results/demo/merged/chat_template.jinja").read_bytes()
    assert template == Path("dated.jinja").read_bytes()
    for name, value in clock.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-c", PLAINLY, json.dumps(MESSAGES)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    text, ids = json.loads(done.stdout)
    today = datetime.now(UTC) + timedelta(hours=24) if clock else datetime.now()
    assert text.startswith(f"Today Date: {today:%d %b %Y}\n")
    url = address("127.0.0.1", port := free_port())
    command = transformers_command(settings_for(), Served("demo", "results/demo/merged"), "127.0.0.1", port)
    with Server(command, url, Log(), threads=1) as server:
        server.wait_ready(60)
        served = requests.post(f"{url}/tokenize", json={"messages": MESSAGES}, timeout=60).json()
    assert served["tokens"] == ids


@pytest.mark.slow
def test_another_template_is_still_caught(dated_run, tmp_path):
    folder, _ = dated_run
    path = folder / "results/demo/merged/chat_template.jinja"
    text = path.read_text()
    path.write_text(text.replace("Today Date", "The date"))
    try:
        code, checks, said = demo_smoke_test(folder, "--configfile", "mine.yaml")
    finally:
        path.write_text(text)
    assert code == 1 and checks["prompt_tokens"] is False and checks["files"] is False, said
