"""From a prepared row to token ids and labels, with the gates that a row has to pass.

The labels come from rendering prefixes: the prompt of an assistant turn is what the server would render for it
(`add_generation_prompt`), and what is trained is what the template adds to that, up to the token that ends the turn. So
the mask needs no knowledge of the template, works with templates that have no `{% generation %}` markers, and where they
have them the two must agree (NVIDIA-NeMo/Megatron-Bridge#3927, huggingface/transformers#34172).
"""

import json
from functools import lru_cache

from moult.data.sequence import IGNORE, Sequence
from moult.model.chat import Chat, Unrenderable


def sequences_of(chat: Chat, row: dict) -> list[Sequence]:
    """The sequences that train a prepared row. Raises Unrenderable.

    Usually one. A template that shows earlier turns otherwise than the last (Qwen3 and DeepSeek take the reasoning
    out of them) makes more: each turn is then trained in a sequence where it stands as it does at inference.
    """
    return (
        _encode_text(chat, row["text"])
        if "text" in row
        else _encode_conversation(chat, row["messages"], row.get("tools"))
    )


def _encode_text(chat: Chat, text: str) -> list[Sequence]:
    bos, eos = chat.tokenizer.bos_token, chat.tokenizer.eos_token_id
    if eos is None:
        raise Unrenderable("no_stop_token", "the tokenizer names no EOS: the model could never learn to stop")
    _check_encodable(chat, text)
    # Text that brings its own BOS must not get another.
    ids = chat.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"]
    if ids[-1:] != [eos]:
        ids = [*ids, eos]
    if len(ids) < 2:
        raise Unrenderable("not_encodable", "the text makes no token that could be trained")
    _check_bos(chat, ids)
    return [Sequence(ids, [IGNORE, *ids[1:]], -1)]  # nothing predicts the first token


def _encode_conversation(chat: Chat, messages: list[dict], tools: list[dict] | None) -> list[Sequence]:
    _check_no_control_tokens(chat, messages, tools)
    sequences: list[Sequence] = []
    trained = [i for i, message in enumerate(messages) if message["role"] == "assistant" and message.get("train", True)]
    for index in reversed(trained):
        ids, start = _turn(chat, messages, index, tools)
        labels = [IGNORE] * start + ids[start:]
        home = next((s for s in sequences if s.input_ids[: len(ids)] == ids), None)
        if home is None:
            sequences.append(Sequence(ids, labels, start if index == len(messages) - 1 else -1))
        else:
            home.labels[start : len(ids)] = ids[start:]
    for sequence in sequences:
        _check_bos(chat, sequence.input_ids)
    return sequences[::-1]


def _turn(chat: Chat, messages: list[dict], index: int, tools: list[dict] | None) -> tuple[list[int], int]:
    """The tokens up to the end of assistant turn `index`, and where the turn begins."""
    if index == 0:
        raise Unrenderable(
            "no_prompt", "it begins with an assistant turn, which nothing asks for (give that turn weight 0)"
        )
    prompt = chat.render(messages[:index], tools, prompt=True)
    through = chat.render(messages[: index + 1], tools, prompt=False)
    answer = _continuation(prompt, through)
    _check_nothing_left_out(chat, messages[: index + 1], tools, prompt, answer)
    message = messages[index]
    ids, start = _tokens(chat, prompt, answer)
    end, begun = _end_of_turn(chat, ids, start), ""
    if end is None or ids[end] not in chat.stop_ids:
        begun = _next_turn_begins(chat, bool(message.get("tool_calls")), tools is not None)
    if begun:
        ids, start = _tokens(chat, prompt, answer + begun)
    elif end is None:
        raise Unrenderable(
            "no_stop_token",
            f"the template ends the turn with ...{answer[-16:]!r}, which has no special token of this tokenizer: the model "
            "could never learn to stop (model.chat_template: chatml ends turns with the tokenizer's own stop token)",
        )
    else:
        ids = ids[: end + 1]
    _check_encodable(chat, message["content"] + message.get("reasoning_content", ""))
    _check_decoding(chat, answer + begun, chat.decode(ids[start:]))
    if chat.marks_answers(tools):
        _check_markers(chat, messages[: index + 1], tools, answer, "" if begun else chat.decode(ids[-1:]))
    return ids, start


def _tokens(chat: Chat, prompt: str, answer: str) -> tuple[list[int], int]:
    """The tokens of prompt and answer, and where those of the answer begin."""
    prompt_ids = chat.ids(prompt)
    ids = chat.ids(prompt + answer)
    if ids[: len(prompt_ids)] != prompt_ids:
        # A token reaches over the seam. At inference the prompt is tokenized alone, so it must be here.
        ids = _stitched(chat, prompt_ids, answer, chat.decode(ids))
    return ids, len(prompt_ids)


def _stitched(chat: Chat, prompt_ids: list[int], answer: str, whole: str) -> list[int]:
    """Prompt and answer tokenized apart. SentencePiece puts a space before a text that it sees the start of, so the
    answer is shown with something in front of it, which is taken off again."""
    for front in (chat.tokenizer.eos_token or "", "\n", ""):
        front_ids, ids = chat.ids(front), chat.ids(front + answer)
        stitched = prompt_ids + ids[len(front_ids) :]
        if ids[: len(front_ids)] == front_ids and chat.decode(stitched) == whole:
            return stitched
    raise Unrenderable("seam", "the tokenizer joins the end of the prompt with the answer, and cannot be kept from it")


def _end_of_turn(chat: Chat, ids: list[int], start: int) -> int | None:
    """Index of the token that ends the turn, among those after the last one that says something; None if there is none.

    Usually the first special one. Several in a row (`<|tool_call_end|><|im_end|>`) belong together: of them the
    first that ends generation, or else the last. What follows after a space (Phi's `<|endoftext|>`) ends the whole.
    """
    ends = chat.special_ids | chat.stop_ids
    last = len(ids) - 1
    while last >= start and (ids[last] in ends or not chat.decode([ids[last]]).strip()):
        last -= 1
    after = [index for index in range(last + 1, len(ids)) if ids[index] in ends]
    row = [index for place, index in enumerate(after) if index == after[0] + place]
    return next((index for index in row if ids[index] in chat.stop_ids), row[-1] if row else None)


@lru_cache(maxsize=16)  # the same for every row
def _next_turn_begins(chat: Chat, called: bool, with_tools: bool) -> str:
    """How the template begins the turn after an answer, to the end of its first token, if that is one that ends generation.

    GLM-4's answers have no end of their own. Generation stops where the model writes the token of the next role: that of the
    user, or after a tool call (`called`) that of the tool (huggingface/trl#6044). "" for other templates.
    """
    tools = [{"type": "function", "function": {"name": "function", "parameters": {}}}] if with_tools else None
    said = "moult's answer"
    call = {"id": "call00001", "type": "function", "function": {"name": "function", "arguments": {"key": said}}}
    answer = {"content": "", "tool_calls": [call]} if called else {"content": said}
    after = {"role": "tool", "tool_call_id": "call00001"} if called else {"role": "user"}
    messages: list[dict] = [
        {"role": "user", "content": "question"},
        {"role": "assistant", **answer},
        {**after, "content": "next"},
    ]
    try:
        # An earlier answer may be shown otherwise than the last, so only what stands behind the answer is compared.
        end, more = (chat.render(messages[:size], tools, prompt=False).rpartition(said)[2] for size in (2, 3))
    except Unrenderable:
        return ""
    following = more.removeprefix(end) if more.startswith(end) else ""
    first = next((id for id in chat.ids(following) if chat.decode([id]).strip()), None)
    before, token, _ = following.partition(chat.decode([first])) if first in chat.stop_ids else ("", "", "")
    return before + token


# --- gates ---


def _check_bos(chat: Chat, ids: list[int]) -> None:
    bos = chat.tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        raise Unrenderable(
            "double_bos",
            f"it begins with {chat.tokenizer.bos_token!r} twice; the template must write it once",
        )


def _check_no_control_tokens(chat: Chat, messages: list[dict], tools: list[dict] | None) -> None:
    parts = [(f"messages[{index}]", message) for index, message in enumerate(messages)] + [("tools", tools)]
    for where, part in parts:
        found = next(filter(None, map(chat.control_token, _texts(part))), None)
        if found:
            raise Unrenderable(
                "control_token",
                f"{where} says {found!r}, which this tokenizer takes for a control token",
            )


def _check_nothing_left_out(
    chat: Chat, messages: list[dict], tools: list[dict] | None, prompt: str, answer: str
) -> None:
    """Everything that was said is shown: in the prompt what others said, in the answer what the assistant says.

    Earlier answers may be shortened (reasoning taken out): that is what the model sees at inference too.
    """
    shown_prompt, shown_answer = _dense(prompt), _dense(answer)
    for message in messages[:-1]:
        if message["role"] != "assistant" and not _shows(shown_prompt, message["content"]):
            raise Unrenderable("template_drops", f"the template leaves out what the {message['role']} turn says")
    if tools and prompt == chat.render(messages[:-1], [], prompt=True):
        raise Unrenderable("template_drops", "the template leaves out the tools")
    for tool in tools or []:
        if tool["function"].get("name", "") not in prompt:
            raise Unrenderable("template_drops", f"the template leaves out the tool {tool['function'].get('name')}")
    last = messages[-1]
    for part in ("reasoning_content", "content"):
        text = last.get(part, "")
        if not _shows(shown_answer, text) and not _continues(shown_prompt, shown_answer, text):
            raise Unrenderable("template_drops", f"the template leaves out the assistant's {part}")
    for call in last.get("tool_calls", []):
        arguments = call["function"]["arguments"]
        said = [call["function"]["name"], *(arguments if isinstance(arguments, dict) else [str(arguments)])]
        if not all(_shows(shown_answer, text) for text in said):
            raise Unrenderable("template_drops", f"the template leaves out the call of {call['function']['name']}")


def _check_encodable(chat: Chat, said: str) -> None:
    """Most of what is trained can be written. What cannot is counted by the caller."""
    said = _dense(said)
    lost = chat.lost_characters(said)
    if len(lost) > len(said) / 2:
        raise Unrenderable(
            "not_encodable",
            f"the tokenizer has no tokens for most of what is said ({''.join(sorted(set(lost)))[:20]!r})",
        )


def _check_decoding(chat: Chat, answer: str, decoded: str) -> None:
    """The trained tokens say what the assistant says, but for what the tokenizer cannot write."""
    answer, decoded = _dense(answer), _dense(decoded)
    if answer.startswith(decoded):  # behind the stop token the template may add more
        return
    lost = set(chat.lost_characters(answer))
    if not _without(chat, lost, answer).startswith(_without(chat, lost, decoded)):
        raise Unrenderable("decoding", f"the tokens of the answer say {decoded[:60]!r}, not {answer[:60]!r}")


def _without(chat: Chat, lost: set[str], text: str) -> str:
    text = text.replace(chat.tokenizer.unk_token or "\0", "")
    return chat.spelt("".join(char for char in text if char not in lost))


def _check_markers(chat: Chat, messages: list[dict], tools: list[dict] | None, answer: str, stop: str) -> None:
    """What the template marks as generated is the turn that the prefixes say, to the token that ends it.

    A block may also hold the words that ask for the answer (SmolLM3), but nothing that others say.
    """
    through, blocks = chat.generation_blocks(messages, tools)
    marked = {at for begin, end in blocks for at in range(begin, end) if not through[at].isspace()}
    begin = len(through) - len(answer)
    end = begin + max(answer.rfind(stop), 0) + len(stop)
    for at in range(begin, end):
        if at not in marked and not through[at].isspace():
            raise Unrenderable(
                "markers",
                f"the template's {{% generation %}} block leaves out {through[at : at + 16]!r}, "
                "which is part of the answer or ends it",
            )
    if not any(message["role"] == "assistant" for message in messages[:-1]):
        asked = chat.render(messages[:-1], tools, prompt=False)
        if marked and through.startswith(asked) and min(marked) < len(asked):
            raise Unrenderable(
                "markers",
                f"the template's {{% generation %}} block holds {through[min(marked) :][:16]!r}, "
                "which is no part of an answer",
            )


def _texts(value) -> list[str]:
    """Every string in a message or a tool definition."""
    if isinstance(value, dict | list):
        items = [*value, *value.values()] if isinstance(value, dict) else value
        return [text for item in items for text in _texts(item)]
    return [value] if isinstance(value, str) else []


def _dense(text: str) -> str:
    return "".join(text.split())


def _shows(shown: str, text: str) -> bool:
    """Whether `text` is in what is shown, whitespace aside, as it is or as a JSON string."""
    dense = _dense(text)
    return dense in shown or _dense(json.dumps(text.strip(), ensure_ascii=False)[1:-1]) in shown


def _continues(prompt: str, answer: str, text: str) -> bool:
    """Whether the prompt ends with the beginning of `text`, usually `<think>`, and the answer with the rest follows."""
    text = _dense(text)
    return any(prompt.endswith(text[:size]) and answer.startswith(text[size:]) for size in range(1, min(len(text), 64)))


def _continuation(prompt: str, through: str) -> str:
    """What the template adds to the prompt to make the answered turn. Raises Unrenderable where it does not continue it.

    Some templates ask with other whitespace than they show the answer with. The prompt stays as it is asked.
    """
    if through.startswith(prompt):
        return through[len(prompt) :]
    at = 0
    for char in prompt:
        if char.isspace():
            continue
        while at < len(through) and through[at].isspace():
            at += 1
        if at == len(through) or through[at] != char:
            raise Unrenderable(
                "prompt_mismatch",
                f"the template asks for the answer with ...{prompt[-24:]!r} and shows it as "
                f"...{through[max(at - 24, 0) : at + 24]!r}...: the model would be asked in another way than it was trained",
            )
        at += 1
    return through[at:].lstrip()
