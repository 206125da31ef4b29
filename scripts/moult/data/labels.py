"""From a prepared row to token ids and labels, with the gates that a row has to pass.

The labels come from rendering prefixes: the prompt of an assistant turn is what the server would render for it
(`add_generation_prompt`), and what is trained is what the template adds to that, up to the token that ends the turn. So
the mask needs no knowledge of the template, works with templates that have no `{% generation %}` markers, and where they
have them the two must agree (NVIDIA-NeMo/Megatron-Bridge#3927, huggingface/transformers#34172).
"""

import contextlib
import json
import re
from collections.abc import Generator
from functools import lru_cache

from moult.data.sequence import IGNORE, Sequence
from moult.model.chat import Chat, Unrenderable
from moult.model.prefixes import PrefixTokens, common

Blocks = list[tuple[int, int]]  # where in a text (begin, end) it is marked as generated
Texts = tuple[str, str, Blocks | None]  # the prompt of a turn, the text through its end, and its marks
Steps = Generator[None, None, list[Sequence]]  # what a row takes to become sequences, a step at a time


def sequences_of_all(chat: Chat, rows: list[dict], limit: int | None = None) -> list[list[Sequence] | Unrenderable]:
    """`sequences_of` each row, or what it raises.

    The rows take each step together: the last turns of all are rendered, then tokenized, then the rest is done. So what a step
    needs stays in the processor's cache (0.52 instead of 0.70 ms for a row of one turn).
    """
    made: dict[int, list[Sequence] | Unrenderable] = {}
    going = {place: _steps(chat, row, limit) for place, row in enumerate(rows)}
    while going:
        for place, steps in list(going.items()):
            try:
                next(steps)
                continue
            except StopIteration as end:
                made[place] = end.value
            except Unrenderable as refusal:
                made[place] = refusal
            del going[place]
    return [made[place] for place in range(len(rows))]


def sequences_of(chat: Chat, row: dict, limit: int | None = None) -> list[Sequence]:
    """The sequences that train a prepared row. Raises Unrenderable.

    `limit` is the length in tokens to which the caller cuts sequences, or beyond which it drops them, if it does. Turns that
    begin behind it are counted without being rendered one by one (`_Conversation.find_turns`).

    Usually one. A template that shows earlier turns otherwise than the last (Qwen3 and DeepSeek take the reasoning
    out of them) makes more: each turn is then trained in a sequence where it stands as it does at inference.
    """
    [made] = sequences_of_all(chat, [row], limit)
    if isinstance(made, Unrenderable):
        raise made
    return made


def _steps(chat: Chat, row: dict, limit: int | None) -> Steps:
    if "text" in row:
        return _encode_text(chat, row["text"])
    return (yield from _encode_conversation(chat, row["messages"], row.get("tools"), limit))


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


def _encode_conversation(chat: Chat, messages: list[dict], tools: list[dict] | None, limit: int | None) -> Steps:
    _check_no_control_tokens(chat, messages, tools)
    conversation = _Conversation(chat, messages, tools)
    sequences: list[Sequence] = []
    trained = [i for i, message in enumerate(messages) if message["role"] == "assistant" and message.get("train", True)]
    if any(trained):  # the first message has no prompt
        conversation.render_ahead(trained[-1])
        yield
        conversation.tokenize_ahead(trained[-1])
        yield
    for index in reversed(trained):
        ids, start = conversation.turn(index)
        home = next((sequence for sequence in sequences if _begins(sequence.input_ids, ids, start)), None)
        if home is None:
            labels = [IGNORE] * start + ids[start:]
            sequences.append(Sequence(ids, labels, start if index == len(messages) - 1 else -1))
        else:
            home.labels[start : len(ids)] = ids[start:]
        if index == trained[-1] and limit is not None and len(ids) > limit:
            with contextlib.suppress(Unrenderable):  # where a turn cannot be shown is said when it is encoded
                conversation.find_turns(trained, ids, limit)
    for sequence in sequences:
        _check_bos(chat, sequence.input_ids)
    return sequences[::-1]


def _begins(longer: list[int], ids: list[int], start: int) -> bool:
    """Whether `longer` begins with `ids`. Where it does not, it usually differs at `start`, so that is looked at first."""
    near = max(start - 8, 0)
    return longer[near : len(ids)] == ids[near:] and longer[: len(ids)] == ids


class _Conversation:
    """A conversation whose turns are encoded from the last to the first.

    The text of each turn is compared with the one after it, which begins alike: only where they differ is it tokenized and
    looked through again. So the work grows with the length of the conversation. Only the template goes through all of it for
    each turn: it can look ahead, so one rendering says nothing of the others.
    """

    def __init__(self, chat: Chat, messages: list[dict], tools: list[dict] | None):
        self.chat, self.messages, self.tools = chat, messages, tools
        self.visible = chat.visible(messages, tools)
        self.tokens = PrefixTokens(chat)
        self.prompt, self.through = "", ""  # of the turn that was encoded last
        self.blocks: Blocks | None = None
        self.shown: dict[int, int] = {}  # {message: where in self.prompt what it says ends}
        self.rendered: dict[int, Texts] = {}  # ahead of their turn
        self.found: dict[int, tuple[int, int]] = {}  # {turn: where it begins and ends in self.whole} (`find_turns`)
        self.whole: tuple[str, Blocks | None] = ("", None)

    def turn(self, index: int) -> tuple[list[int], int]:
        """The tokens up to the end of assistant turn `index`, and where the turn begins."""
        if index == 0:
            raise Unrenderable(
                "no_prompt", "it begins with an assistant turn, which nothing asks for (give that turn weight 0)"
            )
        chat, message = self.chat, self.messages[index]
        prompt, through, blocks = self.rendered.pop(index) if index in self.rendered else self._texts(index)
        answer = _continuation(prompt, through)
        self._check_nothing_left_out(index, prompt, answer)
        self.prompt, self.through, self.blocks = prompt, through, blocks
        ids, start = self._ids(prompt, answer)
        end, begun = _end_of_turn(chat, ids, start), ""
        if end is None or ids[end] not in chat.stop_ids:
            begun = _next_turn_begins(chat, bool(message.get("tool_calls")), self.tools is not None)
        if begun:
            ids, start = self._ids(prompt, answer + begun)
        elif end is None:
            raise Unrenderable(
                "no_stop_token",
                f"the template ends the turn with ...{answer[-16:]!r}, which has no special token of this tokenizer: the "
                "model could never learn to stop (model.chat_template: chatml ends turns with the tokenizer's own stop token)",
            )
        else:
            ids = ids[: end + 1]
        _check_encodable(chat, message["content"] + message.get("reasoning_content", ""))
        _check_decoding(chat, answer + begun, chat.decode(ids[start:]))
        if blocks is not None:
            self._check_markers(index, through, blocks, answer, "" if begun else chat.decode(ids[-1:]))
        return ids, start

    def render_ahead(self, index: int) -> None:
        self.rendered[index] = self._texts(index)

    def tokenize_ahead(self, index: int) -> None:
        prompt, through, _ = self.rendered[index]
        self.tokens.ids(prompt + _continuation(prompt, through))

    def _texts(self, index: int) -> Texts:
        """The prompt of a turn, the text through its end, and what the template marks there as generated, if it marks."""
        if index in self.found:
            (whole, blocks), (begin, end) = self.whole, self.found[index]
            return whole[:begin], whole[:end], blocks
        prompt = self.chat.render_visible(self.visible[:index], self.tools, prompt=True)
        if self.chat.marks_answers(self.tools):
            return prompt, *self.chat.render_marked(self.visible[: index + 1], self.tools)
        return prompt, self.chat.render_visible(self.visible[: index + 1], self.tools, prompt=False), None

    def find_turns(self, trained: list[int], ids: list[int], limit: int) -> None:
        """Find the turns that begin behind the first `limit` tokens, to be cut off, in the text of the last turn.

        They need not be rendered one by one then: nothing of them is trained, they are only counted. A turn begins behind what
        asks for it, and ends with the token that ends the last one. Nothing is found where the text does not show each turn
        so, or where a turn before the limit is asked for otherwise than it stands there.

        `ids` are the tokens through the last turn, which has just been encoded.
        """
        last, whole = trained[-1], self.through
        before = self.chat.render_visible(self.visible[:last], self.tools, prompt=False)
        opening, closing = self.prompt.removeprefix(before), self.chat.decode(ids[-1:])
        if not (whole.startswith(self.prompt) and self.prompt.startswith(before)):
            return
        # What the messages say holds no control tokens (`_check_no_control_tokens`), so the template has written these.
        if not (self.chat.special_text.search(opening) and self.chat.special_text.fullmatch(closing)):
            return
        begins = [match.end() for match in re.finditer(re.escape(opening), whole)]
        assistants = [index for index in range(last + 1) if self.messages[index]["role"] == "assistant"]
        if len(begins) != len(assistants):
            return
        stops = [whole.find(closing, begin) for begin in begins]
        ends = [stop + len(closing) for stop in stops]
        if -1 in stops or any(end > after for end, after in zip(ends, begins[1:], strict=False)):
            return
        places = dict(zip(assistants, zip(begins, ends, strict=True), strict=True))
        behind = [index for index in trained[:-1] if self.tokens.count_before(places[index][0]) >= limit]
        # All turns that are not cut off must be asked for as they stand there; some that are cut off must also be shown so.
        for index in sorted({*trained[:-1]} - {*behind} | {*behind[:1], *behind[len(behind) // 2 :][:1], *behind[-1:]}):
            begin, end = places[index]
            texts = self._texts(index) if index else ("", "", None)
            if texts[0] != whole[:begin] or (index in behind and not texts[1].startswith(whole[:end])):
                return
            self.rendered[index] = texts
        self.found, self.whole = {index: places[index] for index in behind}, (whole, self.blocks)

    def _ids(self, prompt: str, answer: str) -> tuple[list[int], int]:
        """The tokens of prompt and answer, and where those of the answer begin."""
        ids = self.tokens.ids(prompt + answer)
        prompt_ids = self.tokens.ids(prompt)
        if ids[: len(prompt_ids)] != prompt_ids:
            # A token reaches over the seam. At inference the prompt is tokenized alone, so it must be here.
            ids = _stitched(self.chat, prompt_ids, answer, ids)
        return ids, len(prompt_ids)

    # --- gates ---

    def _check_nothing_left_out(self, index: int, prompt: str, answer: str) -> None:
        """Everything that was said is shown: in the prompt what others said, in the answer what the assistant says.

        Earlier answers may be shortened (reasoning taken out): that is what the model sees at inference too.
        """
        self._check_others_shown(index, prompt)
        if self.tools and prompt == self.chat.render_visible(self.visible[:index], [], prompt=True):
            raise Unrenderable("template_drops", "the template leaves out the tools")
        for tool in self.tools or []:
            if tool["function"].get("name", "") not in prompt:
                raise Unrenderable("template_drops", f"the template leaves out the tool {tool['function'].get('name')}")
        message, shown = self.messages[index], _dense(answer)
        for part in ("reasoning_content", "content"):
            text = message.get(part, "")
            if not _shows(shown, text) and not _continues(prompt, shown, text):
                raise Unrenderable("template_drops", f"the template leaves out the assistant's {part}")
        for call in message.get("tool_calls", []):
            arguments = call["function"]["arguments"]
            said = [call["function"]["name"], *(arguments if isinstance(arguments, dict) else [str(arguments)])]
            if not all(_shows(shown, text) for text in said):
                raise Unrenderable("template_drops", f"the template leaves out the call of {call['function']['name']}")

    def _check_others_shown(self, index: int, prompt: str) -> None:
        same, place, dense = common(self.prompt, prompt), 0, None
        for at, message in enumerate(self.messages[:index]):
            if message["role"] == "assistant":
                continue
            end = self.shown.get(at)
            if end is None or end > same:
                end = _end_in(prompt, message["content"].strip(), place)
                if end is None:
                    dense = _dense(prompt) if dense is None else dense
                    if not _shows(dense, message["content"]):
                        raise Unrenderable(
                            "template_drops", f"the template leaves out what the {message['role']} turn says"
                        )
                    continue
                self.shown[at] = end
            place = end

    def _check_markers(self, index: int, through: str, blocks: Blocks, answer: str, stop: str) -> None:
        """What the template marks as generated is the turn that the prefixes say, to the token that ends it.

        A block may also hold the words that ask for the answer (SmolLM3), but nothing that others say.
        """
        at = len(through) - len(answer)
        end = at + max(answer.rfind(stop), 0) + len(stop)
        for start, after in [*sorted(blocks), (end, end)]:
            if left_out := through[at : min(start, end)].lstrip():
                at = min(start, end) - len(left_out)
                raise Unrenderable(
                    "markers",
                    f"the template's {{% generation %}} block leaves out {through[at : at + 16]!r}, "
                    "which is part of the answer or ends it",
                )
            at = max(at, after)
        if any(message["role"] == "assistant" for message in self.messages[:index]):
            return
        firsts = [stop - len(through[start:stop].lstrip()) for start, stop in blocks if through[start:stop].strip()]
        first = min(firsts, default=len(through))
        # What the template adds to the prompt is the answer. Only a block that begins before may hold what others say.
        if first < len(self.prompt) or not through.startswith(self.prompt):
            asked = self.chat.render_visible(self.visible[:index], self.tools, prompt=False)
            if through.startswith(asked) and first < len(asked):
                raise Unrenderable(
                    "markers",
                    f"the template's {{% generation %}} block holds {through[first:][:16]!r}, "
                    "which is no part of an answer",
                )


def _stitched(chat: Chat, prompt_ids: list[int], answer: str, joined: list[int]) -> list[int]:
    """Prompt and answer tokenized apart. SentencePiece puts a space before a text that it sees the start of, so the
    answer is shown with something in front of it, which is taken off again.

    `joined` are the tokens of both together, which say the same.
    """
    # Decoded from a special token on that both have: what stands before it says the same.
    same = common(prompt_ids, joined)
    since = next((at for at in range(same - 1, 0, -1) if joined[at] in chat.special_ids), 0)
    whole = chat.decode(joined[since:])
    for front in (chat.tokenizer.eos_token or "", "\n", ""):
        front_ids, ids = chat.ids(front), chat.ids(front + answer)
        tail = ids[len(front_ids) :]
        if ids[: len(front_ids)] == front_ids and chat.decode(prompt_ids[since:] + tail) == whole:
            return prompt_ids + tail
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


def _end_in(shown: str, text: str, place: int) -> int | None:
    """Where `text` ends in what is shown, as it is or as a JSON string, behind `place` or else anywhere; or None."""
    for form in (text, json.dumps(text, ensure_ascii=False)[1:-1]):
        for start in (place, 0):
            if (at := shown.find(form, start)) >= 0:
                return at + len(form)
    return None


def _continues(prompt: str, answer: str, text: str) -> bool:
    """Whether the prompt ends with the beginning of `text`, usually `<think>`, and the answer with the rest follows."""
    text = _dense(text)
    prompt = "".join(prompt.rsplit(None, 64)[-64:])  # its last 64 words, so no fewer characters if it has so many
    return any(prompt.endswith(text[:size]) and answer.startswith(text[size:]) for size in range(1, min(len(text), 64)))


def _continuation(prompt: str, through: str) -> str:
    """What the template adds to the prompt to make the answered turn. Raises Unrenderable where it does not continue it.

    Some templates ask with other whitespace than they show the answer with. The prompt stays as it is asked.
    """
    if through.startswith(prompt):
        return through[len(prompt) :]
    same = common(prompt, through)
    at = len(prompt[:same].rstrip())
    for char in prompt[same:]:
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
