"""Get what a benchmark asks, so that the benchmark itself needs no network.

    /opt/lm-eval/bin/python scripts/fetch_benchmark.py --settings '{"task": "gsm8k"}' --data results/benchmarks/gsm8k \\
        --items results/benchmarks/gsm8k.jsonl --metadata results/benchmarks/gsm8k.json

Beside fetch_dataset. Runs in the Python that has lm-eval, which loads the task as it will to ask it; so a task that cannot be
loaded is found out here, before anything is trained. --data gets the caches of huggingface_hub and datasets. --items gets a line
for each question. The metadata records versions, and the commit of each dataset. For a task with local data nothing is
downloaded.
"""

from importlib.metadata import version
from pathlib import Path

from moult.files import atomic_folder, sha256_file, write_json, write_jsonl
from moult.measuring.harness import commits, keep_data_in, load_tasks, metrics_of, questions, stay_offline
from moult.network import hub_errors, set_up_hub
from moult.run.cli import stage_parser
from moult.run.stage import stage
from moult.workflow.benchmarks import FORMATS, read_task


def main() -> None:
    parser = stage_parser(__doc__, "fetch_benchmark", reads="task or path")
    parser.add_argument("--data", required=True, help="folder to write: what was downloaded")
    parser.add_argument("--items", required=True, help="questions to write (.jsonl)")
    parser.add_argument("--metadata", required=True, help="JSON to write: versions, commits")
    parser.add_argument("--tls", default="verify", help="how to check the hub's certificate: verify, off, or a CA file")
    args = parser.parse_args()

    path = args.settings.get("path")
    is_local = bool(path) and read_task(path)["dataset_path"] in FORMATS
    with stage("fetch_benchmark", args.log_file, args.settings, online=not is_local) as log:
        fetch(args.settings, args, log, is_local)


def fetch(where: dict, args, log, is_local: bool) -> None:
    name = where.get("path") or where["task"]
    Path(args.data).parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(args.data) as folder:
        keep_data_in(folder)
        if is_local:
            stay_offline()
            tasks = load_tasks(where)[1]
        else:
            set_up_hub(args.tls)
            with hub_errors("eval.benchmarks", name, None, "dataset"):
                tasks = load_tasks(where)[1]
        write_jsonl(args.items, questions(tasks))
        metrics, others = metrics_of(tasks)
        facts = {
            "tasks": {
                task: {"version": str(one.VERSION), "questions": len(one.eval_docs)} for task, one in tasks.items()
            },
            "metrics": [metric["name"] for metric in metrics],
            "not_compared": others,
            "commits": commits(folder),
            "versions": {package: version(package) for package in ("lm_eval", "datasets")},
        }
    write_json(args.metadata, {"schema_version": 1, **where, **facts, "sha256": sha256_file(args.items)})
    counted = sum(task["questions"] for task in facts["tasks"].values())
    log.info("%s: %s questions of %d task%s", name, f"{counted:,}", len(tasks), "s" if len(tasks) > 1 else "")


if __name__ == "__main__":
    main()
