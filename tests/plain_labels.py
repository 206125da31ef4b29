"""The labels of a conversation in the plain way: every prefix is rendered, tokenized and looked through from its beginning.

This is slow (the work grows with the square of the turns and more) and easy to believe. moult/data/labels.py must give the
same sequences and refuse the same rows for the same reasons.
"""

from moult.data import labels
from moult.data.sequence import IGNORE, Sequence
from moult.model.chat import Chat, Unrenderable


def plain_sequences(chat: Chat, messages: list[dict], tools: list[dict] | None) -> list[Sequence]:
    """What `sequences_of` must give."""
    labels._check_no_control_tokens(chat, messages, tools)
    sequences: list[Sequence] = []
    trained = [i for i, message in enumerate(messages) if message["role"] == "assistant" and message.get("train", True)]
    for index in reversed(trained):
        ids, start = _turn(chat, messages, index, tools)
        targets = [IGNORE] * start + ids[start:]
        home = next((s for s in sequences if s.input_ids[: len(ids)] == ids), None)
        if home is None:
            sequences.append(Sequence(ids, targets, start if index == len(messages) - 1 else -1))
        else:
            home.labels[start : len(ids)] = ids[start:]
    for sequence in sequences:
        labels._check_bos(chat, sequence.input_ids)
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
    end, begun = labels._end_of_turn(chat, ids, start), ""
    if end is None or ids[end] not in chat.stop_ids:
        begun = labels._next_turn_begins(chat, bool(message.get("tool_calls")), tools is not None)
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
    labels._check_encodable(chat, message["content"] + message.get("reasoning_content", ""))
    labels._check_decoding(chat, answer + begun, chat.decode(ids[start:]))
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


def _check_nothing_left_out(
    chat: Chat, messages: list[dict], tools: list[dict] | None, prompt: str, answer: str
) -> None:
    """Everything that was said is shown: in the prompt what others said, in the answer what the assistant says.

    Earlier answers may be shortened (reasoning taken out): that is what the model sees at inference too.
    """
    shown_prompt, shown_answer = labels._dense(prompt), labels._dense(answer)
    for message in messages[:-1]:
        if message["role"] != "assistant" and not labels._shows(shown_prompt, message["content"]):
            raise Unrenderable("template_drops", f"the template leaves out what the {message['role']} turn says")
    if tools and prompt == chat.render(messages[:-1], [], prompt=True):
        raise Unrenderable("template_drops", "the template leaves out the tools")
    for tool in tools or []:
        if tool["function"].get("name", "") not in prompt:
            raise Unrenderable("template_drops", f"the template leaves out the tool {tool['function'].get('name')}")
    last = messages[-1]
    for part in ("reasoning_content", "content"):
        text = last.get(part, "")
        if not labels._shows(shown_answer, text) and not _continues(shown_prompt, shown_answer, text):
            raise Unrenderable("template_drops", f"the template leaves out the assistant's {part}")
    for call in last.get("tool_calls", []):
        arguments = call["function"]["arguments"]
        said = [call["function"]["name"], *(arguments if isinstance(arguments, dict) else [str(arguments)])]
        if not all(labels._shows(shown_answer, text) for text in said):
            raise Unrenderable("template_drops", f"the template leaves out the call of {call['function']['name']}")


def _check_markers(chat: Chat, messages: list[dict], tools: list[dict] | None, answer: str, stop: str) -> None:
    """What the template marks as generated is the turn that the prefixes say, to the token that ends it.

    A block may also hold the words that ask for the answer (SmolLM3), but nothing that others say.
    """
    through, blocks = chat.render_marked(chat.visible(messages, tools), tools)
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


def _continues(prompt: str, answer: str, text: str) -> bool:
    """Whether the prompt ends with the beginning of `text`, usually `<think>`, and the answer with the rest follows."""
    text = labels._dense(text)
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
