"""The checks of a server under test. scripts/smoke_test.py says what each is for."""

import json
import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path

from moult.errors import MoultError
from moult.files import write_json
from moult.measuring.checks import check
from moult.model.chat import FROZEN_DATE, Chat
from moult.serving.client import Client, Failed, Question, Reply, accepted, refused
from moult.serving.launch import Server

# Requests at once.
AT_ONCE = 8

# Formats whose answers are the merged model's, but where the best token led by no more than LEAD nats: llama.cpp computes in
# bfloat16 or 8 bits. On the demo 104 (gguf-bf16) and 103 (gguf-q8_0) of 105 answers are the same; the others part at near ties.
EXACT, LEAD = ("gguf-bf16", "gguf-q8_0", "adapter-gguf"), 0.5

# How a server says that it has not got what was asked for. Of one that is busy (429) or wants a key (401) nothing follows.
UNSUPPORTED = (400, 404, 405, 422, 501)


class CannotTell(Exception):
    """A check that this server has no means for, and why."""


@dataclass(frozen=True)
class CheckResult:
    """passed: true, false, or None where the server cannot tell. why: what was seen."""

    passed: bool | None
    why: str


@dataclass(frozen=True)
class Parting:
    """Where a served answer leaves the measured one.

    at: index of the first token that differs, None if the server tells only text. measured, served: the two tokens.
    lead: by how many nats the best one led there. near_tie: whether that is within the tolerance.
    """

    at: int | None
    measured: int | None
    served: int | None
    lead: float | None
    near_tie: bool


class ServerTest:
    """One server under test. After `run` it has `checks`, `answers` and `speed`, as they go into the result.

    Args:
        client: asks the server.
        questions: what it is asked.
        lead, drift: tolerances, in nats (scripts/smoke_test.py: TOLERANCE). Infinite for a model that is not the measured one,
            but near it: its answers may differ anywhere.
        chat: renders the conversations that show today's date; None if there are none.

    `server` is the process, if it is this one's own.
    """

    def __init__(self, client: Client, questions: list[Question], lead: float, drift: float, chat: Chat | None = None):
        self.client, self.questions = client, questions
        self.lead, self.drift, self.chat = lead, drift, chat
        self.server: Server | None = None
        self.checks: dict[str, CheckResult] = {}
        self.answers: list[dict] = []
        self.speed: dict | None = None
        self.replies: list[Reply] = []
        self.max_model_len: int | None = None

    def run(self, wait: Callable[[], float], log) -> None:
        """All checks, as soon as `wait` says after how many seconds the server is ready."""
        if not self.check("ready", lambda: f"after {wait():.1f} s", log):
            return
        for name, act in (
            ("models", self.check_models),
            ("answers", self.check_answers),
            ("prompt_tokens", self.check_prompt_tokens),
            ("expectations", self.check_expectations),
            ("stop_reasons", self.check_stop_reasons),
            ("likelihood", self.check_likelihood),
            ("streaming", self.check_streaming),
            ("concurrency", self.check_concurrency),
            ("wrong_model", self.check_wrong_model),
            ("too_long", self.check_too_long),
            ("api_key", self.check_api_key),
            ("alive", self.check_alive),
        ):
            self.check(name, act, log)

    def check(self, name: str, act: Callable[[], str], log) -> bool:
        """Run a check and record it; whatever a broken server does is its failure, not ours."""
        import requests

        try:
            if name != "ready" and self.server and self.server.ended():
                raise Failed(f"not reached: the server has ended with {self.server.end()}")
            result = CheckResult(True, act())
        except CannotTell as reason:
            result = CheckResult(None, str(reason))
        except (Failed, MoultError) as reason:
            result = CheckResult(False, str(reason))
        except (requests.JSONDecodeError, LookupError, TypeError, ValueError, AttributeError) as error:
            why = f"it answers what it should not ({type(error).__name__}: {str(error)[:200]})"
            result = CheckResult(False, why)
        except requests.RequestException as error:
            result = CheckResult(False, f"the connection failed ({type(error).__name__}){self.obituary()}")
        self.checks[name] = result
        word = {True: "ok", False: "FAIL", None: "-"}[result.passed]
        log.info("%-4s  %-14s %s", word, name, result.why.split("\n")[0])
        return result.passed is not False

    def obituary(self) -> str:
        """What the server has left, if it has ended. A connection breaks a moment before its process is gone."""
        deadline = time.monotonic() + 1
        while self.server and time.monotonic() < deadline:
            if self.server.ended():
                return f"; the server has ended with {self.server.end()}. Its last lines:\n{self.server.tail()}"
            time.sleep(0.05)
        return ""

    def keep(self, result: dict, path: str, holds: str, fix: str, log) -> None:
        """Write a result with its checks. Raises MoultError if one has failed: then the file is <name>.failed.json.

        holds: what is so if none has. fix: what to do if one has, with {kept} for that file.
        """
        failed = [name for name, check in self.checks.items() if check.passed is False]
        result = {**result, "checks": {name: asdict(check) for name, check in self.checks.items()}}
        kept = Path(path).with_suffix(".failed.json")
        if failed:
            # In its place it would count as done the next time. Snakemake removes what is there, and nothing beside it.
            Path(path).unlink(missing_ok=True)
            write_json(kept, result)
            reasons = "".join(f"\n  - {name}: {self.checks[name].why}" for name in failed)
            raise MoultError(
                f"{len(failed)} of {len(self.checks)} checks failed:{reasons}", fix.replace("{kept}", str(kept))
            )
        write_json(path, result)
        kept.unlink(missing_ok=True)
        passed = [check.passed for check in self.checks.values()]
        log.info("%s: %d checks hold, %d could not be told", holds, passed.count(True), passed.count(None))

    # --- served against measured ---

    def parting(self, question: Question, reply: Reply) -> Parting | None:
        """Where the served answer leaves the measured one; None if it does not, or if another prompt was answered."""
        if not question.asked_as_measured:
            return None
        anywhere = math.isinf(self.lead)
        if reply.ids is None:
            return None if reply.text == question.answer else Parting(None, None, None, None, anywhere)
        ours, theirs = question.token_ids, reply.ids
        if ours == theirs:
            return None
        at = first_difference(ours, theirs)
        measured, served = (ids[at] if at < len(ids) else None for ids in (ours, theirs))
        lead = question.margins[at] if at < len(question.margins) else None
        return Parting(at, measured, served, lead, anywhere or (lead is not None and lead <= self.lead))

    def may_differ(self, question: Question, reply: Reply) -> bool:
        """Whether what follows from the answer may be other than measured."""
        parting = self.parting(question, reply)
        return not question.asked_as_measured or (parting is not None and parting.near_tie)

    def held_against(self, questions: list[Question], replies: list[Reply]) -> str:
        """How many answers are the measured ones. Fails where one is not, near ties aside."""
        pairs = [pair for pair in zip(questions, replies, strict=True) if pair[0].asked_as_measured]
        if not pairs:
            raise CannotTell(OTHER_DATE)
        partings = [(*pair, parting) for pair in pairs if (parting := self.parting(*pair))]
        differ = [found for found in partings if not found[-1].near_tie]
        if differ:
            question, reply, parting = differ[0]
            place = f"from token {parting.at} on" if parting.at is not None else "in the text"
            lead = f", where the measured one led by {parting.lead:g} nats" if parting.lead is not None else ""
            raise Failed(
                f"{len(differ)} of {len(pairs)} differ, first {question.id} {place}{lead}: "
                f"measured {question.answer!r:.80}, served {reply.text!r:.80}"
            )
        ties, others = len(partings), len(replies) - len(pairs)
        if ties == len(pairs) and not math.isinf(self.lead):
            raise CannotTell(f"none of {ties} the same: each parts at a near tie")
        return (
            f"{len(pairs) - ties} of {len(pairs)} the same"
            + (
                f", {ties} {'are others, as they may be' if math.isinf(self.lead) else 'part at a near tie'}"
                if ties
                else ""
            )
            + (f"; {others} cannot be compared: {OTHER_DATE}" if others else "")
        )

    def possible_prompts(
        self, question: Question, variables: dict, begun: datetime, ended: datetime
    ) -> list[list[int]]:
        """The tokens that a server may make of a question in this time: several where the template prints the date."""
        chat, messages = self.chat, question.messages
        if not question.prints_date or variables or chat is None or messages is None:
            return [question.prompt_ids]
        prompts = []
        for moment in clocks(begun, ended):
            with chat.on(moment):
                prompts.append(chat.prompt_ids(messages))
        return prompts

    def tells_tokens(self, question: Question, variables: dict) -> bool:
        """Whether the server tells its tokens of a question. Fails where they are not ours."""
        if question.messages is None:
            return False
        begun = datetime.now()
        ids = self.client.tokens_of(question, variables)
        if ids is None:
            return False
        possible = self.possible_prompts(question, variables, begun, datetime.now())
        if ids not in possible:
            raise Failed(
                f"{question.id}: the server makes {len(ids)} tokens of it, evaluate made {len(possible[0])}; "
                f"they differ from token {first_difference(possible[0], ids)} on"
            )
        return True

    # --- checks, each says what it has seen ---

    def check_models(self) -> str:
        listed = self.client.models()
        # Ollama lists a name with its tag, and knows it without.
        if not {self.client.name, f"{self.client.name}:latest"} & set(listed):
            raise Failed(f"no {self.client.name}, but {', '.join(map(str, listed)) or 'nothing'}")
        # vLLM tells it of the base only, not of the adapters.
        self.max_model_len = next(filter(None, map(length_of, listed.values())), None)
        return ", ".join(listed)

    def check_answers(self) -> str:
        self.replies = [self.client.with_ids(question, self.client.reply(question)) for question in self.questions]
        for question, reply in zip(self.questions, self.replies, strict=True):
            parting = self.parting(question, reply)
            self.answers.append(
                {
                    "kind": question.kind,
                    "id": question.id,
                    "answer": question.answer,
                    "served": reply.text,
                    "finish_reason": reply.reason,
                    "asked_as_measured": question.asked_as_measured,
                    "parting": asdict(parting) if parting else None,
                }
            )
        return self.held_against(self.questions, self.replies)

    def check_prompt_tokens(self) -> str:
        by_count = unknown = dated = 0
        for number, question in enumerate(self.questions):
            told = self.tells_tokens(question, question.variables)
            if question.variables:
                self.tells_tokens(question, {})  # as everybody else will ask it
            if not self.replies:
                if not told:
                    raise Failed("the server tells no token ids, and has given no answer to count by")
                continue
            reply = self.replies[number]
            possible = self.possible_prompts(
                question, question.variables, reply.begun, reply.begun + timedelta(seconds=reply.seconds)
            )
            if reply.prompt_tokens is None:
                unknown += not told
                continue
            if reply.prompt_tokens not in map(len, possible):
                raise Failed(
                    f"{question.id}: the server counts {reply.prompt_tokens} tokens, evaluate {len(possible[0])}"
                )
            by_count += not told
            dated += question.prints_date
        if unknown:
            raise CannotTell(f"of {unknown} of {len(self.questions)} the server tells neither tokens nor their number")
        return (
            f"{len(self.questions)} the same"
            + (f", {by_count} by their number only" if by_count else "")
            + (f", {dated} with the server's date" if dated else "")
        )

    def check_expectations(self) -> str:
        self.need_replies()
        passed = asked = others = 0
        for question, reply in zip(self.questions, self.replies, strict=True):
            if not question.expect:
                continue
            if not question.asked_as_measured:
                others += 1
                continue
            asked += 1
            measured, served = (check(text, question.expect) for text in (question.answer, reply.text))
            passed += all(served.values())
            worse = [name for name in served if measured[name] and not served[name]]
            if worse and not self.may_differ(question, reply):
                raise Failed(f"{question.id}: {', '.join(worse)} held at evaluate; served {reply.text!r:.80}")
        if not asked:
            raise CannotTell(OTHER_DATE if others else "no prompt has checks (eval.prompts: expect)")
        return f"{passed} of {asked} prompts pass"

    def check_stop_reasons(self) -> str:
        self.need_replies()
        if not any(question.asked_as_measured for question in self.questions):
            raise CannotTell(OTHER_DATE)
        pairs = list(zip(self.questions, self.replies, strict=True))
        alike = [(question, reply) for question, reply in pairs if not self.may_differ(question, reply)]
        if not alike:
            raise CannotTell("all answers are others than the measured ones")
        for question, reply in alike:
            wanted = "stop" if question.stopped else "length"
            if reply.reason != wanted:
                raise Failed(f"{question.id} ends with {reply.reason!r}, and at evaluate with {wanted!r}")
        stopped = sum(reply.reason == "stop" for reply in self.replies)
        return f"{stopped} of {len(self.replies)} end with stop"

    def check_likelihood(self) -> str:
        """Of the measured tokens, as they are: no template is in between."""
        if self.client.llama_cpp:
            raise CannotTell("llama.cpp's server does not tell how likely a prompt is")
        distance = tokens = 0.0
        for question in self.questions:
            ids = question.prompt_ids
            body = {"model": self.client.name, "prompt": ids, "echo": True, "logprobs": 0, "max_tokens": 0}
            response = self.client.send("/v1/completions", body)
            if self.server is None and response.status_code in UNSUPPORTED:
                raise CannotTell(f"the server does not tell how likely a prompt is ({response.status_code})")
            logprobs = accepted(response).json()["choices"][0].get("logprobs")
            if self.server is None and logprobs is None:
                raise CannotTell("the server does not tell how likely a prompt is")
            found = logprobs["token_logprobs"][: len(ids)]
            distance += abs(-sum(found[1:]) - question.prompt_nll)
            tokens += len(ids) - 1
        drift = distance / max(tokens, 1)
        if not drift <= self.drift:
            raise Failed(
                f"the prompts are {drift:.3g} nats per token from what evaluate measured, over {self.drift:g}: other weights"
            )
        return f"{drift:.2g} nats per token from the measured, over {tokens:.0f} tokens"

    def check_streaming(self) -> str:
        self.need_replies()
        path, body = self.client.request_of(self.questions[0])
        response = accepted(self.client.send(path, {**body, "stream": True}, stream=True))
        response.encoding = "utf-8"
        events = [line.removeprefix("data:").strip() for line in response.iter_lines(decode_unicode=True) if line]
        if events[-1:] != ["[DONE]"]:
            raise Failed("the stream does not end with [DONE]")
        choices = [choice for event in events[:-1] for choice in json.loads(event)["choices"]]
        text = "".join(
            (choice["delta"].get("content") or "") if "delta" in choice else choice["text"] for choice in choices
        )
        if text != self.replies[0].text:
            raise Failed(f"in pieces {text!r:.80}, in one {self.replies[0].text!r:.80}")
        reason = next((choice["finish_reason"] for choice in reversed(choices) if choice.get("finish_reason")), None)
        if reason != self.replies[0].reason:
            raise Failed(f"in pieces it ends with {reason!r}, in one with {self.replies[0].reason!r}")
        return f"{len(choices)} pieces"

    def check_concurrency(self) -> str:
        questions = [self.questions[index % len(self.questions)] for index in range(AT_ONCE)]
        started = time.monotonic()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            replies = list(pool.map(self.client.reply, questions))
        seconds = time.monotonic() - started
        replies = [self.client.with_ids(*pair) for pair in zip(questions, replies, strict=True)]
        latencies = sorted(reply.seconds for reply in replies)
        self.speed = {
            "requests": AT_ONCE,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(sum(reply.tokens for reply in replies) / seconds, 1),
            "latency_p50": round(statistics.median(latencies), 3),
            "latency_p95": round(statistics.quantiles(latencies, n=20, method="inclusive")[-1], 3),
        }
        return (
            f"{self.held_against(questions, replies)}; {self.speed['tokens_per_second']} tokens/s, "
            f"latency p50 {self.speed['latency_p50']} s, p95 {self.speed['latency_p95']} s"
        )

    def check_wrong_model(self) -> str:
        path, body = self.client.request_of(self.questions[0])
        response = self.client.send(path, {**body, "model": f"{self.client.name}-that-is-not-there"})
        if self.client.llama_cpp and response.status_code == 200:
            raise CannotTell("llama.cpp's server has one model, and serves it under any name")
        return refused(response, 400, 404, 422)

    def check_too_long(self) -> str:
        if not self.max_model_len:
            raise CannotTell("the server does not tell how long a prompt may be")
        path, body = self.client.request_of(self.questions[0])
        long = "long " * self.max_model_len
        said = {"messages": [{"role": "user", "content": long}]} if "messages" in body else {"prompt": long}
        return refused(self.client.send(path, {**body, **said}), 400, 413, 422)

    def check_api_key(self) -> str:
        if not self.client.key:
            raise CannotTell("the server wants no key")
        path, body = self.client.request_of(self.questions[0])
        for key in ("", "wrong"):
            answer = refused(self.client.send(path, body, key=key), 401, 403)
        return answer

    def check_alive(self) -> str:
        if not self.client.healthy():
            raise Failed("the server is not healthy after the test")
        return "healthy after the test"

    def need_replies(self) -> None:
        if not self.replies:
            raise Failed("no answers to look at")


OTHER_DATE = (
    f"the template prints today's date, has no variable for it, and printed {FROZEN_DATE} when the prompt was measured"
)


def tolerance_of_export(format: str) -> tuple[float, float]:
    """`lead` and `drift` of a ServerTest for an export."""
    return (LEAD if format in EXACT else math.inf), math.inf


def length_of(entry: dict) -> int | None:
    """How many tokens a model that a server lists takes, if it tells: vLLM and Moult's own in one place, llama.cpp in another."""
    return entry.get("max_model_len") or (entry.get("meta") or {}).get("n_ctx")


def clocks(begun: datetime, ended: datetime) -> list[datetime]:
    """What the clock of a server may have said in this time, which may hold a midnight; also in another time zone."""
    day = timedelta(days=1)
    return [begun, ended, begun - day, ended + day]


def first_difference(ours: list, theirs: list) -> int:
    """The first place where two lists differ; the end of the shorter one if they differ there."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
