"""Hold an export against the merged model, which evaluate has measured: is this still the model, in other bytes?

    .venv-export/bin/python scripts/evaluate_export.py --settings '{"eval": {...}, ...}' --run demo --format gguf-q8_0 \\
        --export results/demo/exports/gguf-q8_0/model --made results/demo/exports/gguf-q8_0/made.json ...

The rule evaluate_export runs it, and `snakemake -p` prints the whole command. First in this process, then through a server of
the engine that the format is for:

files                the folder is what export_gguf or export_compressed made, of this merged model
divergence           KL(merged || export) at all positions of the rows of evaluate's merge check is below the format's limit, or
                     export.kl_limit
ready ... alive      the checks of smoke_test. The answers of a format that loses much may be others than the merged model's;
                     its prompt tokens and, where it gives the same answer, its stop reasons may not

If all hold, all questions that evaluate has asked are asked by the same tokens, and the answers kept in the same form, with
the likelihood of the test rows and of the general text: score_export compares them. The result is a JSON as smoke_test's: if a
check failed, the exit code is 1, and it is <name>.failed.json.

llama.cpp applies an adapter only in its server. So an adapter-gguf has no divergence and no likelihood, but answers; and
export_gguf has compared its tensors with the adapter's.
"""

import gc
import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from moult.data.sequence import IGNORE
from moult.data.token_file import rows_of
from moult.errors import MoultError
from moult.files import changed_files, read_json, read_jsonl, write_jsonl
from moult.measuring.answers import window_of
from moult.measuring.divergence import divergence, kept_logits, one_logits
from moult.measuring.gguf_logits import GgufModel
from moult.measuring.likelihood import Likelihood, likelihood
from moult.measuring.rows import chosen, general_sequences, measured_rows, measured_texts
from moult.model.chat import Chat, prints_date
from moult.model.device import enough_memory, limit_threads, load_model, pick, versions
from moult.model.manifest import open_model
from moult.run.cli import stage_parser
from moult.run.console import progress
from moult.run.stage import stage
from moult.serving.checks import CannotTell, ServerTest, tolerance_of_export
from moult.serving.client import Client, Failed
from moult.serving.launch import (
    SLOTS,
    Served,
    Server,
    address,
    engine_command,
    export_to_serve,
    free_port,
    settings_of_export,
)
from moult.serving.questions import read_questions
from moult.workflow.exports import ADAPTER, FORMATS, GGUF, kl_limit

NO_KL = "llama.cpp applies an adapter in its server only, which tells no logits"

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "compressed-tensors", "cyllama", "xllamacpp", "vllm")


class Measured(NamedTuple):
    """What was measured in this process: the JSON of the divergence (None: not measured), the lines of two outputs, and how many
    tokens the model has positions for (None: the server tells)."""

    kl: dict | None
    likelihood: list[dict]
    general: list[dict]
    window: int | None


class Export(NamedTuple):
    """An export whose logits can be had: of a row at most `most`, and the likelihood of sequences."""

    logits: Callable
    likelihood: Callable[[list[dict], str], list[Likelihood]]


def main() -> None:
    parser = stage_parser(__doc__, "evaluate_export", threads="CPU threads")
    parser.add_argument("--run", required=True, help="name of the run")
    parser.add_argument("--format", required=True, choices=FORMATS, help="format of the export")
    parser.add_argument("--export", required=True, help="the export's folder")
    parser.add_argument("--made", required=True, help="made.json: hashes of the export and of what it was made of")
    parser.add_argument("--base", required=True, help="manifest or folder of the base model, for its tokenizer")
    parser.add_argument("--merged", required=True, help="merged model's folder")
    parser.add_argument("--merge", required=True, help="merge.json: hashes of the merged model and the adapter")
    parser.add_argument("--tokens", required=True, help="folder with the tokens that encode wrote")
    parser.add_argument("--tuned", required=True, help="folder with what evaluate measured of the merged model")
    parser.add_argument("--rows", required=True, help="test.jsonl: the test rows' messages")
    parser.add_argument("--likelihood", required=True, help="output: one line per test sequence (.jsonl)")
    parser.add_argument("--answers", required=True, help="output: one line per answer (.jsonl)")
    parser.add_argument("--general", required=True, help="output: one line per general text (.jsonl)")
    parser.add_argument("--check", required=True, help="output: the checks (.json)")
    args = parser.parse_args()

    with stage("evaluate_export", args.log_file, args.settings) as log:
        # Snakemake removes what this stage has made before, and not the verdict that was made of it.
        Path(args.check).with_name("export.json").unlink(missing_ok=True)
        evaluate_export(args, log)


def evaluate_export(args, log) -> None:
    limit_threads(args.threads)
    settings, model = settings_of_export(args.settings, args.format), args.settings["model"]
    made, merge, report = (read_json(path) for path in (args.made, args.merge, Path(args.tokens, "report.json")))
    template = Path(args.tokens, "chat_template.jinja").read_text(encoding="utf-8") or None
    chat = Chat(str(open_model(args.base)[0]), template, model["chat_template_kwargs"], model["trust_remote_code"])
    dated = chat if prints_date(template) else None
    tuned = list(read_jsonl(Path(args.tuned, "answers.jsonl")))
    questions = read_questions(
        str(Path(args.tuned, "answers.jsonl")), args.rows, settings["eval"]["prompts"], template is not None, dated
    )
    served = export_to_serve(args.export, args.format, args.run, settings["serve"]["served_model_name"] or args.run)
    lead, drift = tolerance_of_export(args.format)
    port, key = free_port(), secrets.token_urlsafe(24)
    test = ServerTest(Client(address("127.0.0.1", port), key, served.name), questions, lead, drift, dated)
    if not test.check("files", partial(check_files, args.export, args.format, made, merge), log):
        return keep(args, test, None, None, log)
    device = pick()
    found = measure(args, served, chat, report["pad_token_id"], device)
    test.check("divergence", partial(check_divergence, found.kl, kl_limit(args.format, settings["export"])), log)
    asked = settings["eval"]["max_new_tokens"]
    if args.format in GGUF:
        longest = max(len(row["prompt_ids"]) for row in tuned) + asked
        settings["serve"] = {**settings["serve"], "max_model_len": longest * SLOTS}  # which they share
    log.info("starting %s with %s", settings["serve"]["engine"], served.model)
    command = engine_command(settings, served, "127.0.0.1", port)
    with Server(command, test.client.url, log, key, args.threads) as test.server:
        test.run(lambda: test.server.wait_ready(settings["serve"]["start_timeout"]), log)
        answers = []
        if all(check.passed is not False for check in test.checks.values()):
            window = min(filter(None, (found.window, test.max_model_len)))
            stop = report["stop"]["generation_stop_ids"]
            answers = ask_all(test.client, tuned, chat, stop, asked, window)
    keep(args, test, found.kl, device, log)
    write_jsonl(args.likelihood, found.likelihood)
    write_jsonl(args.general, found.general)
    write_jsonl(args.answers, answers)


def check_files(folder: str, format: str, made: dict, merge: dict) -> str:
    if differ := changed_files(folder, made["files"]):
        raise Failed(f"{folder} is not what was made: {', '.join(differ)} differ")
    wanted = merge["adapter" if format == ADAPTER else "files"]
    if made["made_from"] != wanted:
        raise Failed(f"{folder} was made of another model than the one that is merged now")
    return f"{len(made['files'])} as they were made, of this run's model"


# --- in this process --------------------------------------------------------------------------------------------------


def measure(args, served: Served, chat: Chat, pad_id: int, device: str) -> Measured:
    """The divergence from the merged model, and the likelihoods that evaluate has measured of that."""
    settings, rows = args.settings["eval"], rows_of(Path(args.tokens, "test.parquet"))
    if args.format == ADAPTER:
        return Measured(None, [], [], None)
    merged = load_model(args.merged, device, args.settings["model"]).eval()
    window = window_of(merged)
    measured = chosen(rows, settings["max_rows"]) if settings["perplexity"] else []
    texts = general_sequences(chat, window) if settings["forgetting"] else []
    compared = [every_position(row) for row in chosen(rows, settings["merge_check_rows"])]
    longest = max(len(row["input_ids"]) for row in [*measured, *texts, *compared])
    with enough_memory(
        f"comparing rows of up to {longest:,} tokens", "lower datasets.<name>.max_length, or use a GPU with more memory"
    ):
        compared, of_merged = kept_logits(merged, compared, pad_id)
        merged.to("meta")  # the models need not fit into memory together
        export = open_export(args, served, longest, pad_id, device)
        lengths = [len(logits) for logits in of_merged]
        pairs = counted(zip(compared, lengths, strict=True), len(compared), "rows against the merged model")
        kl = divergence(of_merged, (export.logits(row, most) for row, most in pairs))
        found = Measured(
            {**kl, "rows": len(compared), "positions": sum(lengths)},
            measured_rows(measured, export.likelihood(measured, "test rows: likelihood")),
            measured_texts(texts, export.likelihood(texts, "general text: likelihood")),
            window,
        )
    del export, merged
    free_memory()
    return found


def every_position(row: dict) -> dict:
    """The row with all of its tokens scored: of what a model is trained on it is so sure that other weights hardly show."""
    ids = row["input_ids"]
    return {"input_ids": ids, "labels": [IGNORE, *ids[1:]]}


def open_export(args, served: Served, longest: int, pad_id: int, device: str) -> Export:
    """By the engine that it is for; of those for vLLM, transformers and compressed-tensors compute the same."""
    if args.format in GGUF:
        gguf = GgufModel(served.model, longest, args.threads)
        return Export(gguf.one_logits, gguf.likelihood)
    model = load_model(served.model, device, args.settings["model"]).eval()
    return Export(
        lambda row, most: one_logits(model, row, pad_id, most),
        lambda sequences, what: likelihood(model, sequences, pad_id, what),
    )


def counted(items: Iterable, count: int, what: str) -> Iterator:
    """The items, with a progress bar."""
    with progress(count, what) as bar:
        for item in items:
            yield item
            bar.update(1)


def free_memory() -> None:
    """A server on this GPU needs what the models had."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_divergence(kl: dict | None, limit: float | None) -> str:
    if kl is None:
        raise CannotTell(NO_KL)
    if not kl["mean_kl"] <= limit:
        raise Failed(
            f"KL(merged || export) is {kl['mean_kl']:.2g} nats per token, over {limit:g}: other weights, or a format that loses "
            "too much of them. Make it again, take a format with more bits, or raise export.kl_limit"
        )
    return (
        f"KL(merged || export) is {kl['mean_kl']:.2g} nats per token (limit {limit:g}; at one position "
        f"{kl['max_kl']:.2g}), and the first choice is the same at {kl['top1_agreement']:.1%} of {kl['positions']:,} positions"
    )


# --- through the server -----------------------------------------------------------------------------------------------


def ask_all(client: Client, tuned: list[dict], chat: Chat, stop: list[int], room: int, window: int) -> list[dict]:
    """The answers to all that evaluate has asked the merged model, in its order and form. Raises MoultError."""
    import requests

    def ask(row: dict) -> dict:
        reply = client.answer(row["prompt_ids"], max(1, min(room, window - len(row["prompt_ids"]))))
        ids = reply.ids or []
        text = chat.decode(ids[:-1] if ids and ids[-1] in stop else ids, special=False)
        return {
            **row,
            "answer": text,
            "token_ids": ids,
            "stopped": reply.reason == "stop",
            "prompt_nll": None,  # a server need not tell them
            "margins": [],
        }

    pool = ThreadPoolExecutor(SLOTS)
    try:
        return list(counted(pool.map(ask, tuned), len(tuned), "answers"))
    except (Failed, requests.RequestException) as error:
        raise MoultError(f"the server fails to answer: {error}", "see the log") from None
    finally:
        pool.shutdown(cancel_futures=True)


def installed(package: str) -> bool:
    """A server's image has no llama.cpp, and the environment of the exports no vLLM."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def keep(args, test: ServerTest, kl: dict | None, device: str | None, log) -> None:
    """Write the result. Raises MoultError if a check has failed."""
    result = {
        "schema_version": 1,
        "run": args.run,
        "format": args.format,
        "engine": settings_of_export(args.settings, args.format)["serve"]["engine"],
        "kl": kl,
        "kl_limit": kl_limit(args.format, args.settings["export"]),
        "why_no_kl": NO_KL if args.format == ADAPTER else None,
        "questions": test.answers,
        "speed": test.speed,
        "device": device,
        "versions": versions(tuple(filter(installed, PACKAGES))),
    }
    if [name for name, check in test.checks.items() if check.passed is False] == ["ready"]:
        fix = "nothing is known of the export itself: the log has what the server said"
    else:
        fix = "this export is not the model that was measured: {kept} has all that was seen. Remove "
        fix += f"{args.export} and make it again; if that does not help, take another format"
    test.keep(result, args.check, f"{args.format}: the model that was measured", fix, log)


if __name__ == "__main__":
    main()
