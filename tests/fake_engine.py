#!/usr/bin/env python3
"""Poses as the Python that has vLLM (serve.python): a server that knows the measured answers, and fails as it is told.

In the environment: FAKE_ANSWERS, answers.jsonl; FAKE, how it fails ("" does not); FAKE_PIDS, a file for its process ids;
FAKE_KIND, whose API it has: vLLM's if it is empty, or that of `llama.cpp` or `ollama`; FAKE_ADAPTERS, {name in the API:
answers.jsonl} of adapters.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ARGUMENTS = dict(zip(sys.argv, sys.argv[1:], strict=False))
FAKE = os.environ.get("FAKE", "")
KIND = os.environ.get("FAKE_KIND", "")
KEY = os.environ.get("VLLM_API_KEY")
FILES = json.loads(os.environ.get("FAKE_ADAPTERS", "{}")) or {
    ARGUMENTS["--served-model-name"]: os.environ["FAKE_ANSWERS"]
}
ANSWERS = {name: [json.loads(line) for line in Path(file).read_text().splitlines()] for name, file in FILES.items()}
LENGTH = 128

# The models of the requests that are being answered.
ON_THE_WAY: list[str] = []


class Handler(BaseHTTPRequestHandler):
    asked = 0

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/health":
            if KIND == "ollama":
                return self.send({}, 404)
            return self.send({}, 503 if FAKE in ("never ready", "deaf") else 200)
        names = ["other"] if FAKE == "other name" else list(ANSWERS)
        entries = {
            "": {"max_model_len": LENGTH},
            "llama.cpp": {"owned_by": "llamacpp", "meta": {"n_ctx": LENGTH, "n_ctx_train": 10 * LENGTH}},
            "ollama": {"id": f"{names[0]}:latest", "owned_by": "library"},
        }
        self.send({"data": [{"id": name, **entries[KIND]} for name in names]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if KEY and FAKE != "open" and self.headers.get("Authorization") != f"Bearer {KEY}":
            return self.send({"error": "Unauthorized"}, 401)
        if KIND == "llama.cpp":  # it does not look at the name; and what /apply-template gives comes back as content
            body["model"] = ARGUMENTS["--served-model-name"]
            body |= {"prompt": json.loads(body["content"])} if "content" in body else {}
        if KIND == "ollama" and (self.path == "/tokenize" or isinstance(body.get("prompt"), list)):
            return self.send({"error": "?"}, 404 if self.path == "/tokenize" else 400)
        if body["model"] not in ANSWERS:
            return self.send({"error": "no such model"}, 200 if FAKE == "any model" else 404)
        said = body["messages"][0]["content"] if "messages" in body else body["prompt"]
        if isinstance(said, str) and len(said.split()) >= LENGTH:
            return self.send({"error": "too long"}, 500 if FAKE == "chokes" else 400)
        row = next((row for row in ANSWERS[body["model"]] if self.is_about(row, body)), None)
        if self.path == "/apply-template":
            return self.send({"prompt": json.dumps(row["prompt_ids"])})
        if self.path == "/tokenize":
            ids = row["prompt_ids"]
            ids = [*ids[:2], 9, *ids[3:]] if FAKE == "other template" else ids
            if KIND == "llama.cpp" and "messages" in body:
                return self.send({"tokens": []})
            return self.send({"tokens": ids} if FAKE != "no tokenize" else {}, 404 if FAKE == "no tokenize" else 200)
        if body.get("echo"):
            if KIND == "llama.cpp":
                return self.send({"choices": [{"text": "", "logprobs": None}]})
            if FAKE == "no echo":
                return self.send({"error": "echo?"}, 400)
            nll = row["prompt_nll"] * (1.5 if FAKE == "other weights" else 1) / (len(row["prompt_ids"]) - 1)
            logprobs = [None] + [-nll] * (len(row["prompt_ids"]) - 1)
            return self.send({"choices": [{"logprobs": {"token_logprobs": logprobs}}]})
        if len(ANSWERS) > 1:
            row = self.beside_others(row, body)
        return self.chat(row, body)

    def beside_others(self, row: dict, body: dict) -> dict:
        """The answer while others are on their way: where adapters are mixed up, that of another one."""
        ON_THE_WAY.append(body["model"])
        time.sleep(0.05)
        others = [name for name in ON_THE_WAY if name != body["model"]]
        ON_THE_WAY.remove(body["model"])
        if FAKE == "mixes adapters up" and others:
            return next(other for other in ANSWERS[others[0]] if self.is_about(other, body))
        if FAKE == "mixes requests up" and others:
            return ANSWERS[others[0]][-1]
        return row

    def is_about(self, row: dict, body: dict) -> bool:
        if "messages" in body:
            return body["messages"][-1]["content"] == row["prompt"]
        return body["prompt"] == row["prompt_ids"]

    def chat(self, row: dict, body: dict) -> None:
        Handler.asked += 1
        if FAKE == "killed" and Handler.asked > 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if FAKE == "500":
            return self.send({"error": "CUDA error"}, 500)
        if FAKE == "garbage":
            return self.send_raw(b"<html>It works!</html>", "text/html")
        if FAKE == "other JSON":
            return self.send({"choices": []})
        text, ids, reason = row["answer"], list(row["token_ids"]), "stop" if row["stopped"] else "length"
        if FAKE.startswith("answers otherwise from "):
            at = int(FAKE.split()[-1])
            text, ids = "something else", [*ids[:at], 99, *ids[at + 1 :]]
        if FAKE == "does not stop":
            reason = "length"
        if FAKE.startswith("no ids"):
            text, ids = text.upper() if "other text" in FAKE else text, None
        if self.path == "/completion":
            return self.send({"content": text, "tokens": ids, "stop_type": "eos" if reason == "stop" else "limit"})
        ids = None if KIND else ids
        usage = {"prompt_tokens": len(row["prompt_ids"]) + (FAKE == "double BOS"), "completion_tokens": 3}
        if not body.get("stream"):
            content = {"message": {"content": text}} if "messages" in body else {"text": text}
            message = {**content, "finish_reason": reason, "token_ids": ids}
            return self.send({"choices": [message], "usage": usage})
        pieces = [{"delta": {"content": piece}} for piece in (text[:2], text[2:])]
        events = [json.dumps({"choices": [piece]}) for piece in [*pieces, {"delta": {}, "finish_reason": reason}]]
        events += [] if FAKE == "stream without end" else ["[DONE]"]
        self.send_raw("".join(f"data: {event}\n\n" for event in events).encode(), "text/event-stream")

    def send(self, value, status: int = 200) -> None:
        self.send_raw(json.dumps(value).encode(), "application/json", status)

    def send_raw(self, body: bytes, kind: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if FAKE == "ends at once":
    print("RuntimeError: no GPU was found", flush=True)
    sys.exit(3)
if FAKE == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if FAKE in ("leaves a child", "deaf"):
    child = subprocess.Popen(["sleep", "600"])
    Path(os.environ["FAKE_PIDS"]).write_text(f"{os.getpid()} {child.pid}")
elif "FAKE_PIDS" in os.environ:
    Path(os.environ["FAKE_PIDS"]).write_text(f"{os.getpid()}")
server = ThreadingHTTPServer(("127.0.0.1", int(ARGUMENTS["--port"])), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
print("started; the key is not to be said", flush=True)
time.sleep(600)
