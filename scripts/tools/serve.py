"""Serve a run's model behind an OpenAI-compatible API, until Ctrl-C.

    make serve RUN=demo                                                    # http://127.0.0.1:8080/v1
    python scripts/tools/serve.py --run demo --configfile mine.yaml
    python scripts/tools/serve.py --run gsm8k gsm8k-r64              # serve.mode: adapter; the API has these names
    make serve RUN=demo FORMAT=gguf-q8_0                                   # an export, by the engine that it is for

No rule calls it: smoke_test starts a server of its own. The engine is serve.engine of the config: vLLM, which has an
environment of its own (serve.python), or Moult's small server on transformers. A GGUF is served by llama.cpp, of the
environment of the exports (export.python) or your own (export.llama_cpp). It says when the server is ready, with a
first request to try. If the engine fails, its last lines are shown. Nothing of it is left behind.
"""

import os
from pathlib import Path

import _library  # noqa: F401

from moult.errors import MoultError, some
from moult.files import changed_files, read_json
from moult.run.cli import tool_parser
from moult.run.stage import stage
from moult.serving.launch import (
    Run,
    Served,
    Server,
    address,
    check_exposed,
    check_port,
    engine_command,
    export_to_serve,
    settings_of_export,
    what_to_serve,
)
from moult.workflow.environments import python_of_exports
from moult.workflow.exports import FORMATS
from moult.workflow.runtime import read_config, the_run
from moult.workflow.stages import places_of, serve_settings


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("--run", nargs="+", required=True, help="the run; several are served as adapters of one base")
    parser.add_argument("--format", choices=FORMATS, help="serve this export of the run")
    parser.add_argument("--configfile", nargs="+", default=[], help="config files laid over config/config.yaml")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all)")
    parser.add_argument("--log-file", help="log file (default: logs/serve.log)")
    args = parser.parse_args()

    with stage("serve", args.log_file) as log:
        config = read_config(args.configfile)
        runs = [as_served(config, the_run(config, name)) for name in args.run]
        settings = serve_settings(config["runs"][args.run[0]])
        if args.format:
            settings, served = of_export(config, args.run, args.format, settings)
        else:
            served = what_to_serve(settings, runs)
        log.debug("settings: %s", settings)
        serve(settings, served, args.threads, log)


def as_served(config: dict, name: str) -> Run:
    places = places_of(config, name)
    return Run(name, places.model, places.adapter, places.merged, places.plan)


def of_export(config: dict, runs: list[str], format: str, settings: dict) -> tuple[dict, Served]:
    """The settings, and what is served, of an export of a run."""
    run, *others = runs
    if others:
        raise MoultError("exports are served one at a time", "name one run")
    export = config["runs"][run]["export"]
    settings = settings_of_export({**settings, "export": {**export, "python": python_of_exports(export)}}, format)
    places = places_of(config, run)
    folder = places.export.format(format=format)
    check_measured(Path(folder), Path(places.export_metrics.format(format=format)))
    return settings, export_to_serve(folder, format, run, settings["serve"]["served_model_name"] or run)


def check_measured(folder: Path, metrics: Path) -> None:
    """Raises MoultError unless the files of an export are those that have passed its checks."""
    if not metrics.exists():
        raise MoultError(
            f"{metrics} is not there: this export is not made, or has not passed its checks",
            f"run: snakemake --cores 1 {metrics}",
        )
    if differ := changed_files(folder, read_json(metrics)["files"]):
        raise MoultError(
            f"{folder}: {some(differ)} is not what was measured",
            f"delete {folder} and run: snakemake --cores 1 {metrics}",
        )


def serve(settings: dict, served: Served, threads: int, log) -> None:
    host, port, variable = (settings["serve"][key] for key in ("host", "port", "api_key_env"))
    key = os.environ.get(variable)
    check_exposed(host, key, variable)
    check_port(host, port)
    names = [*served.adapters] or [served.name]
    url = address(host, port)
    log.info("starting %s with %s", settings["serve"]["engine"], ", ".join([served.model, *served.adapters.values()]))
    with Server(engine_command(settings, served, host, port), url, log, key, threads) as server:
        seconds = server.wait_ready(settings["serve"]["start_timeout"])
        log.info("ready after %.0f s: %s/v1 serves %s; Ctrl-C ends it", seconds, url, ", ".join(names))
        log.info("try: %s", first_request(url, names[0], variable if key else None))
        if server.process.wait() != 0:
            raise MoultError(f"the server ended with {server.end()}. Its last lines:\n{server.tail()}", "see the log")


def first_request(url: str, name: str, variable: str | None) -> str:
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    login = f' -H "Authorization: Bearer ${variable}"' if variable else ""
    return f"curl {url}/v1/chat/completions{login} -H 'Content-Type: application/json' -d '{body}'"


if __name__ == "__main__":
    main()
