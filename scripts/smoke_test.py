"""Ask a server what evaluate asked the model: is what is served what was measured?

    python scripts/smoke_test.py --run demo                                      # starts a server, tests it, stops it
    python scripts/smoke_test.py --run demo --base-url http://127.0.0.1:8080     # tests one that runs
    python scripts/smoke_test.py --run demo --configfile mine.yaml
    python scripts/smoke_test.py --run gsm8k gsm8k-r64 --base-url http://127.0.0.1:8080      # one that has both adapters
    python scripts/smoke_test.py --run demo --base-url http://127.0.0.1:11434 --format gguf-q4_k_m     # an export, in Ollama

The rule smoke_test gives all paths and settings; by hand they come from the config. The server is this process's own: it
listens on a free port of this machine, wants a key that nobody else knows, and is gone when this ends. All of
eval.prompts and some test rows go through the API, and what comes back is held against results/<run>/tuned:

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
adapters             with several runs: each adapter answers its own questions as itself while the others answer theirs. All other
                     checks are of the first run
wrong_model, too_long, api_key    each is refused with a 4xx

A template that prints today's date (`strftime_now`) prints it when it is served, and printed another one when the model was
measured. So prompt_tokens holds the server's tokens against those of its own day; and the answers are asked for with the
measured date where the template has a variable for it (Llama's `date_string`), or else cannot be compared.

--base-url may also be llama.cpp's server, or Ollama's API. What these cannot tell does not fail.

The result is a JSON with `passed` of each check: true, false, or null where the server cannot tell. If one failed, the exit
code is 1, and the JSON is not --result but <its name>.failed.json beside it, which Snakemake leaves alone.
"""

import argparse
import math
import os
import secrets
from pathlib import Path

from moult.files import changed_files, read_json
from moult.model.chat import FROZEN_DATE, Chat, prints_date
from moult.model.manifest import open_model
from moult.run.cli import stage_parser
from moult.run.stage import stage
from moult.serving.adapters import check_adapters
from moult.serving.checks import ServerTest, tolerance_of_export
from moult.serving.client import Client, Failed
from moult.serving.launch import Run, Server, address, engine_command, free_port, text_of, what_to_serve
from moult.serving.questions import read_questions
from moult.workflow.exports import FORMATS

# By the coarser dtype of evaluate and server, in nats: by how much the best token may have led where a served answer
# leaves the measured one (bfloat16 has 8 bits: a logit of 20 comes in steps of 0.125), and how far the prompts' likelihood
# per token may be from the measured one. On the demo vLLM is 1e-7 from it in float32 and 1e-3 in bfloat16; the same run
# with another seed, which gives the very same answers, is 5e-2 away.
TOLERANCE = {"float32": (0.01, 0.001), "float16": (0.1, 0.005), "bfloat16": (0.5, 0.02)}


def main() -> None:
    parser = stage_parser(__doc__, "smoke_test", optional=True)
    parser.add_argument(
        "--run",
        nargs="+",
        required=True,
        help="name of the run; with --base-url also of others that the server has adapters of",
    )
    parser.add_argument("--base-url", help="a server that runs already, with or without /v1")
    parser.add_argument(
        "--format", choices=FORMATS, help="with --base-url: what it serves is this export, whose answers may be others"
    )
    parser.add_argument(
        "--configfile", nargs="+", default=[], help="by hand: config files laid over config/config.yaml"
    )
    parser.add_argument("--answers", help="answers.jsonl of the tuned model")
    parser.add_argument("--merge-check", help="merge_check.json of the tuned model: the dtype of its measurement")
    parser.add_argument("--rows", help="test.jsonl: the test rows' messages")
    parser.add_argument("--base", help="manifest or folder of the base model")
    parser.add_argument("--adapter", help="adapter folder")
    parser.add_argument("--merged", help="merged model's folder")
    parser.add_argument("--merge", help="merge.json: hashes of the two folders")
    parser.add_argument("--plan", help="plan.json")
    parser.add_argument("--result", help="JSON to write")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of the server")
    args = parser.parse_args()
    args.run, *others = args.run
    if others and (args.settings or not args.base_url):
        parser.error("several runs need --base-url, a server that has the adapters of all (scripts/tools/serve.py)")

    with stage("smoke_test", args.log_file, args.settings) as log:
        args.key = None
        runs = [args, *(argparse.Namespace(**{**vars(args), "run": run, "result": None}) for run in others)]
        if not args.settings:
            for one in runs:
                fill_in(one)
        smoke_test(runs, log)


def fill_in(args) -> None:
    """By hand: settings and paths from the config, which is read here only: a server's image need not have what reads one."""
    from moult.workflow.runtime import read_config, the_run
    from moult.workflow.stages import places_of, stage_settings

    config = read_config(args.configfile)
    places = places_of(config, the_run(config, args.run))
    args.settings = stage_settings(config, "smoke_test", args.run)
    args.key = os.environ.get(config["runs"][args.run]["serve"]["api_key_env"])
    args.answers, args.merge_check, args.rows = places.tuned_answers, places.merge_check, places.test_rows
    args.base, args.adapter, args.merged = places.model, places.adapter, places.merged
    args.merge, args.plan = places.merge_summary, places.plan
    args.result = args.result or places.smoke_test


def smoke_test(runs: list, log) -> None:
    """Test a server of the first of the runs. The others are run beside it, as adapters."""
    args = runs[0]
    for one in runs:
        one.base = str(open_model(one.base)[0]) if Path(one.base).is_file() else one.base
    served = what_to_serve(args.settings, [Run(one.run, one.base, one.adapter, one.merged, one.plan) for one in runs])
    names = [*served.adapters] or [served.name]
    if args.base_url:
        url = args.base_url if "://" in args.base_url else f"http://{args.base_url}"
        url = url.rstrip("/").removesuffix("/v1")
        tests = {
            one.run: server_test(one, Client(url, args.key, name), bool(served.adapters))
            for one, name in zip(runs, names, strict=True)
        }
        test = tests[args.run]
        test.run(test.client.wait, log)
        if len(tests) > 1:
            test.check("adapters", lambda: check_adapters(tests), log)
    else:
        url, key = address("127.0.0.1", port := free_port()), secrets.token_urlsafe(24)
        log.info("starting %s with %s", args.settings["serve"]["engine"], served.model)
        test = server_test(args, Client(url, key, names[0]), bool(served.adapters))
        test.check("files", lambda: check_files(args, bool(served.adapters)), log)
        command = engine_command(args.settings, served, "127.0.0.1", port)
        with Server(command, url, log, key, args.threads) as test.server:
            test.run(lambda: test.server.wait_ready(args.settings["serve"]["start_timeout"]), log)
    keep(args, served, test, log)


def server_test(args, client: Client, adapted: bool) -> ServerTest:
    """What a run is asked, and how near the answers have to be."""
    settings = args.settings
    template = text_of(args.adapter, "chat_template.jinja")
    # As evaluate rendered. Without a date in the template its tokens are the server's too, and nothing has to be rendered.
    own = (args.base, template, settings["model"]["chat_template_kwargs"], settings["model"]["trust_remote_code"])
    chat = Chat(*own) if prints_date(template) else None
    questions = read_questions(args.answers, args.rows, settings["eval"]["prompts"], template is not None, chat)
    lead, drift = tolerance(settings, read_json(args.merge_check)["dtype"], adapted)
    if args.base_url and args.format:
        lead, drift = tolerance_of_export(args.format)
    return ServerTest(client, questions, lead, drift, chat)


def keep(args, served, test: ServerTest, log) -> None:
    """Write the result. Raises MoultError if a check has failed."""
    dated = [question for question in test.questions if question.prints_date]
    date = {"measured": str(FROZEN_DATE), "prompts": len(dated), "variables": dated[0].variables} if dated else None
    result = {
        "schema_version": 1,
        "run": args.run,
        "engine": args.settings["serve"]["engine"] if not args.base_url else None,
        "serves": "adapter" if served.adapters else "merged",
        "model": test.client.name,
        "tolerance": {"lead": finite(test.lead), "likelihood": finite(test.drift)},
        "date": date,
        "answers": test.answers,
        "speed": test.speed,
        "passed": all(check.passed is not False for check in test.checks.values()),
    }
    fix = "what is served is not what was measured, or does not serve: {kept} has every question with its answers"
    fix += "" if args.base_url else ", the log what the server said"
    test.keep(result, args.result, f"{args.run}: served as measured", fix, log)


def finite(tolerance: float) -> float | None:
    return None if math.isinf(tolerance) else tolerance


def tolerance(settings: dict, measured_in: str, adapted: bool) -> tuple[float, float]:
    """Moult's own server computes in the dtype of evaluate, vLLM in the configured one. What was measured is the merged
    model, whose weights are rounded to the base's dtype: an adapter beside the base is not."""
    dtypes = {measured_in} | ({settings["model"]["dtype"]} if settings["serve"]["engine"] == "vllm" else set())
    dtypes |= {"bfloat16"} if adapted else set()
    return max(TOLERANCE[dtype] for dtype in dtypes)


def check_files(args, adapted: bool) -> str:
    folder = args.adapter if adapted else args.merged
    wanted = read_json(args.merge)["adapter" if adapted else "files"]
    if differ := changed_files(folder, wanted, but=("metadata.json", "README.md")):
        raise Failed(f"{folder} is not what was made: {', '.join(differ)} differ")
    return f"{len(wanted)} as they were written"


if __name__ == "__main__":
    main()
