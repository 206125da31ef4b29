"""What the processes of one run owe each other: they stop together, and they end together, with the reason of the first failure.

A process that fails leaves the others in a collective operation, which is C++: no signal handler of Python's runs there. torchrun
then waits for them as long as for processes that save a checkpoint (--shutdown-timeout). So each process has threads that end it.
"""

import contextlib
import json
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from moult.errors import UNFINISHED, MoultError
from moult.run.console import log
from moult.run.stage import end_at_once, explain

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)

# Seconds that the main thread has to end by itself, and to hear of an earlier failure before it reports its own.
GRACE, PATIENCE = 8.0, 1.5


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return int(os.environ.get("RANK", 0))


class StopSignal:
    """SIGTERM, SIGINT and SIGUSR2 ask to stop. Before and after training there is nothing to save, so they stop at once."""

    def __init__(self):
        self.received: str | None = None
        self.training = False
        for number in STOPS:
            signal.signal(number, self._receive)
        if world_size() > 1:
            reader, writer = os.pipe()
            os.set_blocking(writer, False)
            # C code writes the signal's number there at once, whatever the main thread waits for.
            signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            threading.Thread(target=self._end_if_stuck, args=(reader,), daemon=True).start()

    def _receive(self, number: int, frame) -> None:
        self.received = signal.Signals(number).name
        if not self.training:
            # Not an Exception: libraries swallow those (transformers, where it looks what is installed).
            raise SystemExit(UNFINISHED)

    def _end_if_stuck(self, reader: int) -> None:
        while number := os.read(reader, 1):
            if number[0] in STOPS and not self.training:
                time.sleep(GRACE)
                end_at_once(SystemExit(UNFINISHED))


@contextlib.contextmanager
def together(cpu: bool, train: dict) -> Iterator[None]:
    """Start the process group, with the timeout and backend of the config's train section; in the block, the end of one process
    ends all. Does nothing for a single process.

    Each process holds a connection to the first one, which closes with it, however it ends.
    """
    if world_size() == 1:
        yield
        return
    from accelerate import PartialState

    backend = {"backend": train["ddp_backend"]} if train.get("ddp_backend") else {}
    # Whoever is first starts the group. The timeout that transformers would pass comes too late (accelerate 1.15).
    PartialState(cpu=cpu, timeout=timedelta(seconds=train.get("ddp_timeout", 1800)), **backend)
    lines = Lifelines()
    try:
        yield
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        if isinstance(error, MoultError) and error.exit_code == UNFINISHED:  # all processes stop at the same step
            lines.close()
            raise
        first = lines.failure_within(PATIENCE)
        if first is None:
            lines.tell(description(error))
        # Not by raising it: with NCCL, Python's own end can wait for a collective operation that never ends.
        end_at_once(first or error)
    lines.close()


def description(error: BaseException) -> dict:
    code, _, what, fix = explain(error)
    return {"rank": rank(), "what": what, "fix": fix, "code": code if isinstance(code, int) else 1}


class Lifelines:
    """The connections between rank 0 and the others. A line is a JSON: who failed and why, or that it has done its work."""

    def __init__(self):
        from accelerate.utils import broadcast_object_list

        self.failure: MoultError | None = None
        self.failed, self.closing, self.lock = threading.Event(), threading.Event(), threading.Lock()
        self.peers: list[socket.socket] = []
        if rank() == 0:
            token, server = secrets.token_hex(16), _listen()
            broadcast_object_list([(server.getsockname()[1], token)])
            while len(self.peers) < world_size() - 1:
                self._accept(server, token)
            server.close()
        else:
            (port, token), *_ = broadcast_object_list([None])
            peer = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=60)
            _send(peer, {"token": token, "rank": rank()})
            self._keep(peer, 0, peer.makefile(encoding="utf-8"))

    def _accept(self, server: socket.socket, token: str) -> None:
        peer, _ = server.accept()
        peer.settimeout(60)
        lines = peer.makefile(encoding="utf-8")
        with contextlib.suppress(OSError, ValueError):
            hello = json.loads(lines.readline(1000))
            if isinstance(hello, dict) and hello.get("token") == token:
                self._keep(peer, hello["rank"], lines)

    def _keep(self, peer: socket.socket, other: int, lines) -> None:
        peer.settimeout(None)
        # A machine that is switched off closes nothing.
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 2)):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self.peers.append(peer)
        threading.Thread(target=self._listen_to, args=(lines, other), daemon=True).start()

    def _listen_to(self, lines, other: int) -> None:
        said: dict[str, Any] = {
            "rank": other,
            "what": "ended without an error message (it was killed, usually out of memory)",
            "fix": "give it more memory, or lower train.per_device_train_batch_size",
            "code": 1,
        }
        with contextlib.suppress(OSError, ValueError):
            said = json.loads(lines.readline() or json.dumps(said))
        if said.get("done") or self.closing.is_set():
            return
        if rank() == 0:
            self.tell(said)
        with self.lock:
            if self.failure is None:
                what = (
                    said["what"] if f"rank {said['rank']}" in said["what"] else f"rank {said['rank']}: {said['what']}"
                )
                self.failure = MoultError(what, said["fix"], said["code"])
        self.failed.set()
        time.sleep(GRACE)
        if not self.closing.is_set():
            log.debug("the main thread does not end by itself")
            end_at_once(self.failure)

    def failure_within(self, seconds: float) -> MoultError | None:
        """The first failure of another process, if one is known or becomes known in that time."""
        return self.failure if self.failed.wait(seconds) else None

    def tell(self, content: dict) -> None:
        for peer in self.peers:
            _send(peer, content)

    def close(self) -> None:
        """This process has done its work."""
        self.closing.set()
        self.tell({"done": True})


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _send(peer: socket.socket, content: dict) -> None:
    with contextlib.suppress(OSError):  # it is gone, which its thread sees
        peer.sendall((json.dumps(content) + "\n").encode())
