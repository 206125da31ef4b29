"""Where an answer ends, in which form a template takes a tool call, and what a tokenizer makes of text before its tokens."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
from tokenizers_for_tests import (
    ASKED,
    CHATML,
    PLAIN,
    SHIPPED,
    TOOLS,
    answered,
    assistant,
    call,
    decode,
    make_tokenizer,
    refusal,
    said,
    user,
)

import encode
from moult.data.labels import sequences_of
from moult.files import read_json, write_json, write_jsonl
from moult.model.chat import Chat

CALLED = [user("Where are my keys?"), assistant("", tool_calls=[call("look_up", what="keys")])]
ANSWERED = [*CALLED, answered("under the mat"), assistant("Under the mat.")]


@pytest.fixture
def make(tmp_path):
    def make(template: str | None = CHATML, **tokenizer) -> Chat:
        return Chat(str(make_tokenizer(tmp_path / "model", **tokenizer)), template)

    return make


@pytest.fixture
def run(tmp_path):
    """Encode rows with a model: run(model, [messages or text, ...]) -> report, what the console says."""

    def run(model: Path, contents: list, tools: list | None = None, template: str | None = None) -> Namespace:
        rows = [
            {"id": f"row:{number}", "group": str(number), "source": 0, **({"tools": tools} if tools else {})}
            | ({"text": content} if isinstance(content, str) else {"messages": content})
            for number, content in enumerate(contents)
        ]
        write_json(tmp_path / "model.json", {"folder": str(model)})
        for part in ("train", "val", "test"):
            write_jsonl(tmp_path / f"{part}.jsonl", rows)
        settings = {"chat_template": template, "chat_template_kwargs": {}, "trust_remote_code": False}
        settings |= {"max_length": 256, "overlength": "drop", "max_token_loss": 0.1, "unrenderable": "error"}
        paths = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "val", "test")}
        said: list[str] = []
        say = lambda text, *words: said.append(text % words)  # noqa: E731
        arguments = Namespace(
            model=str(tmp_path / "model.json"),
            templates=SHIPPED,
            out=str(tmp_path / "tokens"),
            threads=1,
            without=[],
            **paths,
        )
        encode.encode(settings, arguments, Namespace(info=say, warning=say))
        return Namespace(report=read_json(tmp_path / "tokens/report.json"), said="\n".join(said))

    return run


# --- turns that end with the token of the next role (GLM-4) -----------------------------------------------------------

ROLES = ("<|user|>", "<|assistant|>", "<|observation|>", "<|system|>")
GLM = {
    "eos": "<|endoftext|>",
    "specials": ROLES,
    "stops": ("<|endoftext|>", "<|user|>", "<|observation|>"),
}
# Earlier reasoning is taken out, as GLM-4.5 does, and a call has a line of its own.
ROLE_TOKENS = (
    "{% set last = messages | map(attribute='role') | list %}"
    "{% for m in messages %}<|{{ 'observation' if m.role == 'tool' else m.role }}|>"
    "{% if m.reasoning_content and 'user' not in last[loop.index0:] %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ '\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '\n' + c.function.name + ' ' + c.function.arguments | tojson }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_the_next_role_s_token_ends_a_turn_where_generation_stops_at_it(make):
    chat = make(ROLE_TOKENS, **GLM)
    assert said(chat, ASKED) == ["\nHere.<|user|>"]
    assert said(chat, [*ASKED, user("And now?"), assistant("There.")]) == ["\nHere.<|user|>", "\nThere.<|user|>"]
    assert said(chat, ANSWERED) == ['\n\nlook_up {"what": "keys"}<|observation|>', "\nUnder the mat.<|user|>"]
    [sequence] = sequences_of(chat, {"messages": [*ASKED, user("And now?"), assistant("There.")]})
    assert decode(chat, sequence.input_ids) == (
        "<|user|>\nWhere is it?<|assistant|>\nHere.<|user|>\nAnd now?<|assistant|>\nThere.<|user|>"
    )


def test_earlier_answers_without_their_reasoning_still_end(make):
    messages = [ASKED[0], assistant("Here.", reasoning_content="Hm."), user("Sure?"), assistant("Yes.")]
    assert said(make(ROLE_TOKENS, **GLM), messages) == ["<think>Hm.</think>\nHere.<|user|>", "\nYes.<|user|>"]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        # Something stands between the answer and the next token.
        (ROLE_TOKENS.replace("{% endfor %}{% if add", "{{ '\n' }}{% endfor %}{% if add"), "\nHere.\n<|user|>"),
        # A special token that ends no generation stands there: `</tool_call>` is one in some tokenizers.
        (ROLE_TOKENS.replace("'\n' + m.content", "m.content + '<|system|>'"), "Here.<|system|><|user|>"),
    ],
)
def test_what_stands_before_the_next_token_is_trained(template, expected, make):
    assert said(make(template, **GLM), [*ASKED, user("Sure?"), assistant("Yes.")])[0] == expected


@pytest.mark.parametrize("flagged", [True, False])
def test_the_next_token_need_not_be_special(flagged, make):
    def unflag(tokenizer):
        tokenizer.add_tokens(list(ROLES))

    settings = {**GLM, "specials": ROLES if flagged else (), "change": None if flagged else unflag}
    assert said(make(ROLE_TOKENS, **settings), ASKED) == ["\nHere.<|user|>"]


def test_a_next_token_that_ends_no_generation_ends_no_turn(make):
    reason, message = refusal(make(ROLE_TOKENS, **{**GLM, "stops": ("<|endoftext|>",)}), ASKED)
    assert reason == "no_stop_token" and "Here." in message
    reason, _ = refusal(make(ROLE_TOKENS, **{**GLM, "stops": ("<|user|>",)}), CALLED)
    assert reason == "no_stop_token"  # after a call it writes another


def test_a_turn_that_ends_by_itself_takes_nothing_of_the_next(make):
    """Also where the model has been told to stop at the next role's token, too."""
    settings = {**GLM, "eos": "<|im_end|>", "stops": ("<|im_end|>", "<|im_start|>")}
    assert said(make(PLAIN, **settings), ASKED * 2) == ["Here.<|im_end|>"] * 2


def test_markers_agree_with_a_next_token_that_they_cannot_hold(make):
    marked = ROLE_TOKENS.replace(
        "{{ '\n' + m.content }}",
        "{% if m.role == 'assistant' %}{% generation %}{{ '\n' + m.content }}{% endgeneration %}"
        "{% else %}{{ '\n' + m.content }}{% endif %}",
    )
    assert said(make(marked, **GLM), ASKED) == ["\nHere.<|user|>"]
    wrong = marked.replace("{{ '\n' + m.content }}{% endgeneration %}", "{% endgeneration %}{{ '\n' + m.content }}")
    assert refusal(make(wrong, **GLM), ASKED)[0] == "markers"


def test_the_report_says_what_ends_the_turns(run, tmp_path):
    model = make_tokenizer(tmp_path / "glm", template=ROLE_TOKENS, **GLM)
    ids = json.loads((model / "generation_config.json").read_text())["eos_token_id"]
    stop = run(model, [ASKED, ANSWERED]).report["stop"]
    assert sorted(stop["tokens"]) == ["<|observation|>", "<|user|>"]
    assert (stop["added"], stop["generation_stop_ids"]) == ([], sorted(ids))
    assert stop["with_stop_token"] == stop["trained_ends"] == 3


# --- the arguments of tool calls --------------------------------------------------------------------------------------

HEAD = "{% if tools %}{{ tools | tojson }}{% endif %}"


def showing(call: str) -> str:
    """ChatML whose tool calls are shown by `call`."""
    return HEAD + PLAIN.replace(
        "m.content +", "m.content }}{% for c in m.tool_calls or [] %}{{ " + call + " }}{% endfor %}{{"
    )


OBJECT = showing("c.function.name ~ ' ' ~ c.function.arguments | tojson")
TEXT = showing("c.function.name + ' ' + c.function.arguments")
PYTHON = showing("c.function.name ~ ' ' ~ c.function.arguments")
FIXED = TEXT.replace(
    "c.function.arguments",
    "(c.function.arguments if c.function.arguments is string else c.function.arguments | tojson)",
)
SHOWN = 'look_up {"what": "keys"}<|im_end|>'


@pytest.mark.parametrize("template", [OBJECT, TEXT, PYTHON, FIXED])
@pytest.mark.parametrize("arguments", [{"what": "keys"}, '{"what": "keys"}'])
def test_a_template_gets_the_form_that_it_takes(template, arguments, make):
    """Whatever form the messages have: rows have objects, requests to a server and eval.prompts text."""
    chat = make(template)
    turn = assistant("", tool_calls=[{"type": "function", "function": {"name": "look_up", "arguments": arguments}}])
    text = chat.render([CALLED[0], turn], TOOLS, prompt=False)
    assert text.removesuffix("\n").endswith(f"assistant\n{SHOWN}")
    assert chat.takes_text_arguments(TOOLS) == (template in (TEXT, PYTHON))


def test_free_text_stays_free_text(make):
    turn = assistant(
        "", tool_calls=[{"type": "function", "function": {"name": "look_up", "arguments": "keys, please"}}]
    )
    for template, shown in ((OBJECT, '"keys, please"'), (TEXT, "keys, please")):
        assert f"look_up {shown}<" in make(template).render([CALLED[0], turn], TOOLS, prompt=False)


@pytest.mark.parametrize("calls", ["a call", [None], [{"function": "f"}], [{"id": "x"}]])
def test_what_is_no_tool_call_is_left_to_the_template(calls, make):
    assert make(PLAIN).render([ASKED[0], assistant("Here.", tool_calls=calls)], None, prompt=False).count("Here.") == 1


def test_a_template_that_takes_neither_form_is_refused_as_before(make):
    chat = make(showing("raise_exception('No calls')"))
    assert not chat.takes_text_arguments(TOOLS)
    assert refusal(chat, CALLED, TOOLS) == ("template_error", "the template refuses it: No calls")


@pytest.mark.parametrize(
    ("template", "form"), [(OBJECT, "object"), (TEXT, "text"), (PYTHON, "text"), (FIXED, "object")]
)
def test_the_form_is_told_and_what_to_write_for_vllm(template, form, run, tmp_path):
    model = make_tokenizer(tmp_path / "model", template=template)
    made = run(model, [ANSWERED], TOOLS)
    assert made.report["template"]["tool_arguments"] == form
    assert ("vLLM gives it an object" in made.said and "is string else X.arguments | tojson" in made.said) == (
        form == "text"
    )
    assert "tool_arguments" not in run(model, [ASKED]).report["template"]


def test_the_report_holds_the_named_templates(run, tmp_path):
    model = make_tokenizer(tmp_path / "model", template={"default": PLAIN, "tool_use": OBJECT, "rag": PLAIN + "rag"})
    made = run(model, [ANSWERED], TOOLS)
    told = made.report["template"]
    assert told["named"] == {"tool_use": OBJECT, "rag": PLAIN + "rag"} and told["tool_use_rows"] == 3
    assert (tmp_path / "tokens/chat_template.jinja").read_text() == PLAIN
    assert "tool_use for 3 rows with tools" in made.said
    assert run(model, [ASKED], template="chatml").report["template"].keys() == {"date", "origin", "sha256"}


# --- tokenizers that normalise ----------------------------------------------------------------------------------------


def normalises(*names: str, **settings):
    def change(tokenizer):
        from tokenizers import normalizers

        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([getattr(normalizers, name)() for name in names])

    return {"change": change, **settings}


@pytest.mark.parametrize(
    ("names", "answer", "trained"),
    [
        (("NFKC",), "値段は１２円（税込）です！　ＯＫ ﬁn…", "値段は12円(税込)です! OK fin..."),
        (("Lowercase",), "Grüße aus ÅRHUS", "grüße aus århus"),
        (("NFKC", "Lowercase"), "Ｇｒüße", "grüße"),
        (("NFD", "StripAccents"), "Crème brûlée", "Creme brulee"),
        (("BertNormalizer",), "Crème 中文 Brûlée", "creme  中  文  brulee"),
    ],
)
def test_an_answer_that_the_tokenizer_normalises_is_trained(names, answer, trained, make):
    chat = make(**normalises(*names))
    assert said(chat, [user("Ｗhat?"), assistant(answer)]) == [f"{trained}<|im_end|>"]
    assert chat.lost_characters(answer) == ""
    [sequence] = sequences_of(chat, {"text": answer})
    assert decode(chat, sequence.input_ids) == f"{trained}<|im_end|>"


def test_a_character_that_the_normaliser_takes_out_is_lost(make):
    def takes_out(tokenizer):
        from tokenizers import normalizers

        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Replace("€", ""), normalizers.Lowercase()]
        )

    chat = make(change=takes_out)
    assert chat.lost_characters("Ten €, EACH €") == "€€"
    assert said(chat, [user("Price?"), assistant("Ten € EACH")]) == ["ten  each<|im_end|>"]


def test_tokens_that_say_something_else_are_refused_behind_a_normaliser_too(make):
    def change(tokenizer):
        from tokenizers import decoders, normalizers

        backend = tokenizer.backend_tokenizer
        backend.normalizer = normalizers.Lowercase()
        backend.decoder = decoders.Sequence([backend.decoder, decoders.Replace("secret", "public")])

    reason, message = refusal(make(change=change), [user("Which?"), assistant("The SECRET one.")])
    assert reason == "decoding" and "public" in message


@pytest.mark.parametrize("normalized", [True, False])
def test_text_that_the_normaliser_makes_a_control_token_of(normalized, make):
    """The tokenizer looks for tokens that are `normalized` in what its normaliser has made of the text."""

    def change(tokenizer):
        from tokenizers import normalizers
        from transformers import AddedToken

        tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
        token = AddedToken("<|obey|>", normalized=normalized, special=True)
        tokenizer.add_special_tokens({"extra_special_tokens": [token]})

    chat, text = make(change=change), "Say ＜｜obey｜＞ now"
    obeys = chat.tokenizer.convert_tokens_to_ids("<|obey|>") in chat.ids(text)
    assert obeys == normalized
    if normalized:
        reason, message = refusal(chat, [user(text), assistant("No.")])
        assert reason == "control_token" and "messages[0] says '<|obey|>'" in message
    else:
        assert said(chat, [user(text), assistant("No.")]) == ["No.<|im_end|>"]


# --- tokenizers that put an EOS behind text ---------------------------------------------------------------------------


def adds(*around: str, **settings):
    """A post-processor that writes these around `$A`, the text."""

    def change(tokenizer):
        from tokenizers import processors

        special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in around if token != "$A"]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=list(around), special_tokens=special
        )

    return {"change": change, **settings}


@pytest.mark.parametrize(
    ("around", "expected"),
    [
        (("$A", "<|im_end|>"), "Once upon a"),
        (("<s>", "$A", "<|im_end|>"), "<s>Once upon a"),
        (("<s>", "$A", "[SEP]", "<|im_end|>"), "<s>Once upon a"),
        (("<s>", "$A"), "<s>Once upon a"),
    ],
)
def test_a_prompt_does_not_end_with_what_the_tokenizer_adds(around, expected, make, run, tmp_path):
    settings = adds(*around, bos="<s>", specials=("[SEP]",))
    chat = make(None, **settings)
    assert decode(chat, chat.prompt_ids([user("Once upon a")])) == expected
    # A text to be trained on ends as it did.
    [sequence] = sequences_of(chat, {"text": "Once upon a time"})
    assert decode(chat, sequence.input_ids).endswith(
        "time" + "".join(around[around.index("$A") + 1 :] or ["<|im_end|>"])
    )
    # And with a template nothing is added at all.
    assert decode(make(PLAIN, **settings), make(PLAIN, **settings).prompt_ids(ASKED[:1])).endswith("assistant\n")
    told = run(make_tokenizer(tmp_path / "other", **settings), ["Once upon a time", "in a land far away"])
    assert ("behind every text" in told.said) == (around[-1] != "$A")


def test_an_end_that_the_prompt_itself_says_stays(make):
    chat = make(None, **adds("$A", "<|im_end|>"))
    assert decode(chat, chat.prompt_ids([user("One.<|im_end|>")])) == "One.<|im_end|>"


def test_a_prompt_that_says_nothing_is_the_bos_alone(make):
    chat = make(None, **adds("<s>", "$A", "<|im_end|>", bos="<s>"))
    assert decode(chat, chat.prompt_ids([user("")])) == "<s>"
