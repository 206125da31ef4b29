"""One shape for all rows: `{"messages": [...], "tools": [...]}` for a conversation, `{"text": "..."}` for plain text.

A message is `{"role", "content"}` with role system, user, assistant or tool, and where they apply `reasoning_content`,
`tool_calls` (`[{"id", "type": "function", "function": {"name", "arguments"}}]`, as OpenAI and transformers write them),
`tool_call_id`, `name`, and `"train": false` on an assistant turn that is context only.
"""

import json
import re
from collections.abc import Callable

from moult.data.fields import BadRow, Fields, LeftOut, is_nothing, kind, objects, parsed, plain, text, value_of
from moult.data.tables import JsonText
from moult.errors import some

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
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

_PLAIN_ROLES = ROLES.keys() - {"function_call", "tool_call"}

# Which columns make a format, in the order in which `format: auto` looks for them.
FORMATS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}


# Columns, or keys of a message, of what is not text; and what stands for it in the text: <image>, <|image_1|>, <img>.
_MEDIA = {"image", "images", "video", "videos", "audio", "audios"}
_PLACEHOLDER = re.compile(r"<\|?(?:image|img|video|audio)[^<>\s]{0,24}>", re.IGNORECASE)

# A list of messages as Python prints it, which pandas writes into a CSV.
_PRINTED_MESSAGES = re.compile(r"\s*\[\s*\{\s*'(?:role|from|content|value)'\s*:.*\}\s*\]\s*", re.DOTALL)

_TREE_ADVICE = "make conversations of it first: python scripts/tools/conversations_of_trees.py --help"


def find_format(row: dict, columns: dict, wanted: str) -> str:
    """The format of a row under the mapping `columns`. Raises BadRow if there is none.

    A column that is mapped decides: its format and no other. And a row whose answer is null is no row of another format.
    """
    # A missing value and a missing column are the same to Parquet and CSV, which have each column in each row.
    present = {column for column, value in row.items() if value is not None}
    candidates = _formats_of(columns) if wanted == "auto" else {wanted: FORMATS[wanted]}
    for name, needed in candidates.items():
        absent = [column for column in needed if columns.get(column, column) not in present]
        if not absent:
            if name == "text" and wanted == "auto":
                _check_plain(row, columns.get("text", "text"))
            return name
        if len(absent) < len(needed) and any(columns.get(column, column) in row for column in absent):
            candidates = {name: needed}
            break
    if _is_of_a_tree(row):
        raise BadRow("tree", f"is a tree of messages (message_tree_id); {_TREE_ADVICE}")
    shapes = "; ".join(" + ".join(needed) for needed in candidates.values())
    mapped = [real for real in columns.values() if real is not None and real not in present]
    hint = f"; mapped columns that are not there: {some(mapped)}" if mapped else ""
    raise BadRow("missing_column", f"has the columns {some(sorted(present), 12)}, and needs {shapes}{hint}")


def _formats_of(columns: dict) -> dict[str, tuple[str, ...]]:
    """The formats that a mapping allows: those that it maps a column of, otherwise all."""
    if not columns:
        return FORMATS
    return {name: needed for name, needed in FORMATS.items() if any(column in columns for column in needed)} or FORMATS


def _check_plain(row: dict, column: str) -> None:
    """Refuse text that is a conversation in disguise, unless `format: text` says that it is meant."""
    if _is_of_a_tree(row):
        raise BadRow("tree", f"is one message of a tree of them (message_id, parent_id); {_TREE_ADVICE}")
    if _messages_in(row[column]):
        raise BadRow(
            "wrong_format",
            f"{column} is JSON of messages; set datasets.<name>.columns: {{messages: {column}}}, or format: text",
        )


def _is_of_a_tree(row: dict) -> bool:
    """Whether a row is of OpenAssistant's layout: a message that names its parent, or a message with all its replies."""
    return {"message_id", "parent_id"} <= row.keys() or {"message_tree_id", "prompt"} <= row.keys()


def normalise(row: dict, columns: dict, format_name: str) -> tuple[dict, LeftOut]:
    """The row in the one shape, and what of it is not in there or not trained.

    Raises BadRow with what is wrong; its `reason` is "empty" where nothing is to be learnt.
    """
    cells = Fields(row)
    left = LeftOut()

    def cell(column: str):
        return cells.first(columns.get(column, column))

    if format_name == "text":
        result: dict = {"text": _from_text(cell("text"))}
    else:
        if format_name == "alpaca":
            messages = _from_alpaca(cell)
        elif format_name == "prompt_completion":
            messages = _from_prompt_completion(cell, left.keys)
        else:  # messages, sharegpt
            messages = _from_messages(cell(FORMATS[format_name][0]), left.keys)
        _add_system(messages, cells, columns)
        result = {"messages": _joined_calls(_trainable(messages, left))}
        tools = _tools(cell("tools"), "tools") or _functions(cells, columns)
        if tools:
            result["tools"] = tools
    left.columns = cells.unread()
    _check_media(result, left)
    return result, left


# --- formats ----------------------------------------------------------------------------------------------------------


def _from_text(value) -> str:
    value = text(value, "text")
    if not value.strip():
        raise BadRow("empty", "the text is empty")
    return value


def _from_messages(value, keys: set[str]) -> list[dict]:
    value = objects(parsed(value, "messages"))
    if not isinstance(value, list):
        raise BadRow("wrong_type", f"messages is {kind(value)}, and must be a list")
    return [
        _plain_message(item, index) or _message(item, f"messages[{index}]", keys) for index, item in enumerate(value)
    ]


def _plain_message(item, index: int) -> dict | None:
    """What `_message` makes of the usual turn, which is a role and text and nothing else, in a fifth of the time."""
    if type(item) is not dict or len(item) != 2:
        return None
    role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    if type(role) is not str or type(content) is not str or role not in _PLAIN_ROLES:
        return None
    return {"role": ROLES[role], "content": text(content, f"messages[{index}].content")}


def _message(item, where: str, keys: set[str]) -> dict:
    """One turn in the one shape. What it holds and nobody reads is added to `keys`."""
    item = value_of(item)
    if not isinstance(item, dict):
        raise BadRow("wrong_type", f"{where} is {kind(item)}, and must be an object with role and content")
    fields = Fields(item)
    raw_role = fields.first("role", "from")
    role = ROLES.get(str(raw_role).lower())
    if role is None:
        raise BadRow("unknown_role", f"{where} has the role {raw_role!r}; known: {some(ROLES, 20)}")
    content = _blocks(fields.first("content", "value"))
    calls = value_of(fields.first("tool_calls")) or _function_call(fields)
    message: dict = {"role": role, "content": ""}
    if isinstance(content, list):
        _add_blocks(message, content, where, keys)
    elif str(raw_role).lower() in ("function_call", "tool_call"):
        message["tool_calls"] = _tool_calls(content, where, keys)
    elif content is not None:
        message["content"] = text(content, f"{where}.content")
    elif not calls:
        raise BadRow("wrong_type", f"{where}.content is missing")
    for field in ("reasoning_content", "reasoning", "thinking"):
        if item.get(field):
            message["reasoning_content"] = text(fields.first(field), f"{where}.{field}")
            break
    if calls:
        message["tool_calls"] = _tool_calls(calls, where, keys)
    for field in ("tool_call_id", "name"):
        if item.get(field):
            message[field] = text(fields.first(field), f"{where}.{field}")
    _add_weight(message, fields, where)
    keys |= fields.unread(where)
    return message


def _role_of(item: dict) -> str | None:
    return ROLES.get(str(Fields(item).first("role", "from")).lower())


def _function_call(fields: Fields):
    """OpenAI's form of 2023: one call, which is an object, or JSON of one; where there is none it may be an empty one."""
    call = value_of(fields.values.get("function_call"))
    if is_nothing(call) or (isinstance(call, dict) and not any(call.values())):
        return None
    return fields.first("function_call")


def _blocks(content):
    """`content`, and the blocks in it where `datasets` holds them as JSON beside other rows' text (its type Json)."""
    if isinstance(content, JsonText):
        found = value_of(content)
        if isinstance(found, list) and found and all(isinstance(block, dict) and "type" in block for block in found):
            return found
    return content


def _add_blocks(message: dict, blocks: list, where: str, keys: set[str]) -> None:
    """Content as a list of typed blocks: OpenAI's `{type, text}`, LLaMA-Factory's `{type, value}`."""
    texts = []
    for block in blocks:
        fields = Fields(block if isinstance(block, dict) else {})
        type_ = fields.first("type")
        value = fields.first("text", "value", str(type_)) if type_ else None
        if type_ == "text":
            texts.append(text(value, f"{where}.content"))
        elif type_ in ("reasoning", "thinking"):
            message["reasoning_content"] = message.get("reasoning_content", "") + text(value, f"{where}.content")
        elif type_ in ("tool_call", "function_call"):
            message.setdefault("tool_calls", []).extend(_tool_calls(value, where, keys))
        else:
            raise BadRow(
                "unknown_content",
                f"{where}.content holds a block of the type {type_!r}; known: text, reasoning, tool_call",
            )
        keys |= fields.unread(f"{where}.content[0]")
    message["content"] = "".join(texts)


def _add_weight(message: dict, fields: Fields, where: str) -> None:
    """A turn's own loss weight: `weight` (OpenAI), `loss_weight` (LLaMA-Factory) or `train` (axolotl)."""
    for field in ("weight", "loss_weight", "train", "training"):
        weight = value_of(fields.first(field))
        if weight is None:
            continue
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
    history = plain(cell("history") or [], "history") or []
    if not isinstance(history, list):
        raise BadRow("wrong_type", f"history is {kind(history)}, and must be a list")
    for index, turn in enumerate(history):
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise BadRow("wrong_type", f"history[{index}] is {kind(turn)}, and must be [user, assistant]")
        messages += [
            {"role": "user", "content": text(turn[0], f"history[{index}]")},
            {"role": "assistant", "content": text(turn[1], f"history[{index}]")},
        ]
    instruction = text(cell("instruction"), "instruction")
    given = cell("input")
    given = text(given, "input") if given is not None else ""
    question = "\n".join(part for part in (instruction, given) if part.strip())
    answer = text(cell("output"), "output")
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _from_prompt_completion(cell: Callable, keys: set[str]) -> list[dict]:
    """Text or, as TRL allows, lists of messages, also as JSON (huggingface/trl#5307)."""
    prompt, completion = cell("prompt"), cell("completion")
    if isinstance(prompt, str) and _PRINTED_MESSAGES.fullmatch(prompt):
        raise BadRow("bad_json", "prompt is messages as Python prints them; write them as JSON")
    asked, answered = _messages_in(prompt), _messages_in(completion)
    # Behind a prompt in plain text, JSON of messages may be the answer itself, and so may JSON of a user's turn.
    if isinstance(completion, str) and answered is not None:
        told = asked is not None or isinstance(completion, JsonText)
        if not told or not {_role_of(item) for item in answered} <= {"assistant", "tool"}:
            answered = None
    messages = []
    for column, role, value, found in (
        ("prompt", "user", prompt, asked),
        ("completion", "assistant", completion, answered),
    ):
        if found is None:
            messages.append({"role": role, "content": text(value, column)})
        else:
            messages += [_message(item, f"{column}[{index}]", keys) for index, item in enumerate(found)]
    return messages


def _messages_in(value) -> list | None:
    """A list as it is; the messages that a text is JSON of; None for any other text."""
    if isinstance(value, list):
        return value
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return None
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return None
    says = {"content", "value", "tool_calls", "function_call"}
    is_messages = isinstance(found, list) and all(
        isinstance(m, dict) and _role_of(m) and says & m.keys() for m in found
    )
    return found if found and is_messages else None


def _add_system(messages: list[dict], cells: Fields, columns: dict) -> None:
    """The turn that a column holds, in front, unless there is one: `system`, or `system_prompt` (Open-Orca)."""
    for column in [columns["system"]] if "system" in columns else ["system", "system_prompt"]:
        value = cells.values.get(column)
        if not value or (column == "system_prompt" and not isinstance(value, str)):
            continue
        if not (messages and messages[0]["role"] == "system"):
            messages.insert(0, {"role": "system", "content": text(value, "system")})
        if messages[0]["content"] == value:
            cells.read.add(column)


def _check_media(row: dict, left: LeftOut) -> None:
    """Refuse text about a picture without the picture."""
    holders = sorted({name for name in (*left.columns, *left.keys) if name.rpartition(".")[2] in _MEDIA})
    if not holders:
        return
    texts = [row["text"]] if "text" in row else [message["content"] for message in row["messages"]]
    found = next((hit for said in texts if (hit := _PLACEHOLDER.search(said))), None)
    if found:
        raise BadRow("not_text", f"{found.group()} stands for what {some(holders)} holds, and only text is trained")


def _trainable(messages: list[dict], left: LeftOut) -> list[dict]:
    """The turns up to the last answer, those that say nothing marked. Refuses what teaches nothing."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        roles = [message["role"] for message in messages]
        raise BadRow("no_assistant_turn", f"has no assistant turn (roles: {some(roles, 8) or 'none'})")
    trained = [index for index in answers if messages[index].get("train", True)]
    if not trained:
        raise BadRow("nothing_trained", "every assistant turn has weight 0")
    empty = {index for index in trained if _says_nothing(messages[index])}
    if len(empty) == len(trained):
        raise BadRow("empty", "an assistant turn is empty" if len(trained) == 1 else "all assistant turns are empty")
    last = next(index for index in reversed(answers) if index not in empty)
    for index in empty:
        messages[index]["train"] = False
        left.turns_empty += index < last
    left.turns_cut = len(messages) - (last + 1)
    _check_asked(messages[: last + 1])
    return messages[: last + 1]


def _says_nothing(message: dict) -> bool:
    if message["content"].strip():
        return False
    return not (message.get("reasoning_content", "").strip() or message.get("tool_calls"))


def _check_asked(messages: list[dict]) -> None:
    """Without a user turn something else must ask, a system turn usually; whether that will do, the template decides."""
    asking = [message for message in messages if message["role"] == "user"]
    reason, what = "empty", "no user turn says anything"
    if not asking:
        asking = messages[: [message["role"] for message in messages].index("assistant")]
        reason, what = "no_user_turn", "has no user turn, and no system turn that could stand for one"
    if not any(message["content"].strip() for message in asking):
        raise BadRow(reason, what)


# --- tools ------------------------------------------------------------------------------------------------------------


def _tools(value, column: str) -> list[dict]:
    """Tool definitions in OpenAI's form, from a list or JSON of one, wrapped in `{"type": "function"}` or not."""
    if not value:
        return []
    value = objects(plain(value, column))
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRow("wrong_type", f"{column} is {kind(value)}, and must be a list of objects")
    tools = [tool if tool.get("function") else {"type": "function", "function": tool} for tool in value]
    for index, tool in enumerate(tools):
        function = tool["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name", ""), str):
            raise BadRow(
                "wrong_type", f"{column}[{index}].function is {kind(function)}, and must be an object with a name"
            )
    return tools


def _functions(cells: Fields, columns: dict) -> list[dict]:
    """The definitions in a column `functions`, OpenAI's name of 2023; other things are called that too."""
    value = None if "tools" in columns else cells.values.get("functions")
    if not value:
        return []
    try:
        tools = _tools(value, "functions")
    except BadRow:
        return []
    if not tools or not all("name" in tool["function"] for tool in tools):
        return []
    cells.read.add("functions")
    return tools


def _tool_calls(value, where: str, keys: set[str]) -> list[dict]:
    """Calls in OpenAI's form, `arguments` as an object wherever it is one: templates differ in what they take as text."""
    value = objects(plain(value, f"{where}.tool_calls"))
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function") or call if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow("wrong_type", f"{where} holds a tool call without a name: {kind(call)}")
        outer, inner = Fields(call), Fields(function)
        arguments = inner.first("arguments", "parameters")
        if isinstance(arguments, str):
            try:
                found = json.loads(arguments)
                arguments = found if isinstance(found, dict) else arguments
            except (ValueError, RecursionError):
                pass  # free text is allowed
        arguments = {} if arguments is None else arguments
        entry = {"type": "function", "function": {"name": inner.first("name"), "arguments": arguments}}
        calls.append({"id": str(call["id"]), **entry} if call.get("id") else entry)
        outer.read |= {"id", "type", "function"} | (inner.read if function is call else set())
        keys |= outer.unread(f"{where}.tool_calls[0]")
        if function is not call:
            keys |= inner.unread(f"{where}.tool_calls[0].function")
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
