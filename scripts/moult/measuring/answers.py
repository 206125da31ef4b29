"""The answers that a model gives: greedy, in batches, and never generated twice.

A batch that was generated before, by the same model on the same device with the same settings and code, is read from a folder
that is no output of a rule: a new prompt generates no other answers again, and a run that was stopped goes on. What is kept are
whole batches, because the neighbours of a question can decide a near-tie: so the answers are the same as if nothing had been
kept, and base and tuned model are asked in the same batches.
"""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from moult.data.sequence import IGNORE
from moult.files import canonical, read_json, sha256_text, write_json
from moult.measuring.likelihood import MAX_TOKENS, batches, likelihood, scored_logits
from moult.model.estimates import cache_bytes
from moult.run.console import progress

# Most tokens, prompts and answers together, that are generated side by side.
GENERATION_TOKENS = {"cpu": 16384, "cuda": 131072}

# Most bytes of their keys and values: on a CPU a number, on a GPU a share of what the weights leave free.
CPU_CACHE, GPU_CACHE_SHARE = 4 * 2**30, 0.5

# Prompts of the config that are asked together. Only those beside a new one are asked again.
PROMPTS_AT_ONCE = 16


class KeptAnswers:
    """Answers that were generated before.

    Args:
        folder: where they are kept.
        depends_on: what they depend on besides their batch: model, device, settings, code.
        alone: whether the folder is for this model only; then those of earlier ones are deleted.
    """

    def __init__(self, folder: Path, depends_on: dict, alone: bool):
        self.folder = folder / sha256_text(canonical(depends_on))[:32]
        for other in folder.glob("*") if alone else ():
            if other != self.folder:
                shutil.rmtree(other)

    def answers(
        self, prompts: list[list[int]], max_new_tokens: int, generate: Callable[[], list[list[int]]]
    ) -> list[list[int]]:
        """The token ids that answer a batch of prompts (token ids)."""
        path = self.folder / f"{sha256_text(canonical([prompts, max_new_tokens]))[:32]}.json"
        if path.exists():
            return read_json(path)
        answers = generate()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, answers)
        return answers


def answer(model, questions: list[dict], chat, report: dict, max_new_tokens: int, kept: KeptAnswers) -> list[dict]:
    """The greedy answers of the model, in the order of the questions, with figures by which smoke_test recognises the weights."""
    stop = report["stop"]["generation_stop_ids"]
    window = window_of(model)
    lengths = [len(question["ids"]) + max_new_tokens for question in questions]
    plan = question_batches(questions, lengths, generation_cost(model))
    results: dict[int, dict] = {}
    with progress(len(questions), "answers") as bar:
        for indices in plan:
            prompts = [questions[index]["ids"] for index in indices]
            room = max(1, min(max_new_tokens, window - max(map(len, prompts))))
            made = kept.answers(prompts, room, partial(generate, model, prompts, stop, chat.pad_id, room))
            for index, ids in zip(indices, made, strict=True):
                question = questions[index]
                ended = bool(ids) and ids[-1] in stop
                results[index] = {
                    **{name: question[name] for name in ("kind", "id", "group", "prompt", "reference")},
                    "answer": chat.decode(ids[:-1] if ended else ids, special=False),
                    "token_ids": ids,
                    "stopped": ended,
                    "prompt_ids": question["ids"],
                }
            bar.update(len(indices))
    answers = [results[index] for index in range(len(questions))]
    likelihoods = prompt_nll(model, answers, chat.pad_id)
    return [
        {**answer, "prompt_nll": nll, "margins": leads}
        for answer, nll, leads in zip(answers, likelihoods, margins(model, answers, chat.pad_id), strict=True)
    ]


def question_batches(questions: list[dict], lengths: list[int], cost: Callable[[int], float]) -> list[list[int]]:
    """Indices of questions, in batches of one kind each, so that a new prompt changes no batch of rows. Rows and instructions
    are put together by length; prompts in the order of the config, which a prompt that is added at its end leaves alone."""
    plan: list[list[int]] = []
    for kind in dict.fromkeys(question["kind"] for question in questions):
        places = [index for index, question in enumerate(questions) if question["kind"] == kind]
        if kind == "prompt":
            plan += in_order(places, lengths, cost)
        else:
            own = batches([lengths[index] for index in places], 1.0, cost)
            plan += [[places[place] for place in batch] for batch in own]
    return plan


def in_order(places: list[int], lengths: list[int], cost: Callable[[int], float]) -> list[list[int]]:
    plan: list[list[int]] = []
    for index in places:
        longest = max((lengths[other] for other in plan[-1]), default=0) if plan else 0
        room = len(plan[-1]) if plan else PROMPTS_AT_ONCE
        if room < PROMPTS_AT_ONCE and (room + 1) * cost(max(longest, lengths[index])) <= 1:
            plan[-1].append(index)
        else:
            plan.append([index])
    return plan


def window_of(model) -> int:
    """How many tokens the model has positions for."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9


def generation_cost(model) -> Callable[[int], float]:
    """What a sequence of a length takes up of what there is room for, at most 1: of the tokens, and of the memory for keys and
    values. The memory is the device's, not what happens to be free, so base and tuned model get the same batches."""
    import torch

    device, config, width = model.device, model.config, model.dtype.itemsize
    room = CPU_CACHE
    if device.type == "cuda":
        cards = {parameter.device for parameter in model.parameters()}
        total = sum(torch.cuda.get_device_properties(card).total_memory for card in cards)
        room = max(1, int(GPU_CACHE_SHARE * (total - model.get_memory_footprint())))
    most = GENERATION_TOKENS[device.type]
    return lambda length: max(length / most, cache_bytes(config, length, width) / room)


def prompt_nll(model, answers: list[dict], pad_id: int) -> list[float]:
    """The negative log-likelihood of each prompt. It was not trained on, so no two models agree on it."""
    prompts = [row["prompt_ids"] for row in answers]
    sequences = [{"input_ids": ids, "labels": [IGNORE, *ids[1:]]} for ids in prompts]
    return [result.nll for result in likelihood(model, sequences, pad_id, "prompts: likelihood")]


def margins(model, answers: list[dict], pad_id: int) -> list[list[float]]:
    """The lead of the best token over the second one, in nats, at each token of each answer. If it is nearly a tie, another
    kernel or another batch may choose the second one."""
    import torch

    sequences = [
        {
            "input_ids": row["prompt_ids"] + row["token_ids"],
            "labels": [IGNORE] * len(row["prompt_ids"]) + row["token_ids"],
        }
        for row in answers
    ]
    found: list[list[float]] = [[] for _ in answers]
    spoken = [index for index, row in enumerate(answers) if row["token_ids"]]
    lengths = [len(sequences[index]["input_ids"]) for index in spoken]
    with progress(len(spoken), "answers: margins") as bar, torch.inference_mode():
        for batch in batches(lengths, MAX_TOKENS[model.device.type]):
            indices = [spoken[place] for place in batch]
            for logits, _, rows in scored_logits(model, [sequences[index] for index in indices], pad_id):
                best = logits.topk(2).values
                for row, lead in zip(rows.tolist(), (best[:, 0] - best[:, 1]).tolist(), strict=True):
                    found[indices[row]].append(round(lead, 4))
            bar.update(len(indices))
    return found


def generate(model, prompts: list[list[int]], stop: list[int], pad_id: int, max_new_tokens: int) -> list[list[int]]:
    """The tokens that follow each prompt, the stop token included. Prompts are padded on the left, with a mask."""
    import torch
    from transformers import GenerationConfig

    longest = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    # Not the generation config of the model: base and tuned model must be asked in the same way.
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stop, pad_token_id=pad_id, use_cache=True
    )
    with torch.inference_mode():
        new = model.generate(input_ids=ids, attention_mask=mask)[:, longest:].tolist()
    ends = [next((at + 1 for at, token in enumerate(row) if token in stop), len(row)) for row in new]
    return [row[:end] for row, end in zip(new, ends, strict=True)]
