"""Ask a server what evaluate asked the model: is what is served what was measured?

    python scripts/smoke_test.py --run demo                                      # starts a server, tests it, stops it
    python scripts/smoke_test.py --run demo --base-url http://127.0.0.1:8080     # tests one that runs
    python scripts/smoke_test.py --run demo --configfile mine.yaml

The rule smoke_test gives all paths and settings; by hand they come from the config. The server is this process's own: it
listens on a free port of this machine, wants a key that nobody else knows, and is gone when this ends. All of
eval.prompts and some validation rows go through the API, and what comes back is held against results/<run>/tuned:

ready, models        the server gets ready in time, and has the model by its name
files                the folder is what merge (finetune) wrote
prompt_tokens        the server makes the same token ids of the messages: /tokenize, or else the counts in `usage`
answers              greedy answers are the same. They may part where the best token led by little (TOLERANCE): there,
                     another kernel or batch may go on with the other one
expectations         what passed its checks (`expect`) at evaluate passes them served
stop_reasons         `stop` where evaluate saw a stop token, `length` where it did not
likelihood           the prompts are as likely to the served weights as to the measured ones, where the server can tell
streaming            the same answer in pieces, to the end
concurrency          eight at once get the same answers
wrong_model, too_long, api_key    each is refused with a 4xx

The result is a JSON with `passed` of each check: true, false, or null where the server cannot tell. Exit code 1 if one failed.
"""

import json
import os
import secrets
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moult.errors import MoultError
from moult.files import read_json, read_jsonl, sha256_folder, write_json
from moult.measuring.checks import check
from moult.model.manifest import open_model
from moult.run.cli import stage_parser
from moult.run.stage import stage
from moult.serving.launch import Server, address, engine_command, free_port, what_to_serve

# Validation rows that are asked besides eval.prompts, and requests at once.
ROWS = 8
AT_ONCE = 8

# By the coarser dtype of evaluate and server, in nats: by how much the best token may have led where a served answer
# leaves the measured one (bfloat16 has 8 bits: a logit of 20 comes in steps of 0.125), and how far the prompts' likelihood
# per token may be from the measured one. On the demo vLLM is 1e-7 from it in float32 and 1e-3 in bfloat16; the same run
# with another seed, which gives the very same answers, is 5e-2 away.
TOLERANCE = {"float32": (0.01, 0.001), "float16": (0.1, 0.005), "bfloat16": (0.5, 0.02)}

# How a server says that it has not got what was asked for. Of one that is busy (429) or wants a key (401) nothing follows.
UNSUPPORTED = (400, 404, 405, 422, 501)

# Seconds that an answer may take.
REQUEST_TIMEOUT = 600


def main() -> None:
    parser = stage_parser(__doc__, "smoke_test", optional=True)
    parser.add_argument("--run", required=True, help="name of the run")
    parser.add_argument("--base-url", help="a server that runs already, with or without /v1")
    parser.add_argument(
        "--configfile", nargs="+", default=[], help="by hand: config files laid over config/config.yaml"
    )
    parser.add_argument("--answers", help="answers.jsonl of the tuned model")
    parser.add_argument("--merge-check", help="merge_check.json of the tuned model: the dtype of its measurement")
    parser.add_argument("--rows", help="val.jsonl: the validation rows' messages")
    parser.add_argument("--base", help="manifest or folder of the base model")
    parser.add_argument("--adapter", help="adapter folder")
    parser.add_argument("--merged", help="merged model's folder")
    parser.add_argument("--merge", help="merge.json: hashes of the two folders")
    parser.add_argument("--plan", help="plan.json")
    parser.add_argument("--result", help="JSON to write")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of the server")
    args = parser.parse_args()

    with stage("smoke_test", args.log_file, args.settings) as log:
        args.key = None
        if not args.settings:
            fill_in(args)
        smoke_test(args, log)


def fill_in(args) -> None:
    """By hand: settings and paths from the config."""
    from moult.workflow.runtime import read_config, the_run
    from moult.workflow.stages import places_of, stage_settings

    config = read_config(args.configfile)
    places = places_of(config, the_run(config, args.run))
    args.settings = stage_settings(config, "smoke_test", args.run)
    args.key = os.environ.get(config["runs"][args.run]["serve"]["api_key_env"])
    args.answers, args.merge_check, args.rows = places.tuned_answers, places.merge_check, places.val_rows
    args.base, args.adapter, args.merged = places.model, places.adapter, places.merged
    args.merge, args.plan = places.merge_summary, places.plan
    args.result = args.result or places.smoke_test


def smoke_test(args, log) -> None:
    settings = args.settings
    base = str(open_model(args.base)[0]) if Path(args.base).is_file() else args.base
    run = {"name": args.run, "merged": args.merged, "adapter": args.adapter, "base": base, "plan": args.plan}
    served = what_to_serve(settings, [run])
    chat = Path(args.adapter, "chat_template.jinja").exists()
    questions = read_questions(args.answers, args.rows, settings["eval"]["prompts"], chat)
    measured_in = read_json(args.merge_check)["dtype"]
    name = next(iter(served.adapters), served.name)
    result = {
        "schema_version": 1,
        "run": args.run,
        "engine": settings["serve"]["engine"] if not args.base_url else None,
        "serves": "adapter" if served.adapters else "merged",
        "model": name,
        "tolerance": dict(
            zip(("lead", "likelihood"), tolerance(settings, measured_in, bool(served.adapters)), strict=True)
        ),
    }
    if args.base_url:
        url = args.base_url if "://" in args.base_url else f"http://{args.base_url}"
        test = Test(url.rstrip("/").removesuffix("/v1"), args.key, name, questions, result, log)
        test.run(test.wait)
    else:
        url, key = address("127.0.0.1", port := free_port()), secrets.token_urlsafe(24)
        log.info("starting %s with the %s model", settings["serve"]["engine"], result["serves"])
        test = Test(url, key, name, questions, result, log)
        test.check("files", lambda: check_files(args, bool(served.adapters)))
        with Server(engine_command(settings, served, "127.0.0.1", port), url, log, key, args.threads) as test.server:
            test.run(lambda: test.server.wait_ready(settings["serve"]["start_timeout"]))
    failed = [name for name, check in result["checks"].items() if check["passed"] is False]
    result["passed"] = not failed
    write_json(args.result, result)
    if failed:
        reasons = "".join(f"\n  - {name}: {result['checks'][name]['why']}" for name in failed)
        raise MoultError(
            f"{len(failed)} of {len(result['checks'])} checks failed:{reasons}",
            "what is served is not what was measured, or does not serve"
            + ("" if args.base_url else "; the log has what the server said"),
        )
    told = [check["passed"] for check in result["checks"].values()]
    log.info(
        "%s: served as measured: %d checks hold, %d could not be told", args.run, told.count(True), told.count(None)
    )


def tolerance(settings: dict, measured_in: str, adapted: bool) -> tuple[float, float]:
    """Moult's own server computes in the dtype of evaluate, vLLM in the configured one. What was measured is the merged
    model, whose weights are rounded to the base's dtype: an adapter beside the base is not."""
    dtypes = {measured_in} | ({settings["model"]["dtype"]} if settings["serve"]["engine"] == "vllm" else set())
    dtypes |= {"bfloat16"} if adapted else set()
    return max(TOLERANCE[dtype] for dtype in dtypes)


def read_questions(answers: str, rows: str, prompts: list[dict], chat: bool) -> list[dict]:
    """All prompts and some rows that evaluate asked, with their messages and the measured answers.

    Rows with tools or reasoning are left out: an API has its own form of those, which a template may show otherwise.
    """
    by_id = {row["id"]: row for row in read_jsonl(rows)}
    entries = {prompt["id"]: prompt for prompt in prompts}
    questions, from_rows = [], 0
    for answer in read_jsonl(answers):
        expect: dict = {}
        if answer["kind"] == "prompt":
            entry = entries[answer["id"]]
            messages = entry.get("messages") or [{"role": "user", "content": entry["prompt"]}]
            expect = entry.get("expect", {})
        else:
            row = by_id[answer["id"]]
            messages = [{key: part[key] for key in part if key != "train"} for part in row["messages"][:-1]]
            plain = not row.get("tools") and all(set(message) == {"role", "content"} for message in messages)
            if not plain or from_rows == ROWS:
                continue
            from_rows += 1
        questions.append({**answer, "messages": messages if chat else None, "expect": expect})
    if not questions:
        raise MoultError("nothing to ask: evaluate has asked nothing", "set eval.prompts or eval.answer_rows")
    return questions


def check_files(args, adapted: bool) -> str:
    folder = args.adapter if adapted else args.merged
    wanted = read_json(args.merge)["adapter" if adapted else "files"]
    found = sha256_folder(folder, but=("metadata.json", "README.md"))
    differ = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
    if differ:
        raise Failed(f"{folder} is not what was made: {', '.join(differ)} differ")
    return f"{len(found)} as they were written"


class Failed(Exception):
    """A check that does not hold, and why."""


class CannotTell(Exception):
    """A check that this server has no means for, and why."""


def accepted(response):
    """A response that is none of an error. Raises Failed."""
    if response.status_code != 200:
        raise Failed(f"{response.request.path_url} answers {response.status_code}: {response.text[:200]}")
    return response


def first_difference(ours: list, theirs: list) -> int:
    """The first place where two lists differ; the end of the shorter one if they differ there."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(ours), len(theirs)))


class Test:
    """One server under test. `result` gets the checks, the answers and the speed.

    `server` is the process, if it is this one's own; `key` the API key.
    """

    def __init__(self, url: str, key: str | None, name: str, questions: list[dict], result: dict, log):
        self.url, self.key, self.name, self.server = url, key, name, None
        self.questions, self.result, self.log = questions, result, log
        self.result |= {"checks": {}, "answers": [], "speed": None}
        self.lead, self.drift = result["tolerance"]["lead"], result["tolerance"]["likelihood"]
        self.replies: list[dict] = []
        self.max_model_len: int | None = None

    def run(self, wait) -> None:
        if not self.check("ready", lambda: f"after {wait():.1f} s"):
            return
        for name in (
            *("models", "answers", "prompt_tokens", "expectations", "stop_reasons", "likelihood", "streaming"),
            *("concurrency", "wrong_model", "too_long", "api_key", "alive"),
        ):
            self.check(name, getattr(self, name))

    def check(self, name: str, act) -> bool:
        """Run a check and record it; whatever a broken server does is its failure, not ours."""
        import requests

        try:
            if name != "ready" and self.server and self.server.ended():
                raise Failed(f"not reached: the server has ended with {self.server.end()}")
            passed, why = True, act()
        except CannotTell as reason:
            passed, why = None, str(reason)
        except Failed as reason:
            passed, why = False, str(reason)
        except MoultError as error:
            passed, why = False, str(error)
        except (requests.JSONDecodeError, LookupError, TypeError, ValueError, AttributeError) as error:
            passed, why = False, f"it answers what it should not ({type(error).__name__}: {str(error)[:200]})"
        except requests.RequestException as error:
            passed, why = False, f"the connection failed ({type(error).__name__}){self.obituary()}"
        self.result["checks"][name] = {"passed": passed, "why": why}
        self.log.info("%-4s  %-14s %s", {True: "ok", False: "FAIL", None: "-"}[passed], name, why.split("\n")[0])
        return passed is not False

    def obituary(self) -> str:
        """What the server has left, if it has ended. A connection breaks a moment before its process is gone."""
        deadline = time.monotonic() + 1
        while self.server and time.monotonic() < deadline:
            if self.server.ended():
                return f"; the server has ended with {self.server.end()}. Its last lines:\n{self.server.tail()}"
            time.sleep(0.05)
        return ""

    # --- requests ---

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

    def request_of(self, question: dict) -> tuple[str, dict]:
        """The path and body that ask a question greedily: no default of the server's gets in between."""
        body = {
            "model": self.name,
            "max_tokens": max(1, len(question["token_ids"])),
            "temperature": 0,
            "repetition_penalty": 1.0,
            "seed": 0,
            "return_token_ids": True,
        }
        if question["messages"] is None:
            return "/v1/completions", {**body, "prompt": question["prompt_ids"]}
        return "/v1/chat/completions", {**body, "messages": question["messages"]}

    def reply(self, question: dict) -> dict:
        started = time.monotonic()
        answer = self.ask(*self.request_of(question))
        choice = answer["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        if not isinstance(text, str):
            raise Failed(f"no text in an answer: {choice!r:.200}")
        return {
            "text": text,
            "ids": choice.get("token_ids"),
            "reason": choice["finish_reason"],
            "prompt_tokens": answer["usage"]["prompt_tokens"],
            "tokens": answer["usage"]["completion_tokens"],
            "seconds": time.monotonic() - started,
        }

    def parting(self, question: dict, reply: dict) -> dict | None:
        """Where a served answer leaves the measured one: the place, the tokens, by how much the best led, whether that is
        within the tolerance. None if it does not."""
        if reply["ids"] is None:
            # Only the text is known, and not at which token it parts.
            same = reply["text"] == question["answer"]
            return None if same else {"at": None, "lead": None, "near_tie": False}
        ours, theirs = question["token_ids"], reply["ids"]
        if ours == theirs:
            return None
        at = first_difference(ours, theirs)
        lead = question["margins"][at] if at < len(question["margins"]) else None
        tokens = {"measured": ours[at] if at < len(ours) else None, "served": theirs[at] if at < len(theirs) else None}
        return {"at": at, **tokens, "lead": lead, "near_tie": lead is not None and lead <= self.lead}

    def held_against(self, questions: list[dict], replies: list[dict]) -> str:
        """How many answers are the measured ones. Fails where one is not, near ties aside."""
        partings = [self.parting(*pair) for pair in zip(questions, replies, strict=True)]
        for question, reply, parting in zip(questions, replies, partings, strict=True):
            if parting and not parting["near_tie"]:
                place = f"from token {parting['at']} on" if parting["at"] is not None else "in the text"
                lead = (
                    f", where the measured one led by {parting['lead']:g} nats" if parting["lead"] is not None else ""
                )
                count = sum(bool(other) and not other["near_tie"] for other in partings)
                raise Failed(
                    f"{count} of {len(replies)} differ, first {question['id']} {place}{lead}: "
                    f"measured {question['answer']!r:.80}, served {reply['text']!r:.80}"
                )
        ties = sum(bool(parting) for parting in partings)
        return f"{len(replies) - ties} of {len(replies)} the same" + (f", {ties} part at a near tie" if ties else "")

    # --- checks, each says what it has seen ---

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

    def models(self) -> str:
        listed = {entry["id"]: entry for entry in self.ask("/v1/models")["data"]}
        if self.name not in listed:
            raise Failed(f"no {self.name}, but {', '.join(map(str, listed)) or 'nothing'}")
        # vLLM tells it of the base only, not of the adapters.
        self.max_model_len = next(filter(None, (entry.get("max_model_len") for entry in listed.values())), None)
        return ", ".join(listed)

    def answers(self) -> str:
        self.replies = [self.reply(question) for question in self.questions]
        for question, reply in zip(self.questions, self.replies, strict=True):
            self.result["answers"].append(
                {
                    **{key: question[key] for key in ("kind", "id", "answer")},
                    "served": reply["text"],
                    "finish_reason": reply["reason"],
                    "parting": self.parting(question, reply),
                }
            )
        return self.held_against(self.questions, self.replies)

    def prompt_tokens(self) -> str:
        by_count = 0
        for number, question in enumerate(self.questions):
            ids = self.tokens_of(question) if question["messages"] is not None else None
            ours = question["prompt_ids"]
            if ids is not None and ids != ours:
                at = first_difference(ours, ids)
                raise Failed(
                    f"{question['id']}: the server makes {len(ids)} tokens of it, evaluate made {len(ours)}; "
                    f"they differ from token {at} on"
                )
            by_count += ids is None
            if not self.replies and ids is None:
                raise Failed("the server tells no token ids, and has given no answer to count by")
            if self.replies and self.replies[number]["prompt_tokens"] != len(ours):
                count = self.replies[number]["prompt_tokens"]
                raise Failed(f"{question['id']}: the server counts {count} tokens, evaluate {len(ours)}")
        return f"{len(self.questions)} the same" + (f", {by_count} by their number only" if by_count else "")

    def tokens_of(self, question: dict) -> list[int] | None:
        response = self.send("/tokenize", {"model": self.name, "messages": question["messages"]})
        if response.status_code in (404, 405):
            return None
        return accepted(response).json()["tokens"]

    def expectations(self) -> str:
        self.need_replies()
        passed = asked = 0
        for question, reply in zip(self.questions, self.replies, strict=True):
            if not question["expect"]:
                continue
            asked += 1
            measured, served = (check(text, question["expect"]) for text in (question["answer"], reply["text"]))
            passed += all(served.values())
            worse = [name for name in served if measured[name] and not served[name]]
            if worse and not (self.parting(question, reply) or {}).get("near_tie"):
                raise Failed(f"{question['id']}: {', '.join(worse)} held at evaluate; served {reply['text']!r:.80}")
        return f"{passed} of {asked} prompts pass"

    def stop_reasons(self) -> str:
        self.need_replies()
        for question, reply in zip(self.questions, self.replies, strict=True):
            wanted = "stop" if question["stopped"] else "length"
            if reply["reason"] != wanted and not (self.parting(question, reply) or {}).get("near_tie"):
                raise Failed(f"{question['id']} ends with {reply['reason']!r}, and at evaluate with {wanted!r}")
        stopped = sum(reply["reason"] == "stop" for reply in self.replies)
        return f"{stopped} of {len(self.replies)} end with stop"

    def likelihood(self) -> str:
        distance = tokens = 0.0
        for question in self.questions:
            ids = question["prompt_ids"]
            body = {"model": self.name, "prompt": ids, "echo": True, "logprobs": 0, "max_tokens": 0}
            response = self.send("/v1/completions", body)
            if self.server is None and response.status_code in UNSUPPORTED:
                raise CannotTell(f"the server does not tell how likely a prompt is ({response.status_code})")
            found = accepted(response).json()["choices"][0]["logprobs"]["token_logprobs"][: len(ids)]
            distance += abs(-sum(found[1:]) - question["prompt_nll"])
            tokens += len(ids) - 1
        drift = distance / max(tokens, 1)
        if not drift <= self.drift:
            raise Failed(
                f"the prompts are {drift:.3g} nats per token from what evaluate measured, over {self.drift:g}: other weights"
            )
        return f"{drift:.2g} nats per token from the measured, over {tokens:.0f} tokens"

    def streaming(self) -> str:
        self.need_replies()
        path, body = self.request_of(self.questions[0])
        response = accepted(self.send(path, {**body, "stream": True}, stream=True))
        response.encoding = "utf-8"
        events = [line.removeprefix("data:").strip() for line in response.iter_lines(decode_unicode=True) if line]
        if events[-1:] != ["[DONE]"]:
            raise Failed("the stream does not end with [DONE]")
        choices = [choice for event in events[:-1] for choice in json.loads(event)["choices"]]
        text = "".join(
            (choice["delta"].get("content") or "") if "delta" in choice else choice["text"] for choice in choices
        )
        if text != self.replies[0]["text"]:
            raise Failed(f"in pieces {text!r:.80}, in one {self.replies[0]['text']!r:.80}")
        reason = next((choice["finish_reason"] for choice in reversed(choices) if choice.get("finish_reason")), None)
        if reason != self.replies[0]["reason"]:
            raise Failed(f"in pieces it ends with {reason!r}, in one with {self.replies[0]['reason']!r}")
        return f"{len(choices)} pieces"

    def concurrency(self) -> str:
        questions = [self.questions[index % len(self.questions)] for index in range(AT_ONCE)]
        started = time.monotonic()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            replies = list(pool.map(self.reply, questions))
        seconds = time.monotonic() - started
        latencies = sorted(reply["seconds"] for reply in replies)
        self.result["speed"] = {
            "requests": AT_ONCE,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(sum(reply["tokens"] for reply in replies) / seconds, 1),
            "latency_p50": round(statistics.median(latencies), 3),
            "latency_p95": round(statistics.quantiles(latencies, n=20, method="inclusive")[-1], 3),
        }
        speed = self.result["speed"]
        return (
            f"{self.held_against(questions, replies)}; {speed['tokens_per_second']} tokens/s, "
            f"latency p50 {speed['latency_p50']} s, p95 {speed['latency_p95']} s"
        )

    def wrong_model(self) -> str:
        path, body = self.request_of(self.questions[0])
        return self.refused(self.send(path, {**body, "model": f"{self.name}-that-is-not-there"}), 400, 404, 422)

    def too_long(self) -> str:
        if not self.max_model_len:
            raise CannotTell("the server does not tell how long a prompt may be")
        path, body = self.request_of(self.questions[0])
        long = "long " * self.max_model_len
        body = (
            {**body, "messages": [{"role": "user", "content": long}]}
            if "messages" in body
            else {**body, "prompt": long}
        )
        return self.refused(self.send(path, body), 400, 413, 422)

    def api_key(self) -> str:
        if not self.key:
            raise CannotTell("the server wants no key")
        path, body = self.request_of(self.questions[0])
        for key in ("", "wrong"):
            answer = self.refused(self.send(path, body, key=key), 401, 403)
        return answer

    def alive(self) -> str:
        if self.send("/health").status_code != 200:
            raise Failed("the server is not healthy after the test")
        return "healthy after the test"

    def refused(self, response, *wanted: int) -> str:
        if response.status_code not in wanted:
            codes = " or ".join(map(str, wanted))
            raise Failed(f"answered {response.status_code}, and should be refused with {codes}: {response.text[:200]}")
        return f"refused with {response.status_code}"

    def need_replies(self) -> None:
        if not self.replies:
            raise Failed("no answers to look at")


if __name__ == "__main__":
    main()
