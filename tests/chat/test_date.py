"""A template that prints today's date: the same date each day in training, today's at a server."""

from datetime import date, datetime

import pytest
from tokenizers_for_tests import ASKED, DATED, PLAIN, UNLESS_SYSTEM, WITH_VARIABLE, system

from moult.model.chat import Chat, Unrenderable, date_variable, prints_date, shows_date

TWICE = WITH_VARIABLE + "{{ strftime_now('%Y-%m-%d') }}"


def plainly(chat: Chat, template: str) -> str:
    """As transformers renders it, for anybody who loads the folder."""
    return chat.tokenizer.apply_chat_template(
        ASKED[:1], chat_template=template, tokenize=False, add_generation_prompt=True
    )


def test_the_date_is_frozen_unless_it_is_today(make):
    """And what one Chat takes for today is nobody else's: transformers compiles a text once."""
    chat, other = make(DATED), make(DATED)
    other.date = datetime(2031, 5, 6, 7, 8)
    for _ in range(2):
        assert chat.render(ASKED, None, prompt=True).startswith("Today Date: 01 Jan 2026\n<|im_start|>user")
        assert other.render(ASKED, None, prompt=True).startswith("Today Date: 06 May 2031\n")
        assert plainly(chat, DATED).startswith(f"Today Date: {date.today():%d %b %Y}\n")
    with chat.on(None):
        assert chat.render(ASKED[:1], None, prompt=True) == plainly(chat, DATED)
    assert chat.render(ASKED, None, prompt=True).startswith("Today Date: 01 Jan 2026\n")


def test_the_date_is_put_back_where_a_template_raises(make):
    chat = make(DATED + "{{ raise_exception('no') if messages | length > 1 }}")
    with pytest.raises(Unrenderable):
        chat.render(ASKED, None, prompt=True)
    assert plainly(chat, chat.template).startswith(f"Today Date: {date.today():%d %b %Y}\n")


def test_a_time_of_day(make):
    chat = make("{{ strftime_now('%H:%M') }}" + PLAIN)
    with chat.on(datetime(2031, 5, 6, 7, 8)):
        assert chat.render(ASKED, None, prompt=True).startswith("07:08<")


@pytest.mark.parametrize(
    ("template", "kwargs", "shows", "variable"),
    [
        (PLAIN, {}, False, None),
        (DATED, {}, True, {}),
        (WITH_VARIABLE, {}, True, {"date_string": "01 Jan 2026"}),
        (WITH_VARIABLE, {"date_string": "a day"}, False, None),  # the config says it
        (UNLESS_SYSTEM, {}, True, {}),
        (TWICE, {}, True, {}),  # no single variable has both
    ],
)
def test_what_prints_the_date_and_which_variable_takes_its_place(template, kwargs, shows, variable, make):
    chat = make(template, kwargs)
    assert prints_date(template) == (template != PLAIN) and shows_date(chat, ASKED[:1]) == shows
    if shows:
        assert date_variable(chat, ASKED[:1]) == variable
        wanted = chat.prompt_ids(ASKED[:1])
        with chat.on(date(2031, 5, 6)):
            assert (chat.prompt_ids(ASKED[:1], variables=variable) == wanted) == bool(variable)


def test_not_every_conversation_has_the_date(make):
    assert not shows_date(make(UNLESS_SYSTEM), [system("Be kind."), *ASKED[:1]])
