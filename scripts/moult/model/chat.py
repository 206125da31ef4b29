"""A conversation as the model reads it: one template, one tokenizer, the same in training and at inference."""

import contextlib
import json
import logging
import re
import signal
import time
import unicodedata
from collections.abc import Iterator
from datetime import date
from functools import lru_cache
from itertools import product
from pathlib import Path

from moult.errors import MoultError, some
from moult.files import canonical, sha256_text
from moult.model.tokenizer import (
    Template,
    backend_of,
    load_tokenizer,
    normalised,
    own_templates,
    read_text,
    stop_ids,
    text_ids,
)

log = logging.getLogger("moult")

# What a template that prints today's date (`strftime_now`) prints in training and evaluation: otherwise it would make other
# tokens each day. A server prints today's, as the template's authors meant it.
FROZEN_DATE = date(2026, 1, 1)

# Seconds of the processor's time for one rendering, which takes milliseconds.
TEMPLATE_SECONDS = 5

# A date that has no part in common with the frozen one: neither day, month, year nor weekday.
_ANOTHER_DATE = date(1999, 12, 31)


class Unrenderable(Exception):
    """A row that the template cannot show as it is. `reason` names the report's entry."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class Chat:
    """A tokenizer with its template.

    Args:
        folder: the model's folder.
        template: the template's text, or several by name, of which those with tools are shown by "tool_use"; None for plain
            text only.
        template_kwargs: variables for the template, such as {"enable_thinking": False}.
        date: what the template takes for today; a datetime has a time of day too. None: the clock of this machine.

    Attributes:
        tokenizer: the tokenizer, of transformers.
        template: the text of the template for conversations without tools, or None.
        stop_ids: the tokens that end generation by the model's own settings.
        special_ids: the tokenizer's control tokens; `special_text` finds them in text.
        pad_id: the padding token: neither a stop token nor written by the template.
    """

    def __init__(
        self,
        folder: str,
        template: Template | None,
        template_kwargs: dict | None = None,
        trust_remote_code: bool = False,
        date: date | None = FROZEN_DATE,
    ):
        self.tokenizer = load_tokenizer(folder, trust_remote_code)
        self._backend = backend_of(self.tokenizer)
        self.date = date
        named = template if isinstance(template, dict) else {"default": template}
        self.template = named["default"]
        self._tool_template = named.get("tool_use", self.template)
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
        self._text_arguments: dict[str | None, bool] = {}  # by template
        self.special_text = re.compile("|".join(map(re.escape, specials)) or r"(?!)")
        # These the tokenizer looks for in the text that its normaliser has made (tokenizers, AddedToken.normalized).
        again = [token for token in self.tokenizer.added_tokens_decoder.values() if token.special and token.normalized]
        again = [normalised(self.tokenizer, token.content) for token in again]
        self._normalised_specials = re.compile("|".join(map(re.escape, again))) if again else None

    def _pad_id(self) -> int:
        own = self.tokenizer.pad_token_id
        # Labels and attention masks are ours, so any token will do that ends no turn.
        candidates = [*([] if own is None else [own]), *sorted(self.special_ids), *range(len(self.tokenizer))]
        written = f"{self.template or ''}{self._tool_template or ''}"
        return next(id for id in candidates if id not in self.stop_ids and self.decode([id]) not in written)

    def template_for(self, tools: list[dict] | None) -> str | None:
        """The template's text for a conversation with these tools, or with None: as transformers and vLLM choose it."""
        return self.template if tools is None else self._tool_template

    def marks_answers(self, tools: list[dict] | None) -> bool:
        """Whether that template marks what is generated (`{% generation %}`)."""
        return _marks_answers(self.template_for(tools) or "")

    def takes_text_arguments(self, tools: list[dict] | None) -> bool:
        """Whether that template takes the arguments of a tool call as JSON text (DeepSeek's do), and not as an object.

        It does if it refuses an object, or shows it in Python's form, `{'a': 1}`, and shows the text as it is.
        """
        template = self.template_for(tools)
        if template not in self._text_arguments:
            as_object = self._try_call({"key": "value"}, tools)
            self._text_arguments[template] = (
                not as_object or str({"key": "value"}) in as_object
            ) and '{"key": "value"}' in self._try_call('{"key": "value"}', tools)
        return self._text_arguments[template]

    def _try_call(self, arguments: dict | str, tools: list[dict] | None) -> str:
        """How the template shows a tool call, or "" if it refuses it."""
        function = {"name": "function", "arguments": arguments}
        call = {"id": "call00001", "type": "function", "function": function}
        asked = {"role": "user", "content": "question"}
        try:
            return self.render_visible(
                [asked, {"role": "assistant", "content": "", "tool_calls": [call]}], tools, prompt=False
            )
        except Unrenderable:
            return ""

    @contextlib.contextmanager
    def on(self, day: date | None) -> Iterator[None]:
        """Meanwhile it is `day`."""
        usual, self.date = self.date, day
        try:
            yield
        finally:
            self.date = usual

    def render(
        self, messages: list[dict], tools: list[dict] | None, prompt: bool, variables: dict | None = None
    ) -> str:
        """The conversation as text; with `prompt`, followed by what asks for an answer. Raises Unrenderable.

        `variables` are for the template, over `template_kwargs`. Only the main thread can render (`_time_limit`).
        """
        return self.render_visible(self.visible(messages, tools), tools, prompt, variables)

    def render_visible(
        self, messages: list[dict], tools: list[dict] | None, prompt: bool, variables: dict | None = None
    ) -> str:
        """As `render`, of messages that `visible` has made, or of the first of them."""
        template = self.template_for(tools)
        with self._running(template):
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=prompt,
                **{**self.template_kwargs, **(variables or {})},
            )

    def render_marked(self, messages: list[dict], tools: list[dict] | None) -> tuple[str, list[tuple[int, int]]]:
        """As `render_visible`, and where in the text (begin, end) the template's `{% generation %}` blocks are."""
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self.template_for(tools)
        with self._running(template):
            [through], [blocks] = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=template,
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **self.template_kwargs},
            )
        return through, blocks

    @contextlib.contextmanager
    def _running(self, template: str | None) -> Iterator[None]:
        """A template runs meanwhile: for a limited time, on the chat's date, and what it raises is Unrenderable."""
        try:
            with _time_limit(), on_day(template, self.date):
                yield
        except MoultError:
            raise
        except Exception as error:  # a template can raise whatever Python can
            raise Unrenderable("template_error", f"the template refuses it: {error}") from None

    def ids(self, text: str) -> list[int]:
        """The tokens of rendered text. The template has written the special tokens, so none are added."""
        if self._backend:
            # Fast: without the place of each token in the text.
            return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt_ids(
        self, messages: list[dict], tools: list[dict] | None = None, variables: dict | None = None
    ) -> list[int]:
        """What the model is given to answer: a server makes the same tokens of the same messages."""
        if self.template is None:
            return text_ids(self.tokenizer, "\n".join(message["content"] for message in messages))
        return self.ids(self.render(messages, tools, prompt=True, variables=variables))

    def decode(self, ids: list[int], special: bool = True) -> str:
        if self._backend:
            return self._backend.decode(ids, skip_special_tokens=not special)
        return self.tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)

    def lost_characters(self, text: str) -> str:
        """The characters of `text` that the tokenizer has no tokens for and silently leaves out."""
        for char in set(text) - self._written - self._lost:
            decoded = self.decode(self.ids(f"a{char}"), special=False)
            (self._written if char.isspace() or self._says(decoded, char) else self._lost).add(char)
        return "".join(char for char in text if char in self._lost) if self._lost else ""

    def _says(self, decoded: str, char: str) -> bool:
        wanted = self.spelt(f"a{char}")
        return nfd(char) in nfd(decoded) or (wanted != self.spelt("a") and wanted in self.spelt(decoded))

    def spelt(self, text: str) -> str:
        """The text in one spelling, in which what is written and what its tokens decode to can be compared: as the
        tokenizer's normaliser leaves it, without whitespace."""
        return "".join(nfd(normalised(self.tokenizer, "".join(text.split()))).split())

    def control_token(self, text: str) -> str | None:
        """The first control token that `text` says, as it is or after the tokenizer's normaliser."""
        found = self.special_text.search(text)
        if not found and self._normalised_specials:
            found = self._normalised_specials.search(normalised(self.tokenizer, text))
        return found.group() if found else None

    def visible(self, messages: list[dict], tools: list[dict] | None) -> list[dict]:
        """The messages as the template gets them, with the arguments of tool calls in the form that it takes."""
        visible = [
            {key: value for key, value in message.items() if key != "train" and value is not None}
            for message in messages
        ]
        called = [message for message in visible if isinstance(message.get("tool_calls"), list)]
        as_text = bool(called) and self.takes_text_arguments(tools)
        for message in called:
            message["tool_calls"] = [_with_arguments(call, as_text) for call in message["tool_calls"]]
        return visible


@lru_cache(maxsize=16)  # the same for every row
def _marks_answers(template: str) -> bool:
    return bool(re.search(r"\{%-?\s*generation\s*-?%\}", template))


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """Stop a template that loops: Jinja's sandbox limits one range, but not a loop within a loop.

    What counts is the processor's time of this thread, so neither a busy machine nor a server that generates meanwhile trips
    it. The timer, which counts that of all threads, only says when to look. Python runs a signal's handler in the main
    thread: there, and nowhere else, can a signal interrupt a template.
    """
    begun = time.thread_time()

    def look(number: int, frame) -> None:
        if time.thread_time() - begun >= TEMPLATE_SECONDS:
            raise MoultError(
                f"the chat template has not come to an end in {TEMPLATE_SECONDS} seconds", "look at its loops"
            )

    before = signal.signal(signal.SIGVTALRM, look)
    signal.setitimer(signal.ITIMER_VIRTUAL, TEMPLATE_SECONDS, TEMPLATE_SECONDS / 10)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _with_arguments(call, as_text: bool):
    """A tool call with its arguments as JSON text, or as the object that a text of one stands for (vLLM does that, too)."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or "arguments" not in function:
        return call
    arguments = function["arguments"]
    if as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif isinstance(arguments, str) and not as_text:
        with contextlib.suppress(ValueError, RecursionError):  # free text stays as it is
            parsed = json.loads(arguments)
            arguments = parsed if isinstance(parsed, dict) else arguments
    return {**call, "function": {**function, "arguments": arguments}}


def nfd(text: str) -> str:
    """One spelling of characters that have several: many tokenizers compose them (Qwen: NFC)."""
    return unicodedata.normalize("NFD", text)


# --- the date -----------------------------------------------------------------------------------------------------------


def prints_date(template: Template | None) -> bool:
    """Whether a template, or one of several, asks for today's date. It need not print it in every conversation."""
    texts = template.values() if isinstance(template, dict) else [template or ""]
    return any("strftime_now" in text for text in texts)


@contextlib.contextmanager
def on_day(template: str | None, day: date | None) -> Iterator[None]:
    """Meanwhile the template takes `day` for today. transformers compiles a text once, so what is changed is put back."""
    if day is None or not prints_date(template):
        yield
        return
    from transformers.utils.chat_template_utils import _compile_jinja_template

    # The template's variables are made plain data on their way in, so a function can only get there as a global.
    functions = _compile_jinja_template(template).environment.globals
    clock, functions["strftime_now"] = functions["strftime_now"], day.strftime
    try:
        yield
    finally:
        functions["strftime_now"] = clock


def shows_date(chat: Chat, messages: list[dict]) -> bool:
    """Whether the prompt of `messages` is another one each day."""
    if not prints_date(chat.template):
        return False
    ours = chat.render(messages, None, prompt=True)
    with chat.on(_ANOTHER_DATE):
        return chat.render(messages, None, prompt=True) != ours


def date_variable(chat: Chat, messages: list[dict]) -> dict[str, str]:
    """A variable with which the template shows `messages` on any day as it does on the chat's date.

    For example {"date_string": "01 Jan 2026"}: Llama 3.1's template prints today's date where that is not given (vLLM:
    vllm-project/vllm#14344). {} where no single variable does that.
    """
    from jinja2.meta import find_undeclared_variables
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment = _compile_jinja_template(chat.template).environment
    names = find_undeclared_variables(environment.parse(chat.template))
    formats = {form for _, form in re.findall(r"""strftime_now\(\s*(["'])(.*?)\1""", chat.template or "")}
    day = chat.date or date.today()
    texts = sorted(day.strftime(form) for form in formats)
    ours = chat.render(messages, None, prompt=True)
    with chat.on(_ANOTHER_DATE):
        for name, text in product(sorted(names), texts):
            with contextlib.suppress(Unrenderable):  # most names are of something else than a date
                if chat.render(messages, None, prompt=True, variables={name: text}) == ours:
                    return {name: text}
    return {}


# --- prompts and templates ----------------------------------------------------------------------------------------------


# --- prompts and templates ----------------------------------------------------------------------------------------------


def messages_of(entry: dict) -> list[dict]:
    """The messages of an entry of eval.prompts."""
    return entry.get("messages") or [{"role": "user", "content": entry["prompt"]}]


def prompt_of(entry: dict, chat: Chat) -> tuple[list[dict], list[int]]:
    """The messages of an entry of eval.prompts, and their tokens. Raises MoultError where the template cannot show them."""
    messages = messages_of(entry)
    try:
        return messages, chat.prompt_ids(messages)
    except Unrenderable as refusal:
        raise MoultError(
            f"eval.prompts.{entry['id']}: {refusal}", "fix the prompt, or choose another chat template"
        ) from None


def choose_template(
    folder: str, setting: str | None, shipped: str, trust_remote_code: bool = False
) -> tuple[Template | None, str]:
    """(the template, where it is from) for `model.chat_template`. None if the model has none and none is named.

    The model's own may be several (`Template`); a named one is for all conversations, with tools or without.
    `shipped` is the folder of the templates that come with Moult.
    """
    template: Template | None
    if setting is None:
        template, origin = own_templates(folder, load_tokenizer(folder, trust_remote_code)), "the model's own"
        if template and "default" not in template:
            raise MoultError(
                f"{folder}: the model has chat templates named {some(sorted(template))}, and none is the default",
                "set model.chat_template to one of these names, to chatml (the shipped one), or to a Jinja file",
            )
        if len(template) < 2:
            template = template.get("default")
    else:
        template, origin = _named_template(folder, setting, shipped, trust_remote_code)
    texts = template if isinstance(template, dict) else {} if template is None else {"": template}
    for name, text in texts.items():
        check_syntax(text, f"{origin}: {name}" if name else origin)
    log.debug("chat template (%s), sha256 %s", origin, template_sha256(template))
    return template, origin


def _named_template(folder: str, setting: str, shipped: str, trust_remote_code: bool) -> tuple[str, str]:
    path = Path(shipped) / f"{setting}.jinja"
    if path.exists():
        return read_text(path), f"shipped: {setting}"
    path = Path(setting).expanduser()
    if path.is_file():
        return read_text(path), f"file: {path.name}"
    own = own_templates(folder, load_tokenizer(folder, trust_remote_code))
    if setting in own:
        return own[setting], f"the model's own: {setting}"
    known = some(sorted(file.stem for file in Path(shipped).glob("*.jinja")))
    raise MoultError(
        f"model.chat_template: {setting}: no such file",
        f"give a Jinja file, or one of the shipped: {known}"
        + (f", or one of the model's own: {some(sorted(own))}" if len(own) > 1 else ""),
    )


def template_sha256(template: Template | None) -> str:
    """What identifies the template, or all of them together. Without one that of the empty text."""
    return sha256_text(canonical(template) if isinstance(template, dict) else template or "")


def check_syntax(text: str, origin: str) -> None:
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        _compile_jinja_template(text)
    except (TemplateSyntaxError, SyntaxError) as error:  # the latter for {% break %} outside of a loop
        message = getattr(error, "message", None) or getattr(error, "msg", "")
        raise MoultError(f"chat template ({origin}), line {error.lineno}: {message}", "fix the template") from None
