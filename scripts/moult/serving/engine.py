"""The model behind the small server: its chat template, and one answer at a time."""

import contextlib
import inspect
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from moult.errors import MoultError
from moult.model.chat import Chat, Unrenderable, choose_template
from moult.model.device import limit_threads, load_model, pick
from moult.model.tokenizer import stop_ids, text_ids
from moult.serving.api import BadRequest, Options, checked_messages


@dataclass
class Answer:
    """What has been generated: tokens, text, and why it ended (`stop`, `length`)."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    reason: str = "length"


# Seconds. On a GPU a signal did not end the wait of the main thread (H100, Python 3.12.3): its handler would never run.
LOOK = 1


class MainThread:
    """Runs in the main thread what other threads ask for. Only there can a signal stop a template that loops."""

    def __init__(self):
        self.waiting: queue.SimpleQueue = queue.SimpleQueue()

    def call(self, function: Callable, *arguments):
        """The result of function(*arguments). Raises what it raises."""
        result: Future = Future()
        self.waiting.put((result, function, arguments))
        return result.result()

    def work(self) -> None:
        """Do what is asked for, for ever."""
        while True:
            try:
                result, function, arguments = self.waiting.get(timeout=LOOK)
            except queue.Empty:  # the handler of a signal has its turn
                continue
            try:
                result.set_result(function(*arguments))
            except Exception as error:  # it belongs to the thread that has asked
                result.set_exception(error)


class Engine:
    """A model with its chat template, and the one request that they are at work on.

    Args:
        model: the model's folder, and `name`, its name in the API.
        adapter: folder of an adapter on it, whose chat template and stop tokens are used; `adapter_name` in the API.
        max_model_len: the longest prompt and answer together, in tokens; None for as long as the model can.
        settings: the config's model section.
    """

    def __init__(
        self,
        model: str,
        name: str,
        adapter: str | None,
        adapter_name: str | None,
        max_model_len: int | None,
        settings: dict,
    ):
        self.folder, self.adapter, self.longest = model, adapter, max_model_len
        self.settings = {"dtype": "bfloat16", "attn_implementation": None, "trust_remote_code": False, **settings}
        self.name = adapter_name or name
        self.names = [name, *([self.name] if adapter else [])]
        self.ready = threading.Event()
        self.created = int(time.time())
        self.generating = threading.Lock()
        self.main_thread = MainThread()

    def load(self) -> None:
        """Load everything; then it is `ready`. Raises MoultError."""
        from transformers import PreTrainedTokenizerBase

        limit_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        own, trusted = self.adapter or self.folder, self.settings["trust_remote_code"]
        template, _ = choose_template(own, None, "", trusted)
        # What plain transformers renders of the folder: a template that prints the date prints today's.
        self.chat = Chat(own, template, self.settings.get("chat_template_kwargs"), trusted, date=None)
        self.not_of_template = {"messages", "conversations"}
        for owner in (self.chat.tokenizer, PreTrainedTokenizerBase):
            self.not_of_template |= set(inspect.signature(owner.apply_chat_template).parameters)
        has_config = Path(own, "generation_config.json").exists()
        self.stop_ids = stop_ids(own if has_config else self.folder, self.chat.tokenizer)
        self.model = load_model(self.folder, pick(), self.settings).eval()
        if self.adapter:
            from peft import PeftModel

            self.model = PeftModel.from_pretrained(self.model, self.adapter).eval()
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.max_model_len = min(filter(None, (self.longest, positions)), default=2**20)
        self.ready.set()

    # --- prompts ---

    def prompt_ids(self, body: dict, chat: bool) -> list[int]:
        """The tokens of a request's messages or prompt. Raises BadRequest."""
        return self.main_thread.call(self._chat_ids if chat else self._text_ids, body)

    def _chat_ids(self, body: dict) -> list[int]:
        messages = checked_messages(body.get("messages"))
        variables = self._variables_of(body.get("chat_template_kwargs"))
        if not self.chat.template:
            raise BadRequest("the model has no chat template; ask /v1/completions")
        try:
            text = self.chat.render(messages, None, body.get("add_generation_prompt", True), variables)
        except (Unrenderable, MoultError) as error:
            raise BadRequest(str(error)) from None
        return self.chat.ids(text)

    def _text_ids(self, body: dict) -> list[int]:
        prompt = body.get("prompt")
        if isinstance(prompt, str):
            return text_ids(self.chat.tokenizer, prompt)
        size = self.model.config.get_text_config().vocab_size
        if not isinstance(prompt, list) or not all(type(id) is int and 0 <= id < size for id in prompt):
            raise BadRequest("prompt: expected a text, or a list of token ids of this model")
        return prompt

    def _variables_of(self, given) -> dict:
        """A request's variables for the template. What apply_chat_template itself takes is none: a request could bring a
        template of its own, which need never end, and nobody else would be answered."""
        if given is None:
            return {}
        if not isinstance(given, dict):
            raise BadRequest("chat_template_kwargs: expected an object")
        for name, value in given.items():
            if name in self.not_of_template:
                raise BadRequest(f"chat_template_kwargs: {name} is not a variable of a template")
            if not isinstance(value, str | int | float | bool | None):
                raise BadRequest(f"chat_template_kwargs: {name:.80}: expected a text, a number, true, false or null")
        return given

    # --- answers ---

    def generate(self, ids: list[int], options: Options, adapted: bool, tell) -> Answer:
        """Answer a prompt. `tell` gets each new piece of text, and may raise to end it."""
        import torch
        from transformers import GenerationConfig

        answer, told = Answer(), 0
        hold = max((len(stop) for stop in options.stop), default=1) - 1

        def add(token: int) -> None:
            nonlocal told
            answer.ids.append(token)
            if token in self.stop_ids:
                answer.reason = "stop"
            else:
                answer.text = self.chat.decode(answer.ids, special=False)
            at = min((answer.text.find(stop) for stop in options.stop if stop in answer.text), default=-1)
            if at >= 0:
                answer.text, answer.reason = answer.text[:at], "stop"
            # What may still become a stop text, or the rest of a character, is held back.
            end = len(answer.text) if answer.reason == "stop" else len(answer.text.rstrip("\ufffd")) - hold
            if end > told:
                tell(answer.text[told:end])
                told = end

        class Streamer:
            """transformers gives it the prompt, then each token."""

            started = False

            def put(self, value) -> None:
                if self.started:
                    add(value.tolist()[0])
                self.started = True

            def end(self) -> None:
                pass

        def stopped(input_ids, scores, **others):
            return torch.full((1,), answer.reason == "stop", device=input_ids.device)

        sampling = {}
        if options.temperature > 0:
            sampling = {"temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
        # Not the model's own generation config: what the request leaves out has OpenAI's defaults.
        config = GenerationConfig(
            do_sample=bool(sampling),
            max_new_tokens=options.max_tokens,
            eos_token_id=sorted(self.stop_ids),
            pad_token_id=0,
            use_cache=True,
            **sampling,
        )
        with self.generating, self._adapter(adapted), torch.inference_mode():
            torch.manual_seed(options.seed if options.seed is not None else time.time_ns() % 2**63)
            prompt = torch.tensor([ids], device=self.model.device)
            self.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=config,
                streamer=Streamer(),
                stopping_criteria=[stopped],
            )
        if told < len(answer.text):
            tell(answer.text[told:])
        return answer

    def logprobs(self, ids: list[int], adapted: bool) -> list[float | None]:
        """How likely the model finds each token of a prompt; the first follows nothing."""
        import torch

        with self.generating, self._adapter(adapted), torch.inference_mode():
            logits = self.model(input_ids=torch.tensor([ids], device=self.model.device)).logits[0, :-1].float()
            targets = torch.tensor(ids[1:], device=logits.device).unsqueeze(1)
            return [None, *logits.log_softmax(-1).gather(1, targets).squeeze(1).tolist()]

    def _adapter(self, adapted: bool):
        return contextlib.nullcontext() if adapted or not self.adapter else self.model.disable_adapter()
