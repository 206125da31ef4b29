"""A small OpenAI-compatible server on transformers, for trials on a CPU and for tests. vLLM is the real one.

    python scripts/transformers_server.py --model results/demo/merged --name demo --port 8080

scripts/tools/serve.py and scripts/smoke_test.py start it (serve.engine: transformers). It has what they and a chat client need,
with the paths, fields and status codes of vLLM: /health, /v1/models, /v1/chat/completions, /v1/completions, /tokenize. One
request is answered at a time, the others wait. What could change an answer and is not known here (tools, several
choices, penalties, any other field ...) is refused, not ignored. With VLLM_API_KEY in the environment, requests need that key.
"""

import contextlib
import hmac
import inspect
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from moult.errors import MoultError
from moult.model.device import limit_threads, load_model, pick
from moult.model.tokenizer import load_tokenizer, stop_ids, text_ids
from moult.run.cli import tool_parser

LARGEST_BODY = 16 * 1024 * 1024

# Seconds that a streaming client may leave a piece unread: the model is kept from the others meanwhile.
READ_TIMEOUT = 10

# Logits divided by less are more than a float32 can hold.
LEAST_TEMPERATURE = 1e-10

# Fields that are known: those of both paths, with some that change no answer, and by whether it is a chat its own.
SHARED = {
    *("model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop"),
    *("stream", "stream_options", "return_token_ids"),
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "request_id", "priority"),
    "parallel_tool_calls",
}
FIELDS = {
    True: SHARED | {"messages", "add_generation_prompt", "chat_template_kwargs"},
    False: SHARED | {"prompt", "echo", "logprobs"},
}

# Fields that are true or false.
FLAGS = ("stream", "echo", "add_generation_prompt", "return_token_ids")

# Other fields, and the values that ask for nothing else than what is done anyway.
NEUTRAL = {
    "n": (1,),
    "best_of": (1,),
    "tools": ([],),
    "documents": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "continue_final_message": (False,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
}


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--name", required=True, help="the model's name in the API")
    parser.add_argument("--adapter", help="adapter folder; its chat template and stop tokens are used")
    parser.add_argument("--adapter-name", help="the adapter's name in the API")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8080, help="port to listen on")
    parser.add_argument("--max-model-len", type=int, help="longest prompt and answer together, in tokens")
    parser.add_argument("--settings", type=json.loads, default="{}", help="JSON of the config's model section")
    args = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(0))
    engine = Engine(args)
    handler = type("Handler", (Handler,), {"engine": engine, "key": os.environ.pop("VLLM_API_KEY", "")})
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    options = {"daemon_threads": True, "request_queue_size": 128, "address_family": family}
    server = type("Server", (ThreadingHTTPServer,), options)
    try:
        listening = server((args.host, args.port), handler)
    except OSError as error:
        sys.exit(f"{args.host}:{args.port}: {error.strerror}")
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    try:
        engine.load()
    except MoultError as error:
        sys.exit(str(error))
    print(f"ready on {args.host}:{args.port}", flush=True)
    while True:
        signal.pause()


class BadRequest(Exception):
    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


# --- the model --------------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """What has been generated: tokens, text, and why it ended (`stop`, `length`)."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    reason: str = "length"


class Engine:
    """A model, its tokenizer, and the one request that they are at work on."""

    def __init__(self, args):
        self.args = args
        self.name = args.adapter_name or args.name
        self.names = [args.name, *([args.adapter_name] if args.adapter else [])]
        self.ready = threading.Event()
        self.created = int(time.time())
        self.generating, self.tokenizing = threading.Lock(), threading.Lock()

    def load(self) -> None:
        from transformers import PreTrainedTokenizerBase

        limit_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        settings = {"dtype": "bfloat16", "attn_implementation": None, "trust_remote_code": False, **self.args.settings}
        self.template_kwargs = settings.get("chat_template_kwargs", {})
        own = self.args.adapter or self.args.model
        self.tokenizer = load_tokenizer(own, settings["trust_remote_code"])
        self.not_of_template = {"messages", "conversations"}
        for owner in (self.tokenizer, PreTrainedTokenizerBase):
            self.not_of_template |= set(inspect.signature(owner.apply_chat_template).parameters)
        has_config = Path(own, "generation_config.json").exists()
        self.stop_ids = stop_ids(own if has_config else self.args.model, self.tokenizer)
        self.model = load_model(self.args.model, pick(), settings).eval()
        if self.args.adapter:
            from peft import PeftModel

            self.model = PeftModel.from_pretrained(self.model, self.args.adapter).eval()
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.max_model_len = min(filter(None, (self.args.max_model_len, positions)), default=2**20)
        self.ready.set()

    def prompt_ids(self, body: dict, chat: bool) -> list[int]:
        """The tokens of a request's messages or prompt."""
        with self.tokenizing:
            if not chat:
                return self._ids_of(body.get("prompt"))
            messages = checked_messages(body.get("messages"))
            variables = self._variables_of(body.get("chat_template_kwargs"))
            if not self.tokenizer.chat_template:
                raise BadRequest("the model has no chat template; ask /v1/completions")
            try:
                text = self.tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=body.get("add_generation_prompt", True),
                    **{**self.template_kwargs, **variables},
                )
            except Exception as error:  # a template can raise whatever Python can
                raise BadRequest(f"the chat template refuses the messages: {error}") from None
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _variables_of(self, given) -> dict:
        """A request's variables for the template. What apply_chat_template itself takes is none: a request could bring a
        template of its own, which need never end, and nobody else would be answered."""
        if given is None:
            return {}
        if not isinstance(given, dict):
            raise BadRequest("chat_template_kwargs: expected an object")
        for name, value in given.items():
            if name in self.not_of_template:
                raise BadRequest(f"chat_template_kwargs: {name} is no variable of a template")
            if not isinstance(value, str | int | float | bool | None):
                raise BadRequest(f"chat_template_kwargs: {name:.80}: expected a text, a number, true, false or null")
        return given

    def _ids_of(self, prompt) -> list[int]:
        if isinstance(prompt, str):
            return text_ids(self.tokenizer, prompt)
        size = self.model.config.get_text_config().vocab_size
        if not isinstance(prompt, list) or not all(type(id) is int and 0 <= id < size for id in prompt):
            raise BadRequest("prompt: expected a text, or a list of token ids of this model")
        return prompt

    def generate(self, ids: list[int], options: dict, adapted: bool, tell) -> Answer:
        """Answer a prompt. `tell` gets each new piece of text, and may raise to end it."""
        import torch
        from transformers import GenerationConfig

        answer, told = Answer(), 0
        hold = max((len(stop) for stop in options["stop"]), default=1) - 1

        def add(token: int) -> None:
            nonlocal told
            answer.ids.append(token)
            if token in self.stop_ids:
                answer.reason = "stop"
            else:
                answer.text = self.tokenizer.decode(
                    answer.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
                )
            at = min((answer.text.find(stop) for stop in options["stop"] if stop in answer.text), default=-1)
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
        if options["temperature"] > 0:
            sampling = {"temperature": options["temperature"], "top_p": options["top_p"], "top_k": 0}
        # Not the model's own generation config: what the request leaves out has OpenAI's defaults.
        config = GenerationConfig(
            do_sample=bool(sampling),
            max_new_tokens=options["max_tokens"],
            eos_token_id=sorted(self.stop_ids),
            pad_token_id=0,
            use_cache=True,
            **sampling,
        )
        with self.generating, self._adapter(adapted), torch.inference_mode():
            torch.manual_seed(options["seed"] if options["seed"] is not None else time.time_ns() % 2**63)
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
        return contextlib.nullcontext() if adapted or not self.args.adapter else self.model.disable_adapter()


# --- requests ---------------------------------------------------------------------------------------------------------


def checked_messages(messages) -> list[dict]:
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages: expected a list of {role, content}")
    result = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRequest("messages: each needs a role")
        content = message.get("content")
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(str(part.get("text", "")) for part in content)
        if not isinstance(content, str):
            raise BadRequest("messages: content must be text")
        result.append({**message, "content": content})
    return result


def number(body: dict, name: str, default, low, high, kinds=(int, float)):
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        raise BadRequest(f"{name}: expected a number from {low} to {high}, got {value!r}")
    return value


def checked_fields(body: dict, chat: bool) -> dict:
    """The fields that a request sets. null sets nothing."""
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if name not in FIELDS[chat] and value not in NEUTRAL.get(name, ()):
            raise BadRequest(f"{name:.80}: not supported by this server, which is for trials; vLLM may have it")
    flags = {name: given[name] for name in FLAGS if name in given}
    options = given.get("stream_options", {})
    if not isinstance(options, dict):
        raise BadRequest("stream_options: expected an object")
    for name, value in {**flags, "stream_options.include_usage": options.get("include_usage") or False}.items():
        if not isinstance(value, bool):
            raise BadRequest(f"{name}: expected true or false")
    if given.get("echo") and given.get("stream"):
        raise BadRequest("echo: not supported with stream")
    return given


def checked_options(body: dict, prompt: int, room: int, chat: bool) -> dict:
    """The options of a request for an answer to a prompt of `prompt` tokens, with `room` tokens in all."""
    if not chat and "logprobs" in body and not (body.get("echo") and body["logprobs"] == 0):
        raise BadRequest("logprobs: this server, which is for trials, has them with echo only, and only logprobs: 0")
    if prompt >= room:
        raise BadRequest(f"the prompt has {prompt} tokens, and this model's maximum context length is {room}")
    name = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    wanted = number(body, name, room - prompt if chat else min(16, room - prompt), 0, 2**31, int)
    if prompt + wanted > room:
        raise BadRequest(
            f"{name}: the prompt has {prompt} tokens; with {wanted} more it is over the maximum context length of {room}"
        )
    if wanted == 0 and not body.get("echo"):
        raise BadRequest(f"{name}: must be at least 1")
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise BadRequest("stop: expected a text or a list of texts")
    temperature = number(body, "temperature", 1.0, 0, 2)
    if 0 < temperature < LEAST_TEMPERATURE:
        raise BadRequest(f"temperature: expected 0, or a number from {LEAST_TEMPERATURE} to 2")
    top_p = number(body, "top_p", 1.0, 0, 1)
    if top_p == 0:
        raise BadRequest("top_p: must be above 0")
    return {
        "max_tokens": wanted,
        "temperature": float(temperature),  # transformers takes no int
        "top_p": top_p,
        "seed": number(body, "seed", None, -(2**63), 2**63 - 1, int),
        "stop": stop,
    }


class Handler(BaseHTTPRequestHandler):
    engine: Engine
    key: str
    protocol_version = "HTTP/1.1"
    timeout = 600  # of a client that says nothing

    def do_GET(self) -> None:
        self.answer_with(self.get)

    def do_POST(self) -> None:
        self.answer_with(self.post)

    def answer_with(self, act) -> None:
        self.streaming = False
        self.path = self.path.partition("?")[0]
        try:
            act()
        except BadRequest as error:
            self.close_connection = True  # the body may not have been read
            self.refuse(str(error), error.status)
        except (BrokenPipeError, ConnectionResetError, TimeoutError):  # the client has gone
            self.close_connection = True
        except Exception as error:
            self.close_connection = True
            self.log_error("%s: %s", type(error).__name__, error)
            if not self.streaming:
                self.refuse(f"{type(error).__name__}: {error}", 500)

    def get(self) -> None:
        if self.path == "/health":
            return self.send(b"", 200 if self.engine.ready.is_set() else 503)
        self.check_key()
        if self.path != "/v1/models":
            raise BadRequest(f"no such path: {self.path}", 404)
        self.check_ready()
        entry = {"object": "model", "created": self.engine.created, "owned_by": "moult"}
        length = {"max_model_len": self.engine.max_model_len}
        self.send_json({"object": "list", "data": [{"id": name, **entry, **length} for name in self.engine.names]})

    def post(self) -> None:
        self.check_key()
        paths = {"/v1/chat/completions": self.complete, "/v1/completions": self.complete, "/tokenize": self.tokenize}
        if self.path not in paths:
            raise BadRequest(f"no such path: {self.path}", 404)
        self.check_ready()
        body = self.read_body()
        model = body.get("model", self.engine.name)
        if model not in self.engine.names:
            raise BadRequest(f"The model `{model}` does not exist. There are: {', '.join(self.engine.names)}.", 404)
        # A chat's fields are known to /tokenize too: what asks for an answer there changes no token.
        chat = self.path == "/v1/chat/completions" or (self.path == "/tokenize" and body.get("messages") is not None)
        paths[self.path]({**checked_fields(body, chat), "model": model})

    def check_key(self) -> None:
        given = self.headers.get("Authorization") or ""
        if self.key and not hmac.compare_digest(given.encode(), f"Bearer {self.key}".encode()):
            raise BadRequest("Unauthorized", 401)

    def check_ready(self) -> None:
        if not self.engine.ready.is_set():
            raise BadRequest("the model is being loaded", 503)

    def read_body(self) -> dict:
        try:
            size = int(self.headers.get("Content-Length", ""))
        except ValueError:
            raise BadRequest("Content-Length is missing", 411) from None
        if not 0 <= size <= LARGEST_BODY:
            raise BadRequest(f"the body has more than {LARGEST_BODY:,} bytes", 413)
        try:
            body = json.loads(self.rfile.read(size))
            json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadRequest("the body has half of a surrogate pair, which is no character") from None
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"the body is not JSON: {error}") from None
        if not isinstance(body, dict):
            raise BadRequest("the body is no JSON object")
        return body

    def tokenize(self, body: dict) -> None:
        ids = self.engine.prompt_ids(body, "messages" in body)
        self.send_json({"count": len(ids), "max_model_len": self.engine.max_model_len, "tokens": ids})

    def complete(self, body: dict) -> None:
        chat = self.path == "/v1/chat/completions"
        ids = self.engine.prompt_ids(body, chat)
        options = checked_options(body, len(ids), self.engine.max_model_len, chat)
        if not ids:
            raise BadRequest("the prompt is empty")
        adapted = body["model"] == self.engine.name
        kind = ("chat.completion" if chat else "text_completion") + (".chunk" if chat and body.get("stream") else "")
        head = {"id": f"{'chat' if chat else ''}cmpl-{uuid.uuid4().hex}", "object": kind}
        head |= {"created": int(time.time()), "model": body["model"]}
        if body.get("echo"):
            return self.echo(head, ids, options, adapted)
        if body.get("stream"):
            return self.stream(head, ids, options, adapted, chat, body.get("stream_options") or {})
        answer = self.engine.generate(ids, options, adapted, lambda text: None)
        said = {"message": {"role": "assistant", "content": answer.text}} if chat else {"text": answer.text}
        tokens = {"token_ids": answer.ids} if body.get("return_token_ids") else {}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": answer.reason, **tokens}
        self.send_json({**head, "choices": [choice], "usage": usage(len(ids), len(answer.ids))})

    def echo(self, head: dict, ids: list[int], options: dict, adapted: bool) -> None:
        """The prompt's own likelihood: `{"echo": true, "max_tokens": 0, "logprobs": 0}`."""
        if options["max_tokens"] > 0:
            raise BadRequest("echo: this server, which is for trials, does it with max_tokens: 0 only")
        logprobs = {"token_logprobs": self.engine.logprobs(ids, adapted)}
        choice = {
            "index": 0,
            "text": self.engine.tokenizer.decode(ids),
            "logprobs": logprobs,
            "finish_reason": "length",
        }
        self.send_json({**head, "choices": [choice], "usage": usage(len(ids), 0)})

    def stream(self, head: dict, ids: list[int], options: dict, adapted: bool, chat: bool, wanted: dict) -> None:
        self.streaming = True
        self.connection.settimeout(READ_TIMEOUT)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True

        def event(data: str) -> None:
            self.wfile.write(f"data: {data}\n\n".encode())
            self.wfile.flush()

        def piece(delta: dict, reason: str | None = None) -> None:
            said = {"delta": delta} if chat else {"text": delta.get("content", "")}
            event(json.dumps({**head, "choices": [{"index": 0, **said, "finish_reason": reason}]}))

        if chat:
            piece({"role": "assistant", "content": ""})
        answer = self.engine.generate(ids, options, adapted, lambda text: piece({"content": text}))
        piece({}, answer.reason)
        if wanted.get("include_usage"):
            event(json.dumps({**head, "choices": [], "usage": usage(len(ids), len(answer.ids))}))
        event("[DONE]")

    def send_json(self, value, status: int = 200) -> None:
        self.send(json.dumps(value).encode(), status, "application/json")

    def send(self, body: bytes, status: int, kind: str = "text/plain") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, message: str, status: int) -> None:
        kinds = {401: "AuthenticationError", 404: "NotFoundError"}
        kind = kinds.get(status, "BadRequestError" if status < 500 else "InternalServerError")
        self.send_json({"error": {"message": message, "type": kind, "code": status}}, status)

    def log_message(self, template: str, *values) -> None:
        if getattr(self, "path", "") != "/health":
            print(f"{self.address_string()} {template % values}", flush=True)


def usage(prompt: int, answer: int) -> dict:
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


if __name__ == "__main__":
    main()
