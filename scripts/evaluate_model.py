"""Measure a model: the likelihood of the answers in the validation rows, and the answers that the model gives itself.

    python scripts/evaluate_model.py --settings '{"eval": {...}, ...}' --model results/demo/merged --tokens results/demo/tokens \\
        --likelihood results/demo/tuned/likelihood.jsonl --answers results/demo/tuned/answers.jsonl

The rules evaluate_base and evaluate_tuned run it; runs with the same model and data share the result of evaluate_base. score
compares the two. Both models get the same token ids, from encode. Decoding is greedy. With --adapter, --base and
--merge-check, the merged model is also compared with base plus adapter on a few rows; if the base was quantized for training
(model.quantization), also with that.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from moult.data.sequence import IGNORE
from moult.data.token_file import rows_of
from moult.files import read_json, sha256_text, write_json, write_jsonl
from moult.measuring.likelihood import MAX_TOKENS, batches, likelihood, scored_logits
from moult.model.chat import Chat, prompt_of
from moult.model.device import enough_memory, limit_threads, load_model, pick
from moult.model.estimates import cache_bytes
from moult.model.manifest import open_model
from moult.model.quantization import bitsandbytes_for
from moult.run.cli import stage_parser
from moult.run.console import progress
from moult.run.stage import stage

# Most tokens, prompts and answers together, that are generated side by side.
GENERATION_TOKENS = {"cpu": 16384, "cuda": 131072}

# Most bytes of their keys and values: on a CPU a number, on a GPU a share of what the weights leave free.
CPU_CACHE, GPU_CACHE_SHARE = 4 * 2**30, 0.5

# Most logits kept for the comparison of merged model and adapter, in elements of float32: 512 MiB.
KEPT_LOGITS = 2**27

MORE_GPU = "use a GPU with more memory, or several (eval.gpu)"


def main() -> None:
    parser = stage_parser(__doc__, "<rule>", threads="CPU threads")
    parser.add_argument("--model", required=True, help="manifest or folder of the model to measure")
    parser.add_argument("--tokens", required=True, help="folder with the tokens that encode wrote")
    parser.add_argument("--likelihood", required=True, help="output: one line per validation sequence (.jsonl)")
    parser.add_argument("--answers", required=True, help="output: one line per answer (.jsonl)")
    parser.add_argument(
        "--gpus", type=int, default=1, help="number of GPUs to spread a model over, where there are GPUs"
    )
    parser.add_argument("--base", help="manifest or folder of the base model, for --merge-check")
    parser.add_argument("--adapter", help="adapter folder, for --merge-check")
    parser.add_argument("--merge-check", help="output: merged model against base plus adapter (.json)")
    args = parser.parse_args()

    rule = "evaluate_tuned" if args.merge_check else "evaluate_base"
    with stage(rule, args.log_file, args.settings) as log:
        bitsandbytes_for(args.settings)
        evaluate(args.settings, args, log)


def evaluate(settings: dict, args, log) -> None:
    limit_threads(args.threads)
    device = pick(args.gpus)
    tokens = Path(args.tokens)
    report = read_json(tokens / "report.json")
    template = (tokens / "chat_template.jinja").read_text(encoding="utf-8") or None
    folder = str(open_model(args.model)[0])
    chat = Chat(folder, template, settings["chat_template_kwargs"], settings["trust_remote_code"])
    rows = read_rows(tokens / "val.parquet")
    log.info("measuring %s on %s", args.model, device)
    model = load_model(folder, device, settings, gpus=args.gpus).eval()

    measured = chosen(rows, settings["eval"]["max_rows"]) if settings["eval"]["perplexity"] else []
    lengths = [len(row["input_ids"]) for row in measured]
    with enough_memory(
        f"measuring rows of up to {max(lengths, default=0):,} tokens",
        f"lower datasets.<name>.max_length, or {MORE_GPU}",
    ):
        write_jsonl(args.likelihood, measure(model, measured, report["pad_token_id"]))
    questions = prompt_questions(settings["eval"]["prompts"], chat) + row_questions(
        rows, settings["eval"]["answer_rows"], chat
    )
    room = settings["eval"]["max_new_tokens"]
    longest = max((len(question["ids"]) for question in questions), default=0)
    with enough_memory(
        f"answering questions of up to {longest:,} tokens with up to {room:,} tokens",
        f"lower eval.max_new_tokens, or {MORE_GPU}",
    ):
        answers = answer(model, questions, chat, report, room)
    write_jsonl(args.answers, answers)
    found = f"{len(measured):,} sequences measured, {len(answers):,} questions answered"
    if args.merge_check:
        with enough_memory(
            "comparing the merged model with base plus adapter", f"lower datasets.<name>.max_length, or {MORE_GPU}"
        ):
            result = compare_with_adapter(model, rows, report["pad_token_id"], device, settings, args)
        write_json(args.merge_check, result)
        found += f"; merged model against base plus adapter: mean KL {result['mean_kl']:.2e}"
    log.info(found)


def read_rows(path: Path) -> list:
    """The sequences, dicts whose values are read when they are asked for."""
    return rows_of(path)


def chosen(rows: list[dict], count: int | None) -> list[dict]:
    """`count` of the rows, in their order. The choice is always the same."""
    if count is None or count >= len(rows):
        return rows
    order = sorted(range(len(rows)), key=lambda index: sha256_text(f"{rows[index]['id']}:{index}"))
    return [rows[index] for index in sorted(order[:count])]


# --- likelihood -------------------------------------------------------------------------------------------------------


def measure(model, rows: list[dict], pad_id: int) -> list[dict]:
    results = likelihood(model, rows, pad_id, "val rows: likelihood")
    return [
        {
            "id": row["id"],
            "group": row["group"],
            "source": row["source"],
            "nll": result.nll,
            "tokens": result.tokens,
            "correct": result.correct,
            "bytes": row["trained_bytes"],
        }
        for row, result in zip(rows, results, strict=True)
    ]


# --- answers ----------------------------------------------------------------------------------------------------------


def prompt_questions(prompts: list[dict], chat) -> list[dict]:
    questions = []
    for prompt in prompts:
        messages, ids = prompt_of(prompt, chat)
        questions.append(
            {
                "kind": "prompt",
                "id": prompt["id"],
                "prompt": messages[-1]["content"],
                "reference": None,
                "ids": ids,
            }
        )
    return questions


def row_questions(rows: list[dict], count: int, chat) -> list[dict]:
    questions = []
    for row in chosen([row for row in rows if row["answer_start"] >= 0], count):
        start = row["answer_start"]
        reference = [label for label in row["labels"][start:] if label != IGNORE]
        questions.append(
            {
                "kind": "row",
                "id": row["id"],
                "prompt": chat.decode(row["input_ids"][:start]),
                "reference": chat.decode(reference, special=False).strip(),
                "ids": row["input_ids"][:start],
            }
        )
    return questions


def answer(model, questions: list[dict], chat, report: dict, max_new_tokens: int) -> list[dict]:
    """The greedy answers of the model, in the order of the questions, with figures by which smoke_test recognises the weights."""
    stop = report["stop"]["generation_stop_ids"]
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9
    lengths = [len(question["ids"]) + max_new_tokens for question in questions]
    plan = batches(lengths, 1.0, generation_cost(model))
    results: dict[int, dict] = {}
    with progress(len(questions), "answers") as bar:
        for indices in plan:
            prompts = [questions[index]["ids"] for index in indices]
            room = max(1, min(max_new_tokens, window - max(map(len, prompts))))
            for index, ids in zip(indices, generate(model, prompts, stop, chat.pad_id, room), strict=True):
                question = questions[index]
                ended = bool(ids) and ids[-1] in stop
                results[index] = {
                    **{name: question[name] for name in ("kind", "id", "prompt", "reference")},
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


# --- merged model against adapter -------------------------------------------------------------------------------------


def compare_with_adapter(merged, rows: list[dict], pad_id: int, device: str, settings: dict, args) -> dict:
    """KL(base + adapter || merged) in nats per token, and how often the two have the same first choice. With
    model.quantization, also what the quantization has cost: two divergences with the base that was trained."""
    from peft import PeftModel

    def adapted(quantization: str | None = None):
        base = load_model(str(open_model(args.base)[0]), device, settings, quantization, gpus=args.gpus)
        return PeftModel.from_pretrained(base, args.adapter).eval()

    kept, of_merged = kept_logits(merged, chosen(rows, settings["eval"]["merge_check_rows"]), pad_id)
    lengths = [len(logits) for logits in of_merged]

    def logits(model) -> Iterator:
        return (one_logits(model, row, pad_id, length) for row, length in zip(kept, lengths, strict=True))

    result = {"rows": len(kept), "positions": sum(lengths), "dtype": str(merged.dtype).removeprefix("torch.")}
    merged.to("meta")  # the models need not fit into memory together
    model = adapted()
    result |= divergence(logits(model), of_merged)
    quantization = settings.get("quantization")
    if quantization is None:
        return result
    with model.disable_adapter():
        of_base = list(logits(model))
    model.to("meta")
    model = adapted(quantization)
    result["quantization"] = {"kind": quantization, "trained_vs_merged": divergence(logits(model), of_merged)}
    with model.disable_adapter():
        result["quantization"]["base_vs_quantized"] = divergence(of_base, logits(model))
    return result


def one_logits(model, row: dict, pad_id: int, most: int):
    """Of the first trained positions, at most `most`: float32 (positions, vocabulary), on the CPU."""
    import torch

    parts: list = []
    with torch.inference_mode():
        for logits, _, _ in scored_logits(model, [row], pad_id):
            parts.append(logits[: most - sum(map(len, parts))].cpu())
            if sum(map(len, parts)) == most:
                break
    return torch.cat(parts)


def kept_logits(model, rows: list[dict], pad_id: int) -> tuple[list[dict], list]:
    """As many of the rows as KEPT_LOGITS has room for, and the logits of each, the last perhaps cut off."""
    room = max(1, KEPT_LOGITS // model.config.get_text_config().vocab_size)
    kept: list = []
    for row in rows:
        kept.append(one_logits(model, row, pad_id, room))
        room -= len(kept[-1])
        if room == 0:
            break
    return rows[: len(kept)], kept


def divergence(ours: Iterable, theirs: Iterable) -> dict[str, float]:
    """KL(ours || theirs) in nats per token, mean and largest, and how often the two have the same first choice.

    Args:
        ours, theirs: logits of each row, float32 (positions, vocabulary), the same shapes.
    """
    total, worst, agreed, positions = 0.0, 0.0, 0, 0
    for a, b in zip(ours, theirs, strict=True):
        p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
        each = (p.exp() * (p - q)).sum(-1)
        total += each.sum().item()
        worst = max(worst, each.max().item())
        agreed += (a.argmax(-1) == b.argmax(-1)).sum().item()
        positions += len(each)
    return {"mean_kl": max(0.0, total / positions), "max_kl": worst, "top1_agreement": agreed / positions}


if __name__ == "__main__":
    main()
