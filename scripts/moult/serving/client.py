"""What a server under test is asked, and how."""

import time
from dataclasses import dataclass, field
from datetime import datetime

# Seconds that an answer may take.
REQUEST_TIMEOUT = 600


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
    prompt_tokens, tokens: how many tokens the server counts in the prompt and in the answer.
    begun, seconds: when it was asked, by the clock of this machine, and how long the answer took.
    """

    text: str
    ids: list[int] | None
    reason: str
    prompt_tokens: int
    tokens: int
    begun: datetime
    seconds: float


class Client:
    """Asks the server at `url` for its model `name`, with the API key `key` if it wants one."""

    def __init__(self, url: str, key: str | None, name: str):
        self.url, self.key, self.name = url, key, name

    def wait(self) -> float:
        """For a server that runs already, which may just be starting."""
        import requests

        started = time.monotonic()
        while time.monotonic() - started < 10:
            try:
                if self.send("/health").status_code == 200:
                    return time.monotonic() - started
            except requests.ConnectionError:
                pass
            time.sleep(0.5)
        raise Failed(f"nothing answers at {self.url}/health")

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
        """The path and body that ask a question greedily: no default of the server's gets in between."""
        body = {
            "model": self.name,
            "max_tokens": max(1, len(question.token_ids)),
            "temperature": 0,
            "repetition_penalty": 1.0,
            "seed": 0,
            "return_token_ids": True,
        }
        if question.messages is None:
            return "/v1/completions", {**body, "prompt": question.prompt_ids}
        return "/v1/chat/completions", {**body, **conversation(question, question.variables)}

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
            prompt_tokens=answer["usage"]["prompt_tokens"],
            tokens=answer["usage"]["completion_tokens"],
            begun=begun,
            seconds=time.monotonic() - started,
        )

    def tokens_of(self, question: Question, variables: dict) -> list[int] | None:
        """The tokens that the server makes of a question's messages; None if it does not tell."""
        response = self.send("/tokenize", {"model": self.name, **conversation(question, variables)})
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
