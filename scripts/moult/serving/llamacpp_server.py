"""llama.cpp's own server for a GGUF, as the package xllamacpp has it. An own llama-server does as well (export.llama_cpp).

    PYTHONPATH=scripts .venv-export/bin/python -m moult.serving.llamacpp_server --alias demo --port 8080 \\
        --model results/demo/exports/gguf-q8_0/model/demo-Q8_0.gguf

scripts/tools/serve.py and scripts/evaluate_export.py start it. The options are those of llama-server that they need, by its
names; so are the environment variables: with LLAMA_API_KEY, requests need that key, and LLAMA_ARG_THREADS is the number of
threads. Nothing of the GGUF is replaced: its template, its stop tokens.
"""

import json
import os
import signal
import threading

from moult.run.cli import tool_parser


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("--model", required=True, help="GGUF file")
    parser.add_argument("--alias", required=True, help="the model's name in the API")
    parser.add_argument("--lora", help="GGUF file of an adapter")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8080, help="port to listen on")
    parser.add_argument("--ctx-size", type=int, default=0, help="tokens of all requests at a time; 0: the model's")
    parser.add_argument("--parallel", type=int, default=4, help="requests that are answered at a time")
    parser.add_argument(
        "--kv-unified", action="store_true", help="they share the context, and none has a part of its own"
    )
    parser.add_argument("--chat-template-kwargs", type=json.loads, default={}, help="JSON: variables of the template")
    args = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(0))
    server = start(args)
    print(f"ready on {server.listening_address}", flush=True)
    threading.Event().wait()


def start(args):
    """The server, which answers in threads of its own. It has read the model by then."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = args.model
    settings.model_alias = {args.alias}
    settings.hostnames, settings.port = [args.host], args.port
    settings.n_ctx, settings.n_parallel, settings.kv_unified = args.ctx_size, args.parallel, args.kv_unified
    settings.use_jinja = True
    # As JSON, each: so llama-server keeps what --chat-template-kwargs says.
    settings.default_template_kwargs = {name: json.dumps(value) for name, value in args.chat_template_kwargs.items()}
    if args.lora:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(args.lora, 1.0)]
    if key := os.environ.pop("LLAMA_API_KEY", ""):
        settings.api_keys = [key]
    if threads := os.environ.get("LLAMA_ARG_THREADS"):
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = int(threads)
    return xllamacpp.Server(settings)


if __name__ == "__main__":
    main()
