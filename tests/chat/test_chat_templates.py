"""Chat templates: which one is taken, and every gate with the template that trips it."""

import hashlib
import signal
import threading
import time

import pytest
from tokenizers_for_tests import (
    ASKED,
    CHATML,
    DEMO,
    PLAIN,
    SHIPPED,
    TOOLS,
    answered,
    assistant,
    call,
    decode,
    make_tokenizer,
    poor,
    refusal,
    said,
    system,
    turns,
    user,
)

import encode
from moult.data.labels import sequences_of
from moult.errors import MoultError
from moult.model import chat as module
from moult.model.chat import choose_template
from moult.model.tokenizer import load_tokenizer
from moult.parallel import ordered_stream

# --- the template as a file -------------------------------------------------------------------------------------------


def test_template_is_the_models_own_or_the_named_one(tmp_path):
    own, origin = choose_template(str(DEMO), None, SHIPPED)
    assert (own, origin) == ((DEMO / "chat_template.jinja").read_text(), "the model's own")
    assert choose_template(str(DEMO), "chatml", SHIPPED) == (CHATML, "shipped: chatml")
    (tmp_path / "mine.jinja").write_text(PLAIN)
    assert choose_template(str(DEMO), str(tmp_path / "mine.jinja"), SHIPPED) == (PLAIN, "file: mine.jinja")


def test_no_template_is_none_and_no_guess(tmp_path):
    assert choose_template(str(make_tokenizer(tmp_path / "base")), None, SHIPPED)[0] is None


def test_missing_template_names_the_shipped_ones():
    with pytest.raises(MoultError, match=r"no/such\.jinja: no such file") as error:
        choose_template(str(DEMO), "no/such.jinja", SHIPPED)
    assert "chatml" in error.value.fix


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("{% for m in messages %}\n{{ m.content }}\n{% endif %}", 3),
        ("\n{{ messages | no_such_filter }}", 2),
        ("{% break %}", 11),
    ],
)
def test_syntax_error_says_the_line(text, line, tmp_path):
    (tmp_path / "bad.jinja").write_text(text)
    with pytest.raises(MoultError, match=rf"chat template \(file: bad\.jinja\), line {line}: "):
        choose_template(str(DEMO), str(tmp_path / "bad.jinja"), SHIPPED)


def test_folder_without_tokenizer(tmp_path):
    with pytest.raises(MoultError, match=r"no tokenizer\.json, and nothing to make one of"):
        load_tokenizer(str(tmp_path))


# --- what the template does -------------------------------------------------------------------------------------------


def test_template_that_raises(make):
    chat = make("{% if messages[0].role == 'system' %}{{ raise_exception('No system, please') }}{% endif %}" + PLAIN)
    assert said(chat, ASKED) == ["Here.<|im_end|>"]
    assert refusal(chat, [system("Be kind."), *ASKED]) == (
        "template_error",
        "the template refuses it: No system, please",
    )


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("template", [LOOP + PLAIN, "{% generation %}{% endgeneration %}" + LOOP + PLAIN])
def test_template_that_loops(template, make, monkeypatch):
    monkeypatch.setattr("moult.model.chat.TEMPLATE_SECONDS", 0.2)
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(MoultError, match="the chat template has not come to an end"):
        sequences_of(make(template), {"messages": ASKED})
    assert signal.getsignal(signal.SIGVTALRM) == before and signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_template_that_loops_in_a_worker_process(tmp_path, monkeypatch):
    monkeypatch.setattr("moult.model.chat.TEMPLATE_SECONDS", 0.2)
    folder = str(make_tokenizer(tmp_path / "model"))
    rows = [[{"id": str(n), "group": "", "source": 0, "messages": ASKED}] for n in range(4)]
    with pytest.raises(MoultError, match="the chat template has not come to an end"):
        list(ordered_stream(encode.encode_batch, rows, 2, "rows", encode.set_chat, (folder, LOOP + PLAIN)))


def test_the_time_of_other_threads_does_not_count(monkeypatch):
    """A server generates meanwhile."""
    monkeypatch.setattr(module, "TEMPLATE_SECONDS", 0.2)
    data, done = bytes(2**24), threading.Event()

    def work() -> None:
        while not done.is_set():
            hashlib.sha256(data)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        began = time.process_time()
        with module._time_limit():
            while time.process_time() - began < 1:
                time.sleep(0.01)
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 10.0 ** 999 }}", "out of range"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ messages.clear() }}", "unsafe"),
    ],
)
def test_template_that_the_sandbox_stops(template, message, make):
    reason, said = refusal(make(template + PLAIN), ASKED)
    assert reason == "template_error" and message in said


def test_template_that_meets_something_undefined(make):
    reason, message = refusal(make("{{ bos_token + 'x' }}" + PLAIN), ASKED)  # this tokenizer has no BOS
    assert reason == "template_error" and "bos_token" in message


def test_turn_without_stop_token(make):
    reason, message = refusal(make(PLAIN.replace("m.content + '<|im_end|>\n'", "m.content + '\n'")), ASKED)
    assert reason == "no_stop_token" and "Here." in message


def test_double_bos(make):
    chat = make("{{ bos_token }}{{ bos_token }}" + PLAIN, bos="<s>")
    reason, message = refusal(chat, ASKED)
    assert reason == "double_bos" and "'<s>' twice" in message


def test_double_bos_that_is_also_the_eos(make):
    chat = make("{{ bos_token }}{{ bos_token }}" + PLAIN, bos="<|endoftext|>", eos="<|endoftext|>")
    assert refusal(chat, ASKED)[0] == "double_bos"


def test_bos_once(make):
    chat = make(bos="<s>")
    [sequence] = sequences_of(chat, {"messages": ASKED * 2})
    assert sequence.input_ids.count(chat.tokenizer.bos_token_id) == 1
    assert sequence.input_ids[0] == chat.tokenizer.bos_token_id


def test_chatml_does_not_open_twice_where_its_opening_is_the_bos(make):
    chat = make(bos="<|im_start|>")
    [sequence] = sequences_of(chat, {"messages": ASKED})
    assert decode(chat, sequence.input_ids) == (
        "<|im_start|>user\nWhere is it?<|im_end|>\n<|im_start|>assistant\nHere.<|im_end|>"
    )


@pytest.mark.parametrize(
    ("what", "old", "new", "messages", "tools"),
    [
        ("what the system turn says", "for m in messages", "for m in messages if m.role != 'system'", None, None),
        ("what the tool turn says", "for m in messages", "for m in messages if m.role != 'tool'", None, None),
        ("what the user turn says", "m.content", "m.content[:8]", ASKED, None),
        ("the assistant's content", "m.content", "(m.content if m.role != 'assistant' else '')", ASKED, None),
        ("the assistant's reasoning_content", "", "", [ASKED[0], assistant("Here.", reasoning_content="Hm")], None),
        ("the tools", "", "", ASKED, TOOLS),
        ("the tools", "", "", [user("Please look_up where it is"), ASKED[1]], TOOLS),  # the name is there by chance
        ("the tool look_up", "{% for", "{{ 'some tools' if tools }}{% for", ASKED, TOOLS),
        ("the call of look_up", "", "", [ASKED[0], assistant("Wait.", tool_calls=[call("look_up")])], None),
        (
            "the call of look_up",
            "m.content",
            "m.content + (m.tool_calls[0].function.name if m.tool_calls else '')",
            [ASKED[0], assistant("", tool_calls=[call("look_up", what="keys")])],
            None,
        ),
    ],
)
def test_template_that_drops(what, old, new, messages, tools, make):
    whole = [
        system("You are a very patient guide."),
        user("Where are my keys?"),
        assistant("A moment."),
        answered("x17"),
    ]
    chat = make(PLAIN.replace(old, new, 1))
    reason, message = refusal(chat, messages or [*whole, assistant("Under the mat.")], tools)
    assert (reason, message) == ("template_drops", f"the template leaves out {what}")


def test_what_is_shown_as_json_is_not_left_out(make):
    chat = make(PLAIN.replace("m.content", "(m.content if m.role == 'assistant' else m.content | trim | tojson)"))
    assert said(chat, [user('Say "hi"\n\tö '), assistant("Hi.")]) == ["Hi.<|im_end|>"]


def test_prompt_that_is_not_what_the_answer_follows(make):
    reason, message = refusal(make(PLAIN.replace("assistant\n' }}{% endif", "assistant\n[draft]' }}{% endif")), ASKED)
    assert reason == "prompt_mismatch"
    assert "[draft]" in message and "Here." in message


def test_prompt_that_differs_in_whitespace_stays_as_it_is_asked(make):
    chat = make(PLAIN.replace("assistant\n' }}{% endif", "assistant \n\n' }}{% endif"))
    messages = [*ASKED, user("And now?"), assistant("There.")]
    sequences = sequences_of(chat, {"messages": messages})
    assert list(turns(chat, messages, None, sequences).values()) == ["Here.<|im_end|>", "There.<|im_end|>"]
    assert len(sequences) == 2  # the first answer is shown otherwise than it is asked for
    assert decode(chat, sequences[0].input_ids).endswith("assistant \n\nHere.<|im_end|>")


def test_thought_that_the_prompt_begins(make):
    """Qwen3.5 and others ask with `<think>`; reasoning in the content begins with it, too."""
    chat = make(PLAIN.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif"))
    messages = [ASKED[0], assistant("<think>\nHm.\n</think>\nHere.")]
    assert said(chat, messages) == ["Hm.\n</think>\nHere.<|im_end|>"]
    assert refusal(chat, ASKED)[0] == "prompt_mismatch"


def test_conversation_that_the_assistant_opens(make):
    greeting = assistant("Hello, how can I help?")
    reason, message = refusal(make(), [greeting, *ASKED])
    assert reason == "no_prompt" and "weight 0" in message
    assert said(make(), [{**greeting, "train": False}, *ASKED]) == ["Here.<|im_end|>"]


# --- {% generation %} -------------------------------------------------------------------------------------------------

HEAD, TURN, END = "{{ '<|im_start|>' + m.role + '\n' }}", "{{ m.content }}", "{{ '<|im_end|>' }}"
OPEN, CLOSE = "{% generation %}", "{% endgeneration %}"


def marked(answer: str, other: str = HEAD + TURN + END) -> str:
    return (
        f"{{% for m in messages %}}{{% if m.role == 'assistant' %}}{answer}{{% else %}}{other}{{% endif %}}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


@pytest.mark.parametrize(
    "answer",
    [
        HEAD + OPEN + TURN + END + CLOSE,
        HEAD + OPEN + TURN + END + "{{ '\n' }}" + CLOSE,
        HEAD + OPEN + TURN + CLOSE + OPEN + END + CLOSE,
        OPEN + HEAD + TURN + END + CLOSE,  # as SmolLM3: it is the prompt that says what is trained
    ],
)
def test_markers_that_agree(answer, make):
    messages = [*ASKED, user("And now?"), assistant("\n There.\n")]
    assert said(make(marked(answer)), messages) == ["Here.<|im_end|>", "\n There.\n<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (marked(HEAD + OPEN + TURN + CLOSE + END), "leaves out '<|im_end|>"),
        (marked(HEAD + TURN + OPEN + END + CLOSE), "leaves out 'Here.<|im_end|>"),
        (marked(HEAD + OPEN + CLOSE + TURN + END), "leaves out 'Here.<|im_end|>"),
        (marked(HEAD + OPEN + TURN + END + CLOSE, HEAD + OPEN + TURN + CLOSE + END), "holds 'Where is it?"),
        (OPEN + marked(HEAD + TURN + END) + CLOSE, "holds '<|im_start|>user"),
    ],
)
def test_markers_that_do_not(template, message, make):
    reason, text = refusal(make(template), ASKED)
    assert reason == "markers" and message in text


def test_markers_around_what_the_tokenizer_lacks(make):
    """transformers takes a block that begins with a character without a token for the end of the text."""
    chat = make(eos="<end>", change=poor)
    assert said(chat, [user("how many"), assistant("=five=")]) == ["five<end>"]
