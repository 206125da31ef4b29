"""What a server under test is asked, and how."""

import time
from dataclasses import dataclass, field, replace
from datetime import datetime

# Seconds that an answer may take.
REQUEST_TIMEOUT = 600

# What llama.cpp's server is told besides: its word for the penalty; reasoning stays in the text, as evaluate keeps it; and what
# is left in its cache, which may round otherwise, is not used.
OF_LLAMA_CPP = {"repeat_penalty": 1.0, "reasoning_format": "none", "cache_prompt": False}


class Failed(Exception):
    """A check that does not hold, and why."""


@dataclass(frozen=True)
class Question:
    """What evaluate has asked the model, what it has measured, and how a server is asked the same.

    kind, id: `prompt` or `row`, and its name.
    prompt_ids, prompt_nll: tokens of the prompt, and how likely the model finds them, in nats, summed.
    answer, token_ids, margins: the answer as text and as tokens, and by how many nats the best token led at each.
    stopped: whether the answer ended with a stop token.
    messages: the prompt as a conversation; None for a prompt that is tokens only, of a model without a chat template.
    expect: the checks of eval.prompts.
    prints_date: the template prints today's date in it, and printed FROZEN_DATE when it was measured.
    variables: of the template, with which it prints the measured prompt on any day.
    """

    kind: str
    id: str
    prompt_ids: list[int]
    prompt_nll: float
    answer: str
    token_ids: list[int]
    margins: list[float]
    stopped: bool
    messages: list[dict] | None = None
    expect: dict = field(default_factory=dict)
    prints_date: bool = False
    variables: dict = field(default_factory=dict)

    @property
    def asked_as_measured(self) -> bool:
        """Whether the server answers the measured prompt, and not one with another date."""
        return bool(self.variables) or not self.prints_date


@dataclass(frozen=True)
class Reply:
    """What a server has answered.

    text, ids: the answer, as tokens too if the server tells them.
    reason: why it ended.
    prompt_tokens, tokens: how many tokens the server counts in the prompt (None if it does not tell) and in the answer.
    begun, seconds: when it was asked, by the clock of this machine, and how long the answer took.
    """

    text: str
    ids: list[int] | None
    reason: str
    prompt_tokens: int | None
    tokens: int
    begun: datetime
    seconds: float


class Client:
    """Asks the server at `url` for its model `name`, with the API key `key` if it wants one.

    `llama_cpp`: whether it is llama.cpp's server, which has paths of its own for tokens. `models` finds out.
    """

    def __init__(self, url: str, key: str | None, name: str):
        self.url, self.key, self.name = url, key, name
        self.llama_cpp = False

    def wait(self) -> float:
        """For a server that runs already, which may just be starting."""
        import requests

        started = time.monotonic()
        while time.monotonic() - started < 10:
            try:
                if self.healthy():
                    return time.monotonic() - started
            except requests.ConnectionError:
                pass
            time.sleep(0.5)
        raise Failed(f"nothing answers at {self.url}/health")

    def healthy(self) -> bool:
        """Whether it can be asked. Ollama has no /health."""
        status = self.send("/health").status_code
        return status == 200 or (status == 404 and self.send("/v1/models").status_code == 200)

    def models(self) -> dict[str, dict]:
        """{name in the API: what the server says of it}."""
        listed = {entry["id"]: entry for entry in self.ask("/v1/models")["data"]}
        self.llama_cpp = any(entry.get("owned_by") == "llamacpp" for entry in listed.values())
        return listed

    def send(self, path: str, body: dict | None = None, key: str | None = None, stream: bool = False):
        import requests

        key = self.key if key is None else key
        with requests.Session() as session:
            session.trust_env = False  # no proxy, and no login of ~/.netrc in place of the key
            return session.request(
                "GET" if body is None else "POST",
                self.url + path,
                json=body,
                headers={"Authorization": f"Bearer {key}"} if key else {},
                timeout=REQUEST_TIMEOUT,
                stream=stream,
            )

    def ask(self, path: str, body: dict | None = None) -> dict:
        """The JSON of an answer that is not refused."""
        return accepted(self.send(path, body)).json()

    def request_of(self, question: Question) -> tuple[str, dict]:
        """The path and body that ask a question greedily."""
        body = self.greedily(max(1, len(question.token_ids)))
        if question.messages is None:
            return "/v1/completions", {**body, "prompt": question.prompt_ids}
        return "/v1/chat/completions", {**body, **conversation(question, question.variables)}

    def greedily(self, max_tokens: int) -> dict:
        """The fields that ask for a greedy answer: no default of the server's gets in between."""
        own = OF_LLAMA_CPP if self.llama_cpp else {"repetition_penalty": 1.0, "return_token_ids": True}
        return {"model": self.name, "max_tokens": max_tokens, "temperature": 0, "seed": 0, **own}

    def answer(self, prompt: list[int], max_tokens: int) -> Reply:
        """The greedy answer to a prompt of exactly these tokens, with its tokens, a stop token included. Raises Failed if the
        server does not tell them."""
        begun, started = datetime.now(), time.monotonic()
        body = {**self.greedily(max_tokens), "prompt": prompt}
        if self.llama_cpp:  # only its own path tells tokens
            answer = self.ask("/completion", {**body, "n_predict": max_tokens, "return_tokens": True})
            text, ids = answer["content"], answer["tokens"]
            reason = "stop" if answer["stop_type"] in ("eos", "word") else "length"
        else:
            choice = self.ask("/v1/completions", body)["choices"][0]
            text, ids, reason = choice["text"], choice.get("token_ids"), choice["finish_reason"]
        if not isinstance(ids, list):
            raise Failed("the server does not tell the tokens of an answer")
        return Reply(text, ids, reason, len(prompt), len(ids), begun, time.monotonic() - started)

    def with_ids(self, question: Question, reply: Reply) -> Reply:
        """The reply with its tokens where llama.cpp's server, which tells only text in a chat, gives another answer than the
        measured one: it is asked for the measured prompt's, which has this text if the chat made that prompt."""
        if not self.llama_cpp or reply.ids is not None or reply.text == question.answer:
            return reply
        again = self.answer(question.prompt_ids, max(1, len(question.token_ids)))
        return replace(reply, ids=again.ids) if again.text.strip() == reply.text.strip() else reply

    def reply(self, question: Question) -> Reply:
        begun, started = datetime.now(), time.monotonic()
        answer = self.ask(*self.request_of(question))
        choice = answer["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        if not isinstance(text, str):
            raise Failed(f"no text in an answer: {choice!r:.200}")
        return Reply(
            text=text,
            ids=choice.get("token_ids"),
            reason=choice["finish_reason"],
            prompt_tokens=answer["usage"].get("prompt_tokens"),
            tokens=answer["usage"]["completion_tokens"],
            begun=begun,
            seconds=time.monotonic() - started,
        )

    def tokens_of(self, question: Question, variables: dict) -> list[int] | None:
        """The tokens that the server makes of a question's messages; None if it does not tell."""
        said = conversation(question, variables)
        if self.llama_cpp:  # to /tokenize with messages it answers no tokens
            prompt = self.ask("/apply-template", said)["prompt"]
            # As its chats do: a BOS token that the tokenizer adds is not in this text.
            return self.ask("/tokenize", {"content": prompt, "add_special": True, "parse_special": True})["tokens"]
        response = self.send("/tokenize", {"model": self.name, **said})
        if response.status_code in (404, 405):
            return None
        return accepted(response).json()["tokens"]


def conversation(question: Question, variables: dict) -> dict:
    """The fields of a request that say a question's messages."""
    return {"messages": question.messages, **({"chat_template_kwargs": variables} if variables else {})}


def accepted(response):
    """A response that is none of an error. Raises Failed."""
    if response.status_code != 200:
        raise Failed(f"{response.request.path_url} answers {response.status_code}: {response.text[:200]}")
    return response


def refused(response, *wanted: int) -> str:
    if response.status_code not in wanted:
        codes = " or ".join(map(str, wanted))
        raise Failed(f"answered {response.status_code}, and should be refused with {codes}: {response.text[:200]}")
    return f"refused with {response.status_code}"
