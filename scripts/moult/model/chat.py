"""From conversations to token ids and labels: one template, one tokenizer, the same in training and at inference.

The labels come from rendering prefixes: the prompt of an assistant turn is what the server would render for it
(`add_generation_prompt`), and what is trained is what the template adds to that, up to the token that ends the turn. So
the mask needs no knowledge of the template, works with templates that have no `{% generation %}` markers, and where they
have them the two must agree (NVIDIA-NeMo/Megatron-Bridge#3927, huggingface/transformers#34172).
"""

import contextlib
import json
import logging
import re
import signal
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from moult.errors import MoultError, some
from moult.files import read_json, sha256_text
from moult.model.safetensors import AGAIN

log = logging.getLogger("moult")

IGNORE = -100  # the label of a token that is not trained (torch's CrossEntropyLoss)

# Templates that print today's date (strftime_now) would make other tokens each day.
TEMPLATE_DATE = date(2026, 1, 1)

# Seconds of the processor's time for one rendering, which takes milliseconds.
TEMPLATE_SECONDS = 5


class Unrenderable(Exception):
    """A row that the template cannot show as it is. `reason` names the report's entry."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass
class Sequence:
    """What is trained in one forward pass.

    input_ids, labels: int lists of equal length; labels hold IGNORE where nothing is trained.
    answer_start: index of the first token of the row's last answer, or -1 if that is not in this sequence.
    """

    input_ids: list[int]
    labels: list[int]
    answer_start: int


def load_tokenizer(folder: str, trust_remote_code: bool = False):
    """The tokenizer in a model folder. Raises MoultError where there is none that is whole."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, or what tokenizers raises
        if not (Path(folder) / "tokenizer.json").exists():
            raise MoultError(f"{folder}: no tokenizer.json, and nothing to make one of", "add the tokenizer") from error
        raise MoultError(f"{folder}: no tokenizer can be loaded: {str(error).splitlines()[0]}", AGAIN) from error
    if not tokenizer.is_fast:
        raise MoultError(
            f"{folder}: the tokenizer has no tokenizer.json",
            "convert it: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    return tokenizer


class Chat:
    """A tokenizer with its template.

    Args:
        folder: the model's folder.
        template: the template's text, or None for plain text only.
        template_kwargs: variables for the template, such as {"enable_thinking": False}.

    Attributes: `tokenizer`; `stop_ids`, the tokens that end generation by the model's own settings; `pad_id`, a token
    that is none of those, and that the template does not write.
    """

    def __init__(
        self,
        folder: str,
        template: str | None,
        template_kwargs: dict | None = None,
        trust_remote_code: bool = False,
    ):
        self.tokenizer = load_tokenizer(folder, trust_remote_code)
        self.template = template
        self.template_kwargs = template_kwargs or {}
        self.stop_ids = stop_ids(folder, self.tokenizer)
        self.special_ids = {id for id, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self.pad_id = self._pad_id()
        specials = sorted(
            (self.tokenizer.added_tokens_decoder[id].content for id in self.special_ids),
            key=len,
            reverse=True,
        )
        self._written: set[str] = set()  # characters that were tried: the tokenizer has tokens for these,
        self._lost: set[str] = set()  # and none for these
        self._special_text = re.compile("|".join(map(re.escape, specials)) or r"(?!)")
        self.has_generation_markers = bool(re.search(r"\{%-?\s*generation\s*-?%\}", template or ""))
        if template is not None:
            _freeze_date(template)

    def _pad_id(self) -> int:
        own = self.tokenizer.pad_token_id
        # Labels and attention masks are ours, so any token will do that ends no turn.
        candidates = [*([] if own is None else [own]), *sorted(self.special_ids), *range(len(self.tokenizer))]
        return next(
            id for id in candidates if id not in self.stop_ids and self.decode([id]) not in (self.template or "")
        )

    # --- rendering ---

    def render(self, messages: list[dict], tools: list[dict] | None, prompt: bool) -> str:
        """The conversation as text; with `prompt`, followed by what asks for an answer. Raises Unrenderable."""
        try:
            with _time_limit():
                return self.tokenizer.apply_chat_template(
                    _visible(messages),
                    tools=tools,
                    chat_template=self.template,
                    tokenize=False,
                    add_generation_prompt=prompt,
                    **self.template_kwargs,
                )
        except MoultError:
            raise
        except Exception as error:  # a template can raise whatever Python can
            raise Unrenderable("template_error", f"the template refuses it: {error}") from None

    def ids(self, text: str) -> list[int]:
        """The tokens of rendered text. The template has written the special tokens, so none are added."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt_ids(self, messages: list[dict], tools: list[dict] | None = None) -> list[int]:
        """What the model is given to answer: a server makes the same tokens of the same messages."""
        if self.template is None:
            return self.tokenizer("\n".join(message["content"] for message in messages))["input_ids"]
        return self.ids(self.render(messages, tools, prompt=True))

    def decode(self, ids: list[int], special: bool = True) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)

    # --- labels ---

    def encode(self, row: dict) -> list[Sequence]:
        """The sequences that train a prepared row. Raises Unrenderable.

        Usually one. A template that shows earlier turns otherwise than the last (Qwen3 and DeepSeek take the reasoning
        out of them) makes more: each turn is then trained in a sequence where it stands as it does at inference.
        """
        return (
            self._encode_text(row["text"])
            if "text" in row
            else self._encode_conversation(row["messages"], row.get("tools"))
        )

    def _encode_text(self, text: str) -> list[Sequence]:
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token_id
        if eos is None:
            raise Unrenderable("no_stop_token", "the tokenizer names no EOS: the model could never learn to stop")
        self._check_encodable(text)
        # Text that brings its own BOS must not get another.
        ids = self.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"]
        if ids[-1:] != [eos]:
            ids = [*ids, eos]
        if len(ids) < 2:
            raise Unrenderable("not_encodable", "the text makes no token that could be trained")
        self._check_bos(ids)
        return [Sequence(ids, [IGNORE, *ids[1:]], -1)]  # nothing predicts the first token

    def _encode_conversation(self, messages: list[dict], tools: list[dict] | None) -> list[Sequence]:
        self._check_no_control_tokens(messages, tools)
        sequences: list[Sequence] = []
        trained = [
            i for i, message in enumerate(messages) if message["role"] == "assistant" and message.get("train", True)
        ]
        for index in reversed(trained):
            ids, start = self._turn(messages, index, tools)
            labels = [IGNORE] * start + ids[start:]
            home = next((s for s in sequences if s.input_ids[: len(ids)] == ids), None)
            if home is None:
                sequences.append(Sequence(ids, labels, start if index == len(messages) - 1 else -1))
            else:
                home.labels[start : len(ids)] = ids[start:]
        for sequence in sequences:
            self._check_bos(sequence.input_ids)
        return sequences[::-1]

    def _turn(self, messages: list[dict], index: int, tools: list[dict] | None) -> tuple[list[int], int]:
        """The tokens up to the end of assistant turn `index`, and where the turn begins."""
        if index == 0:
            raise Unrenderable(
                "no_prompt", "it begins with an assistant turn, which nothing asks for (give that turn weight 0)"
            )
        prompt = self.render(messages[:index], tools, prompt=True)
        through = self.render(messages[: index + 1], tools, prompt=False)
        answer = _continuation(prompt, through)
        self._check_nothing_left_out(messages[: index + 1], tools, prompt, answer)
        prompt_ids = self.ids(prompt)
        ids = self.ids(prompt + answer)
        if ids[: len(prompt_ids)] != prompt_ids:
            # A token reaches over the seam. At inference the prompt is tokenized alone, so it must be here.
            ids = self._stitched(prompt_ids, answer, self.decode(ids))
        start = len(prompt_ids)
        ids = ids[: self._end_of_turn(ids, start, answer) + 1]
        message = messages[index]
        self._check_encodable(message["content"] + message.get("reasoning_content", ""))
        self._check_decoding(answer, self.decode(ids[start:]))
        if self.has_generation_markers:
            self._check_markers(messages[: index + 1], tools, answer, self.decode(ids[-1:]))
        return ids, start

    def _stitched(self, prompt_ids: list[int], answer: str, whole: str) -> list[int]:
        """Prompt and answer tokenized apart. SentencePiece puts a space before a text that it sees the start of, so the
        answer is shown with something in front of it, which is taken off again."""
        for front in (self.tokenizer.eos_token or "", "\n", ""):
            front_ids, ids = self.ids(front), self.ids(front + answer)
            stitched = prompt_ids + ids[len(front_ids) :]
            if ids[: len(front_ids)] == front_ids and self.decode(stitched) == whole:
                return stitched
        raise Unrenderable(
            "seam", "the tokenizer joins the end of the prompt with the answer, and cannot be kept from it"
        )

    def _end_of_turn(self, ids: list[int], start: int, answer: str) -> int:
        """Index of the token that ends the turn, among those after the last one that says something.

        Usually the first special one. Several in a row (`<|tool_call_end|><|im_end|>`) belong together: of them the
        first that ends generation, or else the last. What follows after a space (Phi's `<|endoftext|>`) ends the whole.
        """
        ends = self.special_ids | self.stop_ids
        last = len(ids) - 1
        while last >= start and (ids[last] in ends or not self.decode([ids[last]]).strip()):
            last -= 1
        after = [index for index in range(last + 1, len(ids)) if ids[index] in ends]
        row = [index for place, index in enumerate(after) if index == after[0] + place]
        if row:
            return next((index for index in row if ids[index] in self.stop_ids), row[-1])
        raise Unrenderable(
            "no_stop_token",
            f"the template ends the turn with ...{answer[-16:]!r}, which has no special token of this tokenizer: the model "
            "could never learn to stop (model.chat_template: chatml ends turns with the tokenizer's own stop token)",
        )

    # --- gates ---

    def _check_bos(self, ids: list[int]) -> None:
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise Unrenderable(
                "double_bos",
                f"it begins with {self.tokenizer.bos_token!r} twice; the template must write it once",
            )

    def _check_no_control_tokens(self, messages: list[dict], tools: list[dict] | None) -> None:
        parts = [(f"messages[{index}]", message) for index, message in enumerate(messages)] + [("tools", tools)]
        for where, part in parts:
            found = next(filter(None, map(self._special_text.search, _texts(part))), None)
            if found:
                raise Unrenderable(
                    "control_token",
                    f"{where} says {found.group()!r}, which this tokenizer takes for a control token",
                )

    def _check_nothing_left_out(self, messages: list[dict], tools: list[dict] | None, prompt: str, answer: str) -> None:
        """Everything that was said is shown: in the prompt what others said, in the answer what the assistant says.

        Earlier answers may be shortened (reasoning taken out): that is what the model sees at inference too.
        """
        shown_prompt, shown_answer = _dense(prompt), _dense(answer)
        for message in messages[:-1]:
            if message["role"] != "assistant" and not _shows(shown_prompt, message["content"]):
                raise Unrenderable("template_drops", f"the template leaves out what the {message['role']} turn says")
        if tools and prompt == self.render(messages[:-1], None, prompt=True):
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

    def lost_characters(self, text: str) -> str:
        """The characters of `text` that the tokenizer has no tokens for and silently leaves out."""
        for char in set(text) - self._written - self._lost:
            decoded = self.decode(self.ids(f"a{char}"), special=False)
            (self._written if char.isspace() or _nfd(char) in _nfd(decoded) else self._lost).add(char)
        return "".join(char for char in text if char in self._lost) if self._lost else ""

    def _check_encodable(self, said: str) -> None:
        """Most of what is trained can be written. What cannot is counted by the caller."""
        said = _dense(said)
        lost = self.lost_characters(said)
        if len(lost) > len(said) / 2:
            raise Unrenderable(
                "not_encodable",
                f"the tokenizer has no tokens for most of what is said ({''.join(sorted(set(lost)))[:20]!r})",
            )

    def _check_decoding(self, answer: str, decoded: str) -> None:
        """The trained tokens say what the assistant says, but for what the tokenizer cannot write."""
        answer, decoded = _dense(answer), _dense(decoded)
        if answer.startswith(decoded):  # behind the stop token the template may add more
            return
        lost = set(self.lost_characters(answer))
        if not self._without(lost, answer).startswith(self._without(lost, decoded)):
            raise Unrenderable("decoding", f"the tokens of the answer say {decoded[:60]!r}, not {answer[:60]!r}")

    def _without(self, lost: set[str], text: str) -> str:
        text = text.replace(self.tokenizer.unk_token or "\0", "")
        return _nfd("".join(char for char in text if char not in lost))

    def _check_markers(self, messages: list[dict], tools: list[dict] | None, answer: str, stop: str) -> None:
        """What the template marks as generated is the turn that the prefixes say, to the token that ends it.

        A block may also hold the words that ask for the answer (SmolLM3), but nothing that others say.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        with _time_limit():
            [through], [blocks] = render_jinja_template(
                [_visible(messages)],
                tools=tools,
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **self.template_kwargs},
            )
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
            asked = self.render(messages[:-1], tools, prompt=False)
            if marked and through.startswith(asked) and min(marked) < len(asked):
                raise Unrenderable(
                    "markers",
                    f"the template's {{% generation %}} block holds {through[min(marked) :][:16]!r}, "
                    "which is no part of an answer",
                )


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """Stop a template that loops: Jinja's sandbox limits one range, but not a loop within a loop.

    The timer counts the time of this process only, so a busy machine trips nothing. Processor time has a signal of its
    own, and each worker process a timer of its own.
    """

    def stop(number: int, frame) -> None:
        raise MoultError(f"the chat template has not come to an end in {TEMPLATE_SECONDS} seconds", "look at its loops")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, TEMPLATE_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _visible(messages: list[dict]) -> list[dict]:
    return [{key: value for key, value in message.items() if key != "train"} for message in messages]


def _texts(value) -> list[str]:
    """Every string in a message or a tool definition."""
    if isinstance(value, dict | list):
        items = [*value, *value.values()] if isinstance(value, dict) else value
        return [text for item in items for text in _texts(item)]
    return [value] if isinstance(value, str) else []


def _dense(text: str) -> str:
    return "".join(text.split())


def _nfd(text: str) -> str:
    """One spelling of characters that have several: many tokenizers compose them (Qwen: NFC)."""
    return unicodedata.normalize("NFD", text)


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


def _freeze_date(template: str) -> None:
    if "strftime_now" in template:
        # The template's variables are made plain data on their way in, so a function can only get there as a global.
        from transformers.utils.chat_template_utils import _compile_jinja_template

        _compile_jinja_template(template).environment.globals["strftime_now"] = TEMPLATE_DATE.strftime


def stop_ids(folder: str, tokenizer) -> set[int]:
    """The tokens that end generation: the tokenizer's EOS and those of the generation config."""
    # Without a generation config transformers and vLLM make one of the model's.
    paths = [Path(folder) / name for name in ("generation_config.json", "config.json")]
    path = next((path for path in paths if path.exists()), None)
    own = read_json(path).get("eos_token_id") if path else None
    ids = set(own if isinstance(own, list) else [own]) | {tokenizer.eos_token_id}
    return {id for id in ids if id is not None}


def prompt_of(entry: dict, chat: Chat) -> tuple[list[dict], list[int]]:
    """The messages of an entry of eval.prompts, and their tokens. Raises MoultError where the template cannot show them."""
    messages = entry.get("messages") or [{"role": "user", "content": entry["prompt"]}]
    try:
        return messages, chat.prompt_ids(messages)
    except Unrenderable as refusal:
        raise MoultError(
            f"eval.prompts.{entry['id']}: {refusal}", "mend the prompt, or choose another chat template"
        ) from None


def choose_template(
    folder: str, setting: str | None, shipped: str, trust_remote_code: bool = False
) -> tuple[str | None, str]:
    """(the template's text, where it is from) for `model.chat_template`. None if the model has none and none is named.

    `shipped` is the folder of the templates that come with Moult.
    """
    if setting is not None:
        named = Path(shipped) / f"{setting}.jinja"
        path = named if named.exists() else Path(setting).expanduser()
        if not path.is_file():
            known = some(sorted(file.stem for file in Path(shipped).glob("*.jinja")))
            raise MoultError(
                f"model.chat_template: {setting}: no such file",
                f"give a Jinja file, or one of the shipped: {known}",
            )
        text = path.read_text(encoding="utf-8")
        origin = f"shipped: {setting}" if path == named else f"file: {path.name}"
    else:
        text, origin = load_tokenizer(folder, trust_remote_code).chat_template, "the model's own"
        if isinstance(text, dict):
            text = text.get("default")
    if text is not None:
        check_syntax(text, origin)
        log.debug("chat template (%s), sha256 %s", origin, sha256_text(text))
    return text, origin


def check_syntax(text: str, origin: str) -> None:
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        _compile_jinja_template(text)
    except (TemplateSyntaxError, SyntaxError) as error:  # the latter for {% break %} outside of a loop
        message = getattr(error, "message", None) or error.msg
        raise MoultError(f"chat template ({origin}), line {error.lineno}: {message}", "mend the template") from None
