"""A conversation as the model reads it: one template, one tokenizer, the same in training and at inference."""

import contextlib
import logging
import re
import signal
import unicodedata
from collections.abc import Iterator
from datetime import date
from pathlib import Path

from moult.errors import MoultError, some
from moult.files import sha256_text
from moult.model.tokenizer import load_tokenizer, stop_ids

log = logging.getLogger("moult")

# Templates that print today's date (strftime_now) would make other tokens each day.
TEMPLATE_DATE = date(2026, 1, 1)

# Seconds of the processor's time for one rendering, which takes milliseconds.
TEMPLATE_SECONDS = 5


class Unrenderable(Exception):
    """A row that the template cannot show as it is. `reason` names the report's entry."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class Chat:
    """A tokenizer with its template.

    Args:
        folder: the model's folder.
        template: the template's text, or None for plain text only.
        template_kwargs: variables for the template, such as {"enable_thinking": False}.

    Attributes:
        tokenizer: the tokenizer, of transformers.
        stop_ids: the tokens that end generation by the model's own settings.
        special_ids: the tokenizer's control tokens; `special_text` finds them in text.
        pad_id: the padding token: neither a stop token nor written by the template.
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
        self.special_text = re.compile("|".join(map(re.escape, specials)) or r"(?!)")
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

    def generation_blocks(self, messages: list[dict], tools: list[dict] | None) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and where in it (begin, end) the template's `{% generation %}` blocks are."""
        from transformers.utils.chat_template_utils import render_jinja_template

        with _time_limit():
            [through], [blocks] = render_jinja_template(
                [_visible(messages)],
                tools=tools,
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **self.template_kwargs},
            )
        return through, blocks

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

    def lost_characters(self, text: str) -> str:
        """The characters of `text` that the tokenizer has no tokens for and silently leaves out."""
        for char in set(text) - self._written - self._lost:
            decoded = self.decode(self.ids(f"a{char}"), special=False)
            (self._written if char.isspace() or nfd(char) in nfd(decoded) else self._lost).add(char)
        return "".join(char for char in text if char in self._lost) if self._lost else ""


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


def nfd(text: str) -> str:
    """One spelling of characters that have several: many tokenizers compose them (Qwen: NFC)."""
    return unicodedata.normalize("NFD", text)


def _freeze_date(template: str) -> None:
    if "strftime_now" in template:
        # The template's variables are made plain data on their way in, so a function can only get there as a global.
        from transformers.utils.chat_template_utils import _compile_jinja_template

        _compile_jinja_template(template).environment.globals["strftime_now"] = TEMPLATE_DATE.strftime


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
