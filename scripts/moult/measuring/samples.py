"""What lm-eval logs of each question, as rows of Moult's own: one for each question, not one for each of its filters."""

import json
import math


def rows_of(samples: dict[str, list[dict]]) -> list[dict]:
    """A row for each question of each task, in the order of their numbers.

    Args:
        samples: {task: what simple_evaluate(log_samples=True) has of each question and filter}.

    Returns {task, doc_id, doc_hash, prompt_hash, target, answer, values: {"metric,filter": number}}. `answer` is the text that
    the model has written, or of each choice its log-likelihood. Only metrics that are a finite number for the question are there.
    """
    rows: dict[tuple[str, int], dict] = {}
    for task, logged in samples.items():
        for sample in logged:
            row = rows.setdefault(
                (task, sample["doc_id"]),
                {
                    "task": task,
                    **{key: sample[key] for key in ("doc_id", "doc_hash", "prompt_hash")},
                    "target": str(sample["target"]),
                    "answer": answer_of(sample["resps"]),
                    "values": {},
                },
            )
            for metric in sample["metrics"]:
                if (value := number(sample[metric])) is not None:
                    row["values"][f"{metric},{sample['filter']}"] = value
    return [rows[key] for key in sorted(rows)]


def answer_of(responses: list) -> str | list[float]:
    """What a model has answered: `responses` holds for each request as many as it was repeated."""
    first = [repeats[0] for repeats in responses]
    if len(first) == 1 and isinstance(first[0], str):
        return first[0]
    return [round(float(one[0] if isinstance(one, tuple | list) else one), 4) for one in first]


def number(value) -> float | None:
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # numpy's
        value = value.item()
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def question_in(doc: dict, prompt: str | int) -> str:
    """The question itself, without what a task writes around it ("Question: ... Answer:"): the longest field of `doc` that the
    prompt shows, if it is at least half of it; otherwise the prompt. `prompt` is a number where the choices are the prompts."""
    texts = [value.strip() for value in doc.values() if isinstance(value, str) and value.strip()]
    if not isinstance(prompt, str):
        return max(texts, key=len, default=json.dumps(doc, default=str))
    shown = max((text for text in texts if text in prompt), key=len, default="")
    return shown if 2 * len(shown) >= len(prompt.strip()) else prompt.strip()
