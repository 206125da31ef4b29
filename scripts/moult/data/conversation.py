"""One shape for all rows: `{"messages": [...], "tools": [...]}` for a conversation, `{"text": "..."}` for plain text.

A message is `{"role", "content"}` with role system, user, assistant or tool, and where they apply `reasoning_content`,
`tool_calls` (`[{"id", "type": "function", "function": {"name", "arguments"}}]`, as OpenAI and transformers write them),
`tool_call_id`, `name`, and `"train": false` on an assistant turn that is context only.
"""

import json
from collections.abc import Callable

from moult.errors import some
from moult.files import canonical

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}

# Which columns make a format, in the order in which `format: auto` looks for them.
FORMATS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}


class BadRow(Exception):
    """A row that cannot be a training row. `reason` names the ledger's entry, the message says what is wrong."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def find_format(row: dict, columns: dict, wanted: str) -> str:
    """The format of a row under the mapping `columns`. Raises BadRow if there is none.

    A column that is mapped decides: its format and no other. And a row whose answer is null is no row of another format.
    """
    # A missing value and a missing column are the same to Parquet and CSV, which have each column in each row.
    present = {column for column, value in row.items() if value is not None}
    mapped_formats = {name: needed for name, needed in FORMATS.items() if any(column in columns for column in needed)}
    candidates = mapped_formats or FORMATS if wanted == "auto" else {wanted: FORMATS[wanted]}
    for name, needed in candidates.items():
        absent = [column for column in needed if columns.get(column, column) not in present]
        if not absent:
            return name
        if len(absent) < len(needed) and any(columns.get(column, column) in row for column in absent):
            candidates = {name: needed}
            break
    shapes = "; ".join(" + ".join(needed) for needed in candidates.values())
    mapped = [real for real in columns.values() if real is not None and real not in present]
    hint = f"; mapped columns that are not there: {some(mapped)}" if mapped else ""
    raise BadRow("missing_column", f"has the columns {some(sorted(present), 12)}, and needs {shapes}{hint}")


def normalise(row: dict, columns: dict, format_name: str) -> tuple[dict, int]:
    """The row in the one shape, and how many turns behind the last answer were cut: no label can come from them.

    Raises BadRow with what is wrong; its `reason` is "empty" where nothing is to be learnt.
    """

    def cell(column: str):
        return row.get(columns.get(column, column))

    if format_name == "text":
        text = _text(cell("text"), "text")
        if not text.strip():
            raise BadRow("empty", "the text is empty")
        return {"text": text}, 0
    messages = {
        "messages": lambda cell: _from_messages(cell("messages")),
        "sharegpt": lambda cell: _from_messages(cell("conversations")),
        "alpaca": _from_alpaca,
        "prompt_completion": _from_prompt_completion,
    }[format_name](cell)
    if cell("system") and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": _text(cell("system"), "system")})
    last = max((index for index, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    result = {"messages": _joined_calls(messages[: last + 1])}
    _check(result["messages"], roles=[message["role"] for message in messages])
    tools = _tools(cell("tools"))
    if tools:
        result["tools"] = tools
    return result, len(messages) - (last + 1)


def content_of(row: dict) -> str:
    """A normalised row as canonical JSON. Raises BadRow for what JSON cannot hold, deep inside tools and arguments."""
    try:
        content = canonical(row)
        content.encode()
    except UnicodeEncodeError:
        raise BadRow("not_unicode", "holds half of a surrogate pair, which is no character") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise BadRow("bad_json", f"tools or arguments hold what JSON cannot: {error}") from None
    return content


def _text(value, where: str) -> str:
    if not isinstance(value, str):
        raise BadRow("wrong_type", f"{where} is {_kind(value)}, and must be text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow("not_unicode", f"{where} holds half of a surrogate pair, which is no character") from None
    return value


def _kind(value) -> str:
    return "missing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def _json(value, where: str):
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise BadRow("bad_json", f"{where} is not JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise BadRow("bad_json", f"{where} is not JSON: {error}") from None


def _first(item: dict, *fields: str):
    """The first of the fields that is there; null is not there."""
    return next((item[field] for field in fields if item.get(field) is not None), None)


# --- formats ----------------------------------------------------------------------------------------------------------


def _from_messages(value) -> list[dict]:
    value = _json(value, "messages")
    if not isinstance(value, list):
        raise BadRow("wrong_type", f"messages is {_kind(value)}, and must be a list")
    return [_message(item, f"messages[{index}]") for index, item in enumerate(value)]


def _message(item, where: str) -> dict:
    if not isinstance(item, dict):
        raise BadRow("wrong_type", f"{where} is {_kind(item)}, and must be an object with role and content")
    raw_role = _first(item, "role", "from")
    role = ROLES.get(str(raw_role).lower()) if raw_role is not None else None
    if role is None:
        raise BadRow("unknown_role", f"{where} has the role {raw_role!r}; known: {some(ROLES, 20)}")
    content = _first(item, "content", "value")
    message: dict = {"role": role, "content": ""}
    if isinstance(content, list):
        _add_blocks(message, content, where)
    elif str(raw_role).lower() in ("function_call", "tool_call"):
        message["tool_calls"] = _tool_calls(content, where)
    elif content is not None:
        message["content"] = _text(content, f"{where}.content")
    elif not item.get("tool_calls"):
        raise BadRow("wrong_type", f"{where}.content is missing")
    for field in ("reasoning_content", "reasoning", "thinking"):
        if item.get(field):
            message["reasoning_content"] = _text(item[field], f"{where}.{field}")
            break
    if item.get("tool_calls"):
        message["tool_calls"] = _tool_calls(item["tool_calls"], where)
    for field in ("tool_call_id", "name"):
        if item.get(field):
            message[field] = _text(item[field], f"{where}.{field}")
    _add_weight(message, item, where)
    return message


def _add_blocks(message: dict, blocks: list, where: str) -> None:
    """Content as a list of typed blocks: OpenAI's `{type, text}`, LLaMA-Factory's `{type, value}`."""
    texts = []
    for block in blocks:
        kind = block.get("type") if isinstance(block, dict) else None
        value = _first(block, "text", "value", str(kind)) if kind else None
        if kind == "text":
            texts.append(_text(value, f"{where}.content"))
        elif kind in ("reasoning", "thinking"):
            message["reasoning_content"] = message.get("reasoning_content", "") + _text(value, f"{where}.content")
        elif kind in ("tool_call", "function_call"):
            message.setdefault("tool_calls", []).extend(_tool_calls(value, where))
        else:
            raise BadRow(
                "unknown_content",
                f"{where}.content holds a block of the type {kind!r}; known: text, reasoning, tool_call",
            )
    message["content"] = "".join(texts)


def _add_weight(message: dict, item: dict, where: str) -> None:
    """A turn's own loss weight: `weight` (OpenAI), `loss_weight` (LLaMA-Factory) or `train` (axolotl)."""
    for field in ("weight", "loss_weight", "train", "training"):
        if item.get(field) is None:
            continue
        weight = item[field]
        if weight not in (0, 1):
            raise BadRow("unknown_weight", f"{where}.{field} is {weight!r}; a turn is trained (1) or not (0)")
        if message["role"] == "assistant" and not weight:
            message["train"] = False
        elif message["role"] != "assistant" and weight:
            raise BadRow(
                "unknown_weight",
                f"{where}.{field} asks to train a {message['role']} turn; only assistant turns are trained",
            )


def _from_alpaca(cell: Callable) -> list[dict]:
    messages = []
    history = _json(cell("history") or [], "history") or []
    if not isinstance(history, list):
        raise BadRow("wrong_type", f"history is {_kind(history)}, and must be a list")
    for index, turn in enumerate(history):
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise BadRow("wrong_type", f"history[{index}] is {_kind(turn)}, and must be [user, assistant]")
        messages += [
            {"role": "user", "content": _text(turn[0], f"history[{index}]")},
            {"role": "assistant", "content": _text(turn[1], f"history[{index}]")},
        ]
    instruction = _text(cell("instruction"), "instruction")
    given = _text(cell("input"), "input") if cell("input") is not None else ""
    question = "\n".join(part for part in (instruction, given) if part.strip())
    answer = _text(cell("output"), "output")
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _from_prompt_completion(cell: Callable) -> list[dict]:
    """Text or, as TRL allows, lists of messages."""
    messages = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        value = cell(column)
        if isinstance(value, list):
            messages += [_message(item, f"{column}[{index}]") for index, item in enumerate(value)]
        else:
            messages.append({"role": role, "content": _text(value, column)})
    return messages


# --- tools ------------------------------------------------------------------------------------------------------------


def _tools(value) -> list[dict]:
    """Tool definitions in OpenAI's form, from a list or JSON of one, wrapped in `{"type": "function"}` or not."""
    value = _json(value or None, "tools")
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRow("wrong_type", f"tools is {_kind(value)}, and must be a list of objects")
    tools = [tool if tool.get("function") else {"type": "function", "function": tool} for tool in value]
    for index, tool in enumerate(tools):
        function = tool["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name", ""), str):
            raise BadRow(
                "wrong_type", f"tools[{index}].function is {_kind(function)}, and must be an object with a name"
            )
    return tools


def _tool_calls(value, where: str) -> list[dict]:
    """Calls in OpenAI's form, `arguments` as an object wherever it is one: templates differ in what they take as text."""
    value = _json(value, f"{where}.tool_calls")
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function") or call if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow("wrong_type", f"{where} holds a tool call without a name: {_kind(call)}")
        arguments = _first(function, "arguments", "parameters")
        if isinstance(arguments, str):
            try:
                parsed = json.loads(arguments)
                arguments = parsed if isinstance(parsed, dict) else arguments
            except (ValueError, RecursionError):
                pass  # free text is allowed
        arguments = {} if arguments is None else arguments
        entry = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        calls.append({"id": str(call["id"]), **entry} if call.get("id") else entry)
    return calls


def _joined_calls(messages: list[dict]) -> list[dict]:
    """Give each call an id, and the answers in the order of the calls. Nine letters or digits, as Mistral demands."""
    waiting: list[str] = []
    count = 0
    for message in messages:
        for call in message.get("tool_calls", []):
            count += 1
            call.setdefault("id", f"call{count:05d}")
            waiting.append(call["id"])
        if message["role"] == "tool":
            if waiting and "tool_call_id" not in message:
                message["tool_call_id"] = waiting[0]
            if message.get("tool_call_id") in waiting:
                waiting.remove(message["tool_call_id"])
    return messages


# --- checks -----------------------------------------------------------------------------------------------------------


def _check(messages: list[dict], roles: list[str]) -> None:
    """Refuse what teaches nothing. `messages` ends with the last assistant turn."""
    if not messages:
        raise BadRow("no_assistant_turn", f"has no assistant turn (roles: {some(roles, 8) or 'none'})")
    trained = [message for message in messages if message["role"] == "assistant" and message.get("train", True)]
    if not trained:
        raise BadRow("nothing_trained", "every assistant turn has weight 0")
    for message in trained:
        if not (
            message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content", "").strip()
        ):
            raise BadRow("empty", "an assistant turn is empty")
    if not any(message["role"] == "user" and message["content"].strip() for message in messages):
        raise BadRow("empty", "no user turn says anything")
