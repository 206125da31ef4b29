"""Ask a model the questions of a benchmark of lm-eval.

    /opt/lm-eval/bin/python scripts/run_benchmark.py --settings '{"dtype": "bfloat16", "batch_size": 16, ...}' \\
        --benchmark '{"task": "gsm8k", "limit": 200, "num_fewshot": null}' --model results/demo/merged --base config/demo/base \\
        --template results/demo/tokens/chat_template.jinja --data results/benchmarks/gsm8k \\
        --samples results/demo/benchmark_tuned/gsm8k.jsonl --summary results/demo/benchmark_tuned/gsm8k.json

The rules benchmark_base and benchmark_tuned run it, in the Python that has lm-eval; score compares the two. Always with the
merged model, never with the adapter (lm-eval#2432), and with the run's own template, whatever the model's folder has. Offline:
the questions are what fetch_benchmark has downloaded. Decoding is greedy where the task does not say otherwise.
"""

import json
from importlib.metadata import version
from pathlib import Path

from moult.files import write_json, write_jsonl
from moult.measuring.harness import ask, keep_data_in, load_tasks, stay_offline
from moult.model.chat import Chat, template_sha256
from moult.model.device import enough_memory, limit_threads, load_model, pick
from moult.model.manifest import open_model
from moult.run.cli import stage_parser
from moult.run.stage import stage


def main() -> None:
    parser = stage_parser(__doc__, "<rule>_<benchmark>", threads="CPU threads")
    parser.add_argument("--benchmark", type=json.loads, required=True, help="JSON: task or path, limit, num_fewshot")
    parser.add_argument("--model", required=True, help="manifest or folder of the model to ask")
    parser.add_argument("--base", required=True, help="manifest or folder of the base model, for its tokenizer")
    parser.add_argument("--template", required=True, help="chat template of the run, as encode has written it")
    parser.add_argument("--data", required=True, help="folder that fetch_benchmark has written")
    parser.add_argument("--samples", required=True, help="output: one line per question (.jsonl)")
    parser.add_argument("--summary", required=True, help="output: what was asked, and how (.json)")
    parser.add_argument(
        "--gpus", type=int, default=1, help="number of GPUs to spread a model over, where there are GPUs"
    )
    args = parser.parse_args()

    with stage(Path(args.log_file or "benchmark.log").stem, args.log_file, args.settings) as log:
        keep_data_in(args.data)
        stay_offline()
        benchmark(args.settings, args, log)


def benchmark(settings: dict, args, log) -> None:
    limit_threads(args.threads)
    device = pick(args.gpus)
    manager, tasks = load_tasks(args.benchmark)
    template = Path(args.template).read_text(encoding="utf-8") or None
    base = str(open_model(args.base)[0])
    chat = Chat(base, template, settings["chat_template_kwargs"], settings["trust_remote_code"])
    log.info("asking %s on %s", args.model, device)
    model = load_model(str(open_model(args.model)[0]), device, settings, gpus=args.gpus).eval()
    with enough_memory("answering the benchmark", "lower eval.lm_eval.batch_size, or use several GPUs (eval.gpu)"):
        rows, told = ask(model, chat, manager, tasks, args.benchmark, settings["batch_size"])
    if told["cut"]:
        log.warning(
            "%s prompts are longer than the model reads: lm-eval has cut off their beginning", f"{told['cut']:,}"
        )
    write_jsonl(args.samples, rows)
    how = {
        "batch_size": settings["batch_size"],
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device,
        "template_sha256": template_sha256(template),
        "versions": {package: version(package) for package in ("lm_eval", "datasets", "torch", "transformers")},
    }
    write_json(args.summary, {"schema_version": 1, **args.benchmark, **told, **how})
    first = told["metrics"][0]["name"]
    values = [row["values"][first] for row in rows if first in row["values"]]
    log.info("%s: %.4g over %s questions", first, sum(values) / max(1, len(values)), f"{len(values):,}")


if __name__ == "__main__":
    main()
