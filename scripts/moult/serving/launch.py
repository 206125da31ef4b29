"""A server of a run's model: what it serves, the command that starts it, and a process that is gone when it is not needed."""

import collections
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from moult.errors import MoultError
from moult.files import read_json
from moult.model.manifest import public_name
from moult.workflow.environments import EXPORTS
from moult.workflow.exports import ADAPTER, BASE_FILE, COMPRESSED, LLAMA_CPP, gguf_file

LOOPBACK = ("127.0.0.1", "localhost", "::1")

# Seconds between a polite signal and one that cannot be refused.
PATIENCE = 20

# Requests that llama.cpp's server answers at a time. They share its context.
SLOTS = 8

# Engines' variables with the API key.
KEYS = ("VLLM_API_KEY", "LLAMA_API_KEY")

# The template for conversations with tools, where a model has one of its own for these.
TOOL_TEMPLATE = "additional_chat_templates/tool_use.jinja"


@dataclass(frozen=True)
class Run:
    """A run that can be served: its name, its folders, and its plan.json, which says whether vLLM takes the adapter."""

    name: str
    base: str
    adapter: str
    merged: str
    plan: str


@dataclass(frozen=True)
class Served:
    """What a server has: a model folder under a name of the API, and adapters on top of it.

    model: a folder, or a GGUF file. adapters: {name in the API: folder, or GGUF file}. max_lora_rank: the largest rank of them,
    as vLLM wants it rounded up.
    """

    name: str
    model: str
    adapters: dict[str, str] = field(default_factory=dict)
    max_lora_rank: int = 0


@dataclass(frozen=True)
class Command:
    """How an engine is started. environment: variables that it gets besides those of this process."""

    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)


def what_to_serve(settings: dict, runs: list[Run]) -> Served:
    """The merged model of a run, or the base with the adapters of one run or several, as serve.mode says.

    `settings` is what the stage reads of the config, of the first run. Raises MoultError for what cannot be served.
    """
    serve, first = settings["serve"], runs[0]
    reasons = {run.name: read_json(run.plan)["serve"]["reasons"] for run in runs}
    mode = serve["mode"]
    if mode == "auto":
        mode = "merged" if serve["engine"] != "vllm" or any(reasons.values()) else "adapter"
    name = serve["served_model_name"] or first.name
    if mode == "merged":
        if len(runs) > 1:
            raise MoultError(
                "several runs can only be served as adapters of one base", "set serve.mode: adapter, or name one run"
            )
        return Served(name, need(first.merged, "config.json", first.name))
    for run in runs:
        need(run.adapter, "adapter_config.json", run.name)
        if serve["engine"] == "vllm" and reasons[run.name]:
            raise MoultError(
                f"{run.name}: vLLM cannot serve this adapter ({', '.join(reasons[run.name])})",
                "set serve.mode: merged",
            )
        for file in ("chat_template.jinja", TOOL_TEMPLATE, "generation_config.json"):
            if run.base != first.base or text_of(run.adapter, file) != text_of(first.adapter, file):
                raise MoultError(
                    f"{run.name} and {first.name} cannot be served together: they differ in the base model, the "
                    "chat template or the stop tokens, which a server has one of",
                    "serve them apart",
                )
    names = [name, *(run.name for run in runs[1:])]
    ranks = [read_json(run.plan)["serve"]["max_lora_rank"] for run in runs]
    adapters = {name: run.adapter for name, run in zip(names, runs, strict=True)}
    base = public_name(settings["model"]["name"])
    return Served(base if base not in adapters else f"{base}-base", first.base, adapters, max(ranks))


def export_to_serve(folder: str, format: str, run: str, name: str) -> Served:
    """The export of a run in its folder (`exports/<format>/model`), under a name of the API."""
    target = f"results/{run}/exports/{format}/export.json"
    if format in COMPRESSED:
        return Served(name, need(folder, "config.json", run, target))
    need(folder, gguf_file(run, format), run, target)
    made = f"{folder}/{gguf_file(run, format)}"
    return Served(name, f"{folder}/{BASE_FILE}", {name: made}) if format == ADAPTER else Served(name, made)


def settings_of_export(settings: dict, format: str) -> dict:
    """The settings of a run, with the engine that serves an export of this format."""
    own = {} if format in COMPRESSED else {"engine": LLAMA_CPP}
    return {**settings, "serve": {**settings["serve"], **own}}


def text_of(folder: str, file: str) -> str | None:
    """The text of a file that need not be there."""
    path = Path(folder, file)
    return path.read_text(encoding="utf-8") if path.exists() else None


def need(folder: str, file: str, run: str, target: str | None = None) -> str:
    if not Path(folder, file).exists():
        raise MoultError(
            f"{folder} is not there", f"make it: snakemake --cores 1 {target or f'results/{run}/metrics.json'}"
        )
    return str(folder)


# --- the command ------------------------------------------------------------------------------------------------------


def engine_command(settings: dict, served: Served, host: str, port: int) -> Command:
    engines = {"vllm": vllm_command, "transformers": transformers_command, LLAMA_CPP: llama_cpp_command}
    return engines[settings["serve"]["engine"]](settings, served, host, port)


def vllm_command(settings: dict, served: Served, host: str, port: int) -> Command:
    python = settings["serve"]["python"] or sys.executable
    return Command([python, "-m", "vllm.entrypoints.openai.api_server", *vllm_arguments(settings, served, host, port)])


def vllm_arguments(settings: dict, served: Served, host: str, port: int) -> list[str]:
    """What vLLM is told. The API key is not here, where every user of the machine could read it."""
    serve, model = settings["serve"], settings["model"]
    command = ["--model", served.model, "--served-model-name", served.name]
    command += ["--host", host, "--port", str(port), "--dtype", model["dtype"]]
    command += ["--max-model-len", str(serve["max_model_len"] or "auto")]
    if served.adapters:
        command += ["--enable-lora", "--max-lora-rank", str(served.max_lora_rank)]
        command += ["--lora-modules", *(f"{name}={folder}" for name, folder in served.adapters.items())]
        first = next(iter(served.adapters.values()))
        command += adapter_arguments(first, first)
    if model["chat_template_kwargs"]:
        command += ["--default-chat-template-kwargs", as_json(model["chat_template_kwargs"])]
    if model["trust_remote_code"]:
        command.append("--trust-remote-code")
    for name, value in sorted(serve["vllm"].items()):
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            command += [f"--{flag}", *map(str, value)]
        else:
            command += [f"--{flag}", as_json(value) if isinstance(value, dict) else str(value)]
    return command


def adapter_arguments(folder: str, place: str) -> list[str]:
    """What vLLM, which looks for it in the base's folder only, is told of the adapter in `folder`, by then at `place`."""
    command = []
    # Told of one, vLLM takes it with tools, too. A run that has one for tools has both of its base, where vLLM finds them.
    if Path(folder, "chat_template.jinja").exists() and not Path(folder, TOOL_TEMPLATE).exists():
        command += ["--chat-template", f"{place}/chat_template.jinja"]
    if Path(folder, "generation_config.json").exists():
        command += ["--generation-config", place]
    return command


def as_json(value: dict) -> str:
    """Without quotes and dollars that a shell or Docker Compose would take for their own."""
    return json.dumps(value, sort_keys=True).replace("'", "\\u0027").replace("$", "\\u0024")


def transformers_command(settings: dict, served: Served, host: str, port: int) -> Command:
    """Moult's own server, with the Python that runs this and the library that this is from."""
    arguments = ["--model", served.model, "--name", served.name, "--host", host, "--port", str(port)]
    arguments += ["--settings", json.dumps(settings["model"], sort_keys=True)]
    if settings["serve"]["max_model_len"]:
        arguments += ["--max-model-len", str(settings["serve"]["max_model_len"])]
    if len(served.adapters) > 1:
        raise MoultError("the engine transformers serves one adapter", "set serve.engine: vllm, or name one run")
    for name, folder in served.adapters.items():
        arguments += ["--adapter", folder, "--adapter-name", name]
    return own_command(settings, "transformers_server", arguments)


def llama_cpp_command(settings: dict, served: Served, host: str, port: int) -> Command:
    """The llama-server of an own llama.cpp if it is built there, or else that of the environment of the exports."""
    arguments = ["--model", served.model, "--alias", served.name, "--host", host, "--port", str(port)]
    arguments += ["--ctx-size", str(settings["serve"]["max_model_len"] or 0), "--parallel", str(SLOTS), "--kv-unified"]
    for file in served.adapters.values():
        arguments += ["--lora", file]
    if settings["model"]["chat_template_kwargs"]:
        arguments += ["--chat-template-kwargs", as_json(settings["model"]["chat_template_kwargs"])]
    built = Path(settings["export"]["llama_cpp"] or "", "build", "bin", "llama-server")
    if settings["export"]["llama_cpp"] and built.exists():
        return Command([str(built), *arguments])
    return own_command(settings, "llamacpp_server", arguments)


def own_command(settings: dict, server: str, arguments: list[str]) -> Command:
    """A server of this library. An export needs the Python of its environment."""
    python = settings.get("export", {}).get("python") or sys.executable
    scripts = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([scripts, *filter(None, [os.environ.get("PYTHONPATH")])])
    # -P: no module is looked for in the working directory.
    return Command([python, "-P", "-m", f"moult.serving.{server}", *arguments], environment={"PYTHONPATH": path})


# --- addresses --------------------------------------------------------------------------------------------------------


def address(host: str, port: int) -> str:
    """The URL that reaches a server which listens there."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def check_exposed(host: str, key: str | None, variable: str) -> None:
    """Raises MoultError where others could ask the server and no key keeps them out."""
    if host not in LOOPBACK and not key:
        raise MoultError(
            f"serve.host: {host} can be reached from other machines, and there is no API key",
            f"put a key into the environment variable {variable}, or set serve.host: 127.0.0.1",
        )


def free_port() -> int:
    """A port that nobody listens on. If somebody takes it before the engine does, that ends and says so."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_port(host: str, port: int) -> None:
    """Raises MoultError, saying by what, if the port is taken."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except socket.gaierror as error:
        raise MoultError(f"serve.host: {host}: {error.strerror}", "give an address of this machine") from None
    except PermissionError:
        raise MoultError(f"serve.port: {port} is not open to this user", "take one above 1023") from None
    except OSError as error:
        taken = f"port {port} is taken by {listener(port)}" if port_is_taken(error) else f"{host}: {error.strerror}"
        raise MoultError(taken, "stop that, or set another serve.port or serve.host") from None


def port_is_taken(error: OSError) -> bool:
    return "in use" in os.strerror(error.errno or 0)


def listener(port: int) -> str:
    """Who listens on a port: a name and a process id, as far as this user may see."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            rows = [line.split() for line in Path(table).read_text().splitlines()[1:]]
            inodes |= {row[9] for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port}
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for file in Path("/proc").glob("[0-9]*/fd/*") if wanted else []:
        with contextlib.suppress(OSError):  # other users' processes, and files that are closed meanwhile
            if str(file.readlink()) in wanted:
                return f"{Path(*file.parts[:3], 'comm').read_text().strip()} (process {file.parts[2]})"
    return "another process"


# --- the process ------------------------------------------------------------------------------------------------------


class Server:
    """An engine as a child process, ended with all that it has started when the block ends, however it ends.

    The engine has a session of its own, so that Ctrl-C reaches this process only, which then ends it in order. If this
    process is killed, a guard ends that process group: vLLM's server, asked politely while it starts, stays (0.32).
    """

    def __init__(self, command: Command, url: str, log, key: str | None = None, threads: int | None = None):
        self.command, self.url, self.log = command.arguments, url, log
        self.environment = {name: value for name, value in os.environ.items() if name not in KEYS}
        self.environment |= {"VLLM_NO_USAGE_STATS": "1", "PYTHONUNBUFFERED": "1", **command.environment}
        if threads:
            self.environment |= dict.fromkeys(("OMP_NUM_THREADS", "LLAMA_ARG_THREADS"), str(threads))
        if key:
            self.environment |= dict.fromkeys(KEYS, key)
        self.last_lines: collections.deque[str] = collections.deque(maxlen=500)

    def __enter__(self) -> "Server":
        self.log.debug("starting %s", " ".join(self.command))
        try:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )
        except OSError as error:
            raise MoultError(
                f"{self.command[0]}: {error.strerror}", "set serve.python to the Python that has vLLM"
            ) from None
        try:
            # It reads what is never written, to the end that comes with the end of this process.
            guard = ["sh", "-c", 'read -r line; kill -s KILL -- "-$0"', str(self.process.pid)]
            self.guard = subprocess.Popen(
                guard,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except BaseException:  # a signal, before there is a guard
            os.killpg(self.process.pid, signal.SIGKILL)
            raise
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        return self

    def _read(self) -> None:
        for raw in self.process.stdout or ():
            line = raw.decode(errors="replace").rstrip()
            if line:
                self.last_lines.append(line)
                self.log.debug("engine: %s", line)

    def wait_ready(self, seconds: float) -> float:
        """Wait until /health answers 200, and return how long it took. Raises MoultError where it does not come to that."""
        import requests

        started = time.monotonic()
        while time.monotonic() - started < seconds:
            if self.ended():
                tail, fix = self.tail(), "fix what they say"
                if re.search("No module named '?vllm", tail):
                    fix = (
                        "set serve.python to a Python that has vLLM, or serve.engine: transformers for a trial on a CPU"
                    )
                if re.search("No module named '?(xllamacpp|compressed_tensors)", tail):
                    fix = EXPORTS[-1]
                raise MoultError(
                    f"the server ended with {self.end()} before it was ready. Its last lines:\n{tail}", fix
                )
            with contextlib.suppress(requests.RequestException), requests.Session() as session:
                session.trust_env = False  # no proxy is on the way to this machine
                if session.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return time.monotonic() - started
            time.sleep(0.2)
        raise MoultError(
            f"the server was not ready after {seconds:g} seconds. Its last lines:\n{self.tail()}",
            "raise serve.start_timeout if it was still loading",
        )

    def ended(self) -> bool:
        return self.process.poll() is not None

    def end(self) -> str:
        """How it ended, in words."""
        code = self.process.wait()
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def tail(self) -> str:
        if self.ended():
            self.reader.join(timeout=2)
        # The cause often stands far above the end, in the traceback of another process.
        lines = list(self.last_lines)
        errors = [line for line in lines[:-5] if re.search(r"(Error|Exception|error): \S", line)]
        return "\n".join(f"  {line[:400]}" for line in [*errors[-5:], *lines[-5:]]) or "  (it said nothing)"

    def __exit__(self, *error) -> None:
        # A second signal must not interrupt this.
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        try:
            self.process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self.log.warning("the server has not ended %d seconds after SIGTERM, and is killed", PATIENCE)
        finally:
            # vLLM's engine is a process of its own: whatever is left of the session goes.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.guard.kill()
            self.process.wait()
            self.guard.wait()
            if self.guard.stdin:
                self.guard.stdin.close()
