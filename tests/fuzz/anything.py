"""What the fuzz tests are made of: odd values, odd text, odd rows."""

import json

from hypothesis import strategies as st

from moult.errors import MoultError


def one_error(error: MoultError) -> str:
    """The message of an error that a user can do something about."""
    assert error.what.strip() and error.fix.strip() and error.exit_code == 1
    assert "bug" not in error.fix
    return error.what


# Surrogates, NUL, controls, what looks like markup or a template, letters that change their length in another case.
ODD_TEXTS = st.sampled_from(
    [
        *(
            "",
            " ",
            "\0",
            "\ud800",
            "\ufeff",
            "\u2028",
            "\x1b[2J",
            "\r\n",
            "'",
            '"',
            "\\",
            "{",
            "}}",
            "{{ 7*7 }}",
            "{% raw %}",
        ),
        *(
            "<script>alert(1)</script>",
            "../../x",
            "/etc/passwd",
            "~",
            "*",
            "[",
            "a/b",
            "İ",
            "ß",
            "\U0001f3fd",
            "א",
            "null",
        ),
        *(
            "true",
            "1e-4",
            "1e999",
            "NaN",
            "9" * 30,
            "x" * 5000,
            "<|im_end|>",
            "<|im_start|>assistant\n",
            "user",
            "assistant",
        ),
    ]
)
TEXTS = st.one_of(ODD_TEXTS, st.text(max_size=12))
NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2**31, 2**63, 10**400, -(10**400), 0.0, -0.0, 1e308, 5e-324, 0.1]),
    st.integers(-5, 5),
    st.floats(allow_nan=False, allow_infinity=False),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)


def nested(depths=(200, 900, 960, 990)):
    """JSON values, also lists in lists, near the depth that Python still reads and past it."""
    shallow = st.recursive(
        SCALARS, lambda below: st.lists(below, max_size=4) | st.dictionaries(TEXTS, below, max_size=4), max_leaves=8
    )
    return st.one_of(shallow, shallow, shallow, st.sampled_from(depths).map(deep))


def deep(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def dumped(value) -> str:
    """JSON as others write it: numbers that overflow, escapes of half a character."""
    try:
        return json.dumps(value)
    except RecursionError:
        return "[" * 5000 + "]" * 5000


# --- rows of a dataset, nearly right or not at all ------------------------------------------------------------------------

SAID = st.one_of(
    st.sampled_from(["How many is two and two, please?", "It is four.", "天气很好", "42"]), TEXTS, nested()
)
NAMED = st.fixed_dictionaries({}, optional={"name": SAID, "arguments": SAID, "parameters": SAID, "id": SAID})
FUNCTIONS = st.lists(NAMED | st.fixed_dictionaries({"function": SAID | NAMED}), max_size=2) | SAID
TURN = st.one_of(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "assistant", "system", "tool", "gpt", "function_call", None, 5, [], {}])
            | nested(),
            "from": st.sampled_from(["human", "gpt", "observation"]),
            "content": SAID
            | st.lists(
                st.fixed_dictionaries(
                    {"type": SAID | st.sampled_from(["text", "reasoning", "tool_call"])},
                    optional={"text": SAID, "value": SAID},
                ),
                max_size=2,
            ),
            "value": SAID,
            "weight": st.sampled_from([0, 1, 0.5, True, "1"]) | nested(),
            "tool_calls": FUNCTIONS,
            "function_call": SAID | NAMED,
            "reasoning_content": SAID,
            "name": SAID,
            "tool_call_id": SAID,
        },
    ),
    nested(),
)
COLUMNS = (
    "prompt",
    "completion",
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    "history",
    "text",
    "system",
    "tools",
    "group",
    "system_prompt",
    "functions",
    "images",
)
ASKED, ANSWERED = {"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}
ODD_TURN = TURN.map(lambda turn: {**ANSWERED, **turn} if isinstance(turn, dict) else turn)
ANY_ROW = st.one_of(
    st.fixed_dictionaries({"messages": st.lists(ODD_TURN | TURN, max_size=2).map(lambda odd: [ASKED, *odd, ANSWERED])}),
    st.fixed_dictionaries({"messages": st.just([ASKED, ANSWERED]), "tools": FUNCTIONS}, optional={"group": SAID}),
    st.fixed_dictionaries(
        {"instruction": st.just("Where?"), "output": st.just("There."), "history": SAID | st.lists(SAID)}
    ),
    st.dictionaries(st.sampled_from(COLUMNS), SAID | st.lists(TURN, max_size=3), max_size=5),
    st.fixed_dictionaries(
        {"messages": st.lists(TURN, min_size=1, max_size=4) | SAID}, optional={"tools": FUNCTIONS, "group": SAID}
    ),
    st.fixed_dictionaries(
        {"prompt": SAID, "completion": SAID}, optional={"tools": FUNCTIONS, "group": SAID, "system": SAID}
    ),
    st.fixed_dictionaries({"instruction": SAID, "output": SAID}, optional={"history": SAID | nested(), "input": SAID}),
)
