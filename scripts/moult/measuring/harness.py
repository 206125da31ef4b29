"""lm-eval, as Moult uses it. Only its own Python has it (eval.lm_eval.python), and only fetch_benchmark and benchmark run there.

lm-eval (0.4.13) chooses the questions, their prompts and the metrics. The model, the template, the tokens that end an answer and
the date are Moult's own, so that a benchmark measures what evaluate measures. What lm-eval would do in silence is counted or
refused: it cuts prompts that are too long, and can run code that a model has written.
"""

import difflib
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from moult.errors import MoultError, some
from moult.measuring.samples import question_in, rows_of
from moult.model.chat import FROZEN_DATE, Chat, on_day

# lm-eval's, where a task does not say (models/huggingface.py, max_gen_toks).
LONGEST_ANSWER = 256


def keep_data_in(folder: str | Path) -> None:
    """Where huggingface_hub and datasets put what they download; they read it when they are imported."""
    folder = Path(folder).absolute()
    os.environ |= {
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "HF_MODULES_CACHE": str(folder / "modules"),
    }


def stay_offline() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def load_tasks(where: dict) -> tuple:
    """(TaskManager, {name: Task}) of {"task": name} or {"path": file}. Raises MoultError for what lm-eval does not know, cannot
    load, or would run code of a model for."""
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError
    from lm_eval.tasks import TaskManager

    name = where.get("path") or where["task"]
    manager = TaskManager(include_defaults="task" in where)
    if "task" in where and name not in manager.task_index:
        close = difflib.get_close_matches(name, manager.all_tasks, 3)
        raise MoultError(
            f"eval.benchmarks: lm-eval {version('lm_eval')} knows no task {name}"
            + (f"; did you mean {some(close)}?" if close else ""),
            "lm-eval ls tasks lists those that it knows; a task of your own takes path instead of task",
        )
    # Before it is loaded: that alone would fetch what runs the code.
    if "task" in where and (manager.task_index[name].cfg or {}).get("unsafe_code"):
        raise MoultError(f"eval.benchmarks: {name} runs code that the model has written", "leave it out")
    try:
        tasks = manager.load([name])["tasks"]
    except (
        FileNotFoundError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        TemplateError,
        DatasetsError,
    ) as error:
        why = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        raise MoultError(
            f"eval.benchmarks: lm-eval cannot load {name}: {why}", "fix the task, or leave it out"
        ) from error
    for task in tasks.values():
        if getattr(task, "UNSAFE_CODE", False):
            raise MoultError(f"eval.benchmarks: {task.task_name} runs code that the model has written", "leave it out")
        if getattr(task, "MULTIMODAL", False):
            raise MoultError(f"eval.benchmarks: {task.task_name} shows images or sounds", "leave it out")
    return manager, dict(sorted(tasks.items()))


def questions(tasks: dict) -> Iterator[dict]:
    """{task, doc_id, question} of all questions, for the search in the training rows."""
    for name, task in tasks.items():
        for number, doc in enumerate(task.eval_docs):
            yield {"task": name, "doc_id": number, "question": question_in(doc, task.doc_to_text(doc))}


def commits(folder: Path) -> dict[str, list[str]]:
    """{dataset: commits} of what was downloaded into a folder of `keep_data_in`."""
    from huggingface_hub import scan_cache_dir

    if not (folder / "hub").is_dir():
        return {}
    found = scan_cache_dir(folder / "hub").repos
    return {repo.repo_id: sorted(revision.commit_hash for revision in repo.revisions) for repo in found}


def metrics_of(tasks: dict) -> tuple[list[dict], list[str]]:
    """([{name, higher_is_better}] of the metrics that are a mean over the questions, the names of the others).

    The first is the one that a task names first, with its first filter. Tasks of a group have those that all of them have.
    """
    of_tasks: list[dict[str, dict]] = []
    for task in tasks.values():
        better, how = task.higher_is_better(), task.aggregation()
        names = [(f"{metric},{part.name}", metric) for metric in how for part in task._filters]
        of_tasks.append(
            {
                name: {"name": name, "higher_is_better": bool(better.get(metric, True)), "mean": is_mean(how[metric])}
                for name, metric in names
            }
        )
    common = [one for name, one in of_tasks[0].items() if all(name in other for other in of_tasks)]
    return (
        [{"name": one["name"], "higher_is_better": one["higher_is_better"]} for one in common if one["mean"]],
        [str(one["name"]) for one in common if not one["mean"]],
    )


def is_mean(aggregation) -> bool:
    return getattr(aggregation, "__name__", "") == "mean"


def ask(model, chat: Chat, manager, tasks: dict, asked: dict, batch_size: int) -> tuple[list[dict], dict]:
    """(a row for each question, what is to be told of them).

    Args:
        model: of transformers, on its device.
        chat: the base's tokenizer with the run's template, for the base and for the merged model.
        asked: limit and num_fewshot.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import GenerationConfig

    # Not the generation config of the model: base and tuned model must be asked in the same way.
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=ends(chat), pad_token_id=chat.pad_id)
    chat.tokenizer.chat_template = chat.template
    lm = HFLM(
        pretrained=model, tokenizer=chat.tokenizer, batch_size=batch_size, chat_template_args=dict(chat.template_kwargs)
    )
    check_room(tasks, lm.max_length)
    with on_day(chat.template, FROZEN_DATE):
        found = simple_evaluate(
            model=lm,
            tasks=list(tasks.values()),
            task_manager=manager,
            limit=asked["limit"],
            num_fewshot=asked["num_fewshot"],
            apply_chat_template=chat.template is not None,
            bootstrap_iters=0,
        )
    metrics, others = metrics_of(tasks)
    if not metrics:
        raise MoultError(
            f"eval.benchmarks: no metric of {some(list(tasks))} is a mean over the questions ({some(others) or 'none'})",
            "leave it out: the difference between two models has no interval then",
        )
    samples = found["samples"]
    told = {
        "metrics": metrics,
        "not_compared": others,
        "tasks": {
            name: {
                "version": str(found["versions"].get(name)),
                "num_fewshot": found["n-shot"].get(name),
                "questions": len({sample["doc_id"] for sample in samples[name]}),
            }
            for name in tasks
        },
        "cut": sum(is_cut(lm, sample) for name in tasks for sample in first_filter(samples[name])),
        "stop_token_ids": ends(chat),
    }
    return rows_of({name: samples[name] for name in tasks}), told


def ends(chat: Chat) -> list[int]:
    """The tokens that end an answer: those of the base's own settings, and the one that the template ends a turn with."""
    if chat.template is None:
        return sorted(chat.stop_ids)
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    behind = chat.ids(chat.render(turns, None, prompt=False).rpartition("answer")[2])
    return sorted(chat.stop_ids | set([token for token in behind if token in chat.special_ids][:1]))


def check_room(tasks: dict, window: int) -> None:
    """Raises MoultError for a task whose answers may be as long as the model's window."""
    for name, task in tasks.items():
        room = answer_room(task.get_config("generation_kwargs")) if task.OUTPUT_TYPE == "generate_until" else 0
        if room >= window:
            raise MoultError(
                f"eval.benchmarks: {name}: answers of up to {room:,} tokens, and the model reads at most {window:,}",
                "set generation_kwargs: {max_gen_toks: ...} in a task of your own, or leave the task out",
            )


def answer_room(generation: dict | None) -> int:
    """The longest answer, in tokens, under the names that lm-eval takes for it."""
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    given = generation or {}
    return int(next((given[name] for name in names if given.get(name)), LONGEST_ANSWER))


def is_cut(lm, sample: dict) -> bool:
    """Whether lm-eval has cut the beginning off a prompt of this question, because it is longer than the model reads."""
    for context, rest in sample["arguments"]:
        room = answer_room(rest) if isinstance(rest, dict) else len(lm.tok_encode(rest, add_special_tokens=False)) - 1
        if len(lm.tok_encode(context)) + room > lm.max_length:
            return True
    return False


def first_filter(samples: list[dict]) -> list[dict]:
    return [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
