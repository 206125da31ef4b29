"""A small OpenAI-compatible server on transformers, for trials on a CPU and for tests. vLLM is the real one.

    PYTHONPATH=scripts python -m moult.serving.transformers_server --model results/demo/merged --name demo --port 8080

scripts/tools/serve.py and scripts/smoke_test.py start it (serve.engine: transformers). It has what they and a chat client
need, with the paths, fields and status codes of vLLM: /health, /v1/models, /v1/chat/completions, /v1/completions, /tokenize.
One request is answered at a time, the others wait. What could change an answer and is not known here (tools, several
choices, penalties, any other field ...) is refused, not ignored. With VLLM_API_KEY in the environment, requests need that key.
"""

import hmac
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from moult.errors import MoultError
from moult.model.quantization import bitsandbytes_for
from moult.run.cli import tool_parser
from moult.serving.api import BadRequest, Options, checked_fields, checked_options
from moult.serving.engine import Engine

LARGEST_BODY = 16 * 1024 * 1024

# Seconds that a streaming client may leave a piece unread: the model is kept from the others meanwhile.
READ_TIMEOUT = 10


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
    bitsandbytes_for({})
    engine = Engine(args.model, args.name, args.adapter, args.adapter_name, args.max_model_len, args.settings)
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
    engine.main_thread.work()


class Handler(BaseHTTPRequestHandler):
    """Answers one request, in a thread of its own."""

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
            raise BadRequest("the body is not a JSON object")
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
        id = f"{'chat' if chat else ''}cmpl-{uuid.uuid4().hex}"
        head = {"id": id, "object": kind, "created": int(time.time()), "model": body["model"]}
        if body.get("echo"):
            return self.echo(head, ids, options, adapted)
        if body.get("stream"):
            return self.stream(head, ids, options, adapted, chat, body.get("stream_options") or {})
        answer = self.engine.generate(ids, options, adapted, lambda text: None)
        said = {"message": {"role": "assistant", "content": answer.text}} if chat else {"text": answer.text}
        tokens = {"token_ids": answer.ids} if body.get("return_token_ids") else {}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": answer.reason, **tokens}
        self.send_json({**head, "choices": [choice], "usage": usage(len(ids), len(answer.ids))})

    def echo(self, head: dict, ids: list[int], options: Options, adapted: bool) -> None:
        """The prompt's own likelihood: `{"echo": true, "max_tokens": 0, "logprobs": 0}`."""
        if options.max_tokens > 0:
            raise BadRequest("echo: this server, which is for trials, does it with max_tokens: 0 only")
        logprobs = {"token_logprobs": self.engine.logprobs(ids, adapted)}
        choice = {
            "index": 0,
            "text": self.engine.chat.decode(ids),
            "logprobs": logprobs,
            "finish_reason": "length",
        }
        self.send_json({**head, "choices": [choice], "usage": usage(len(ids), 0)})

    def stream(self, head: dict, ids: list[int], options: Options, adapted: bool, chat: bool, wanted: dict) -> None:
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
