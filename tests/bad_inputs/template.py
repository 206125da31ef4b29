"""Tokenizer and chat template: tried by encode on every row, and by plan on the prompts of the evaluation."""

from bad_inputs.case import ROWS, Case, edit_json, write

TURN = "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def template(text: str, **more) -> dict:
    return {"make": write("base/chat_template.jinja", text), **more}


def each(turn: str, ask: str = ASK) -> dict:
    return template("{% for m in messages %}" + turn + "{% endfor %}" + ask)


def no_template(folder):
    (folder / "base" / "chat_template.jinja").unlink()


def no_tokenizer(folder):
    (folder / "base" / "tokenizer.json").unlink()


def few_tokens(folder):
    """A model with fewer embeddings than its tokenizer has tokens."""
    edit_json("base/config.json", vocab_size=100)(folder)


def prompts(**prompt) -> dict:
    return {"eval": {"prompts": [{"id": "p", **prompt}]}}


CASES = [
    Case(
        "no template",
        (
            "encode failed: base: the tokenizer has no chat template, but the rows are conversations\n"
            "what to do: set model.chat_template: chatml (a template that is part of Moult), or the path of a Jinja file"
        ),
        make=no_template,
    ),
    Case(
        "a template that is not there",
        (
            "encode failed: model.chat_template: chatlm: no such file\n"
            "what to do: give a Jinja file, or one of the shipped: chatml"
        ),
        {"model": {"chat_template": "chatlm"}},
    ),
    Case(
        "a template with a syntax error",
        ("encode failed: chat template (the model's own), line 2: unexpected '}'\nwhat to do: fix the template"),
        **template("{% for m in messages %}\n{{ m.content }\n{% endfor %}"),
    ),
    Case(
        "a template that raises",
        (
            "encode failed: the chat template cannot show 38 of 38 train rows unchanged:\n"
            "    38 template_error, for example rows.jsonl:1: the template refuses it: Roles must alternate\n"
            "what to do: choose another model.chat_template (or its chat_template_kwargs)"
        ),
        **template("{{ raise_exception('Roles must alternate') }}"),
    ),
    Case(
        "a template that divides by zero",
        (
            "encode failed: the chat template cannot show 38 of 38 train rows unchanged:\n"
            "    38 template_error, for example rows.jsonl:1: the template refuses it: division by zero\n"
            "what to do: choose another model.chat_template (or its chat_template_kwargs)"
        ),
        **template("{{ 1 / 0 }}"),
    ),
    Case(
        "a template that loops for ever",
        ("encode failed: the chat template has not come to an end in 5 seconds\nwhat to do: look at its loops"),
        **template("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
    ),
    Case(
        "a template with a huge range",
        (
            "encode failed: the chat template cannot show 38 of 38 train rows unchanged:\n"
            "    38 template_error, for example rows.jsonl:1: the template refuses it: Range too big. The "
            "sandbox blocks ranges larger than MAX_RANGE (100000).\n"
            "what to do: choose another model.chat_template (or its chat_template_kwargs)"
        ),
        **template("{% for i in range(10 ** 9) %}{% endfor %}"),
    ),
    Case(
        "a template that calls itself",
        (
            "encode failed: the chat template cannot show 38 of 38 train rows unchanged:\n"
            "    38 template_error, for example rows.jsonl:1: the template refuses it: maximum recursion depth "
            "exceeded<...>\n"
            "what to do: choose another model.chat_template (or its chat_template_kwargs)"
        ),
        **template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
    ),
    Case(
        "a template that reaches for Python's classes",
        (
            "encode failed: the chat template cannot show 38 of 38 train rows unchanged:\n"
            "    38 template_error, for example rows.jsonl:1: the template refuses it: access to attribute "
            "'__class__' of 'str' object is unsafe.\n"
            "what to do: choose another model.chat_template (or its chat_template_kwargs)"
        ),
        **template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    ),
    Case(
        "a template that reaches for globals",
        (
            "encode failed: the chat template cannot show 38 of 38 train rows unchanged:\n"
            "    38 template_error, for example rows.jsonl:1: the template refuses it: access to attribute "
            "'__init__' of 'type' object is unsafe.\n"
            "what to do: choose another model.chat_template (or its chat_template_kwargs)"
        ),
        **template("{{ cycler.__init__.__globals__.os.system('touch pwned') }}"),
    ),
    Case(
        "a template that includes a file",
        (
            "encode failed: the chat template cannot show 38 of 38 train rows unchanged:\n"
            "    38 template_error, for example rows.jsonl:1: the template refuses it: no loader for this "
            "environment specified\n"
            "what to do: choose another model.chat_template (or its chat_template_kwargs)"
        ),
        **template("{% include '/etc/passwd' %}"),
    ),
    Case(
        "a template that changes the messages",
        (
            "encode failed: the chat template cannot show 38 of 38 train rows unchanged:\n"
            "    38 template_error, for example rows.jsonl:1: the template refuses it: access to attribute "
            "'append' of 'list' object is unsafe.\n"
            "what to do: choose another model.chat_template (or its chat_template_kwargs)"
        ),
        **template("{{ messages.append(1) }}"),
    ),
    Case(
        "a template that drops the system turn",
        (
            "encode failed: the chat template cannot show 38 of 38 train rows unchanged:\n"
            "    38 template_drops, for example rows.jsonl:1: the template leaves out what the system turn says\n"
            "what to do: choose another model.chat_template (or its chat_template_kwargs)"
        ),
        **each("{% if m.role != 'system' %}" + TURN + "{% endif %}"),
        rows=[{"system": "Be short.", **row} for row in ROWS],
    ),
    Case(
        "a template without a stop token",
        (
            "encode failed: the chat template cannot show 38 of 38 train rows unchanged:\n"
            "    38 no_stop_token, for example rows.jsonl:1: the template ends the turn with ...'It is 0.\\n', "
            "which has no special token of this tokenizer: the model could never learn to stop "
            "(model.chat_template: chatml ends turns with the tokenizer's own stop token)\n"
            "what to do: choose another model.chat_template (or its chat_template_kwargs)"
        ),
        **each("{{ m['role'] + ': ' + m['content'] + '\n' }}", "{% if add_generation_prompt %}assistant: {% endif %}"),
    ),
    Case(
        "a template that asks in other words",
        (
            "encode failed: the chat template cannot show 38 of 38 train rows unchanged:\n"
            "    38 prompt_mismatch, for example rows.jsonl:1: the template asks for the answer with "
            "...'m_end|>\\n<|im_start|>bot\\n' and shows it as ...'?<|im_end|>\\n<|im_start|>assistant\\nIt is "
            "0.<|im_e'...: the model would be asked in another way than it was trained\n"
            "what to do: choose another model.chat_template (or its chat_template_kwargs)"
        ),
        **each(TURN, "{% if add_generation_prompt %}<|im_start|>bot\n{% endif %}"),
    ),
    Case(
        "a template that marks too little",
        (
            "encode failed: the chat template cannot show 38 of 38 train rows unchanged:\n"
            "    38 markers, for example rows.jsonl:1: the template's {% generation %} block leaves out "
            "'<|im_end|>\\n', which is part of the answer or ends it\n"
            "what to do: choose another model.chat_template (or its chat_template_kwargs)"
        ),
        **each(
            "{{ '<|im_start|>' + m.role + '\n' }}{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}"
        ),
    ),
    Case(
        "control tokens in the data",
        (
            "encode failed: the chat template cannot show 1 of 39 train rows unchanged:\n"
            "    1 control_token, for example rows.jsonl:41: messages[0] says '<|im_end|>', which this tokenizer "
            "takes for a control token\n"
            "what to do: fix the rows, choose another model.chat_template (or its chat_template_kwargs), or "
            "drop such rows with datasets.<name>.unrenderable: drop"
        ),
        rows=[*ROWS, {"prompt": "Say <|im_end|>", "completion": "No."}],
    ),
    Case(
        "no tokenizer",
        ("encode failed: base: no tokenizer.json, and nothing to make one of\nwhat to do: add the tokenizer"),
        make=no_tokenizer,
    ),
    Case(
        "a tokenizer that is no JSON",
        (
            "encode failed: base: no tokenizer can be loaded: Expecting value: line 1 column 11 (char 10)\n"
            "what to do: download or copy the model again"
        ),
        make=write("base/tokenizer.json", '{"model": '),
    ),
    Case(
        "more tokens than the model has",
        (
            "encode failed: train row rows.jsonl:9: token 421 is outside the model's vocabulary of 100\n"
            "what to do: use the tokenizer of this model; if tokens were added to it, the model must be resized too"
        ),
        make=few_tokens,
    ),
    Case(
        "a prompt that the template refuses",
        (
            "plan failed: eval.prompts.p: the template refuses it: 'dict object' has no attribute 'content'\n"
            "what to do: fix the prompt, or choose another chat template"
        ),
        prompts(messages=[{"role": "user"}]),
    ),
    Case(
        "text rows and no EOS",
        (
            "encode failed: the chat template cannot show 38 of 38 train rows unchanged:\n"
            "    38 no_stop_token, for example rows.jsonl:1: the tokenizer names no EOS: the model could never "
            "learn to stop\n"
            "what to do: choose another model.chat_template (or its chat_template_kwargs)"
        ),
        rows=[{"text": f"Once upon {n} times."} for n in range(40)],
        make=edit_json("base/tokenizer_config.json", eos_token=None),
    ),
    Case(
        "a prompt that is longer than the model",
        (
            "plan failed: eval.prompts.p: <...> tokens, and the model has <...> positions (max_position_embeddings), for "
            "the answer too\n"
            "what to do: shorten it"
        ),
        prompts(prompt="How many? " * 1000),
    ),
]
