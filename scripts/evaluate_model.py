"""Measure a model: the likelihood of the answers in the test rows, and the answers that the model gives itself. What
tuning may have broken, too: the likelihood of a general text, and answers to plain instructions.

    python scripts/evaluate_model.py --settings '{"eval": {...}, ...}' --model results/demo/merged --tokens results/demo/tokens \\
        --likelihood results/demo/tuned/likelihood.jsonl --answers results/demo/tuned/answers.jsonl \\
        --general results/demo/tuned/general.jsonl --kept results/demo/tuned/kept

The rules evaluate_base and evaluate_tuned run it; runs with the same model and data share the result of evaluate_base. score
compares the two. Both models get the same token ids, from encode. Decoding is greedy. With --adapter, --base and
--merge-check, the merged model is also compared with base plus adapter on a few rows; if the base was quantized for training
(model.quantization), also with that.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from moult.data.sequence import IGNORE
from moult.data.token_file import rows_of
from moult.files import read_json, write_json, write_jsonl
from moult.measuring.answers import KeptAnswers, answer, window_of
from moult.measuring.checks import PART, check, expectations
from moult.measuring.divergence import divergence, kept_logits, one_logits
from moult.measuring.foresight import rows_apart, tell_power
from moult.measuring.forgetting import instructions
from moult.measuring.likelihood import likelihood
from moult.measuring.rows import chosen, general_sequences, measured_rows, measured_texts
from moult.model.chat import Chat, Unrenderable, messages_of, prompt_of
from moult.model.device import enough_memory, limit_threads, load_model, pick, versions
from moult.model.manifest import open_model
from moult.model.quantization import bitsandbytes_for
from moult.run.cli import stage_parser
from moult.run.stage import stage
from moult.workflow.code import hash_of_script

MORE_GPU = "use a GPU with more memory, or several (eval.gpu)"


def main() -> None:
    parser = stage_parser(__doc__, "<rule>", threads="CPU threads")
    parser.add_argument("--model", required=True, help="manifest or folder of the model to measure")
    parser.add_argument("--tokens", required=True, help="folder with the tokens that encode wrote")
    parser.add_argument("--likelihood", required=True, help="output: one line per test sequence (.jsonl)")
    parser.add_argument("--answers", required=True, help="output: one line per answer (.jsonl)")
    parser.add_argument("--general", required=True, help="output: one line per general text (.jsonl)")
    parser.add_argument("--kept", required=True, help="folder for answers that need not be generated again")
    parser.add_argument(
        "--gpus", type=int, default=1, help="number of GPUs to spread a model over, where there are GPUs"
    )
    parser.add_argument(
        "--checks", type=json.loads, help="JSON of the section eval: say what the base's answers can show"
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
    path, manifest = open_model(args.model)
    folder = str(path)
    chat = Chat(folder, template, settings["chat_template_kwargs"], settings["trust_remote_code"])
    rows = rows_of(tokens / "test.parquet")
    log.debug("measuring %s on %s", args.model, device)
    model = load_model(folder, device, settings, gpus=args.gpus).eval()

    measured = chosen(rows, settings["eval"]["max_rows"]) if settings["eval"]["perplexity"] else []
    texts = general_sequences(chat, window_of(model)) if settings["eval"]["forgetting"] else []
    lengths = [len(row["input_ids"]) for row in measured + texts]
    with enough_memory(
        f"measuring rows of up to {max(lengths, default=0):,} tokens",
        f"lower datasets.<name>.max_length, or {MORE_GPU}",
    ):
        likelihoods = measure(model, measured, report["pad_token_id"])
        write_jsonl(args.likelihood, likelihoods)
        write_jsonl(args.general, measure_texts(model, texts, report["pad_token_id"]))
    questions = prompt_questions(settings["eval"]["prompts"], chat)
    questions += row_questions(rows, settings["eval"]["answer_rows"], chat)
    if settings["eval"]["forgetting"] and template:
        questions += instruction_questions(chat)
    room = settings["eval"]["max_new_tokens"]
    longest = max((len(question["ids"]) for question in questions), default=0)
    with enough_memory(
        f"answering questions of up to {longest:,} tokens with up to {room:,} tokens",
        f"lower eval.max_new_tokens, or {MORE_GPU}",
    ):
        kept = KeptAnswers(
            Path(args.kept), depends_on(settings, manifest, report, device), alone=bool(args.merge_check)
        )
        answers = answer(model, questions, chat, report, room, kept)
    write_jsonl(args.answers, answers)
    found = f"{len(measured):,} sequences measured, {len(answers):,} questions answered on {device}"
    if args.merge_check:
        with enough_memory(
            "comparing the merged model with base plus adapter", f"lower datasets.<name>.max_length, or {MORE_GPU}"
        ):
            result = compare_with_adapter(model, rows, report["pad_token_id"], device, settings, args)
        write_json(args.merge_check, result)
        found += f"; merged model against base plus adapter: mean KL {result['mean_kl']:.2e}"
    log.info(found)
    if args.checks:
        tell_sharper(args.checks, likelihoods, answers, log)


def depends_on(settings: dict, manifest: dict, report: dict, device: str) -> dict:
    """What answers depend on, besides what is asked: all that may change a rounding."""
    import torch

    return {
        "model": manifest["files"],
        "settings": {name: settings[name] for name in ("dtype", "attn_implementation", "trust_remote_code")},
        "stop": report["stop"]["generation_stop_ids"],
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "parts": torch.cuda.device_count() if device.startswith("cuda") else torch.get_num_threads(),
        "versions": {name: value for name, value in versions().items() if name not in ("moult", "python")},
        "code": hash_of_script(Path(__file__)),
    }


# --- likelihood -------------------------------------------------------------------------------------------------------


def measure(model, rows: list[dict], pad_id: int) -> list[dict]:
    return measured_rows(rows, likelihood(model, rows, pad_id, "test rows: likelihood"))


def measure_texts(model, texts: list[dict], pad_id: int) -> list[dict]:
    return measured_texts(texts, likelihood(model, texts, pad_id, "general text: likelihood"))


# --- answers ----------------------------------------------------------------------------------------------------------


def prompt_questions(prompts: list[dict], chat) -> list[dict]:
    return [_question("prompt", prompt["id"], *prompt_of(prompt, chat)) for prompt in prompts]


def instruction_questions(chat) -> list[dict]:
    """The instructions that are part of Moult, but for what the template cannot show."""
    questions = []
    for entry in instructions():
        messages = messages_of(entry)
        with suppress(Unrenderable):
            questions.append(_question("instruction", entry["id"], messages, chat.prompt_ids(messages)))
    return questions


def _question(kind: str, id: str, messages: list[dict], ids: list[int]) -> dict:
    return {"kind": kind, "id": id, "group": id, "prompt": messages[-1]["content"], "reference": None, "ids": ids}


def row_questions(rows: list[dict], count: int, chat) -> list[dict]:
    questions = []
    for row in chosen([row for row in rows if row["answer_start"] >= 0], count):
        start = row["answer_start"]
        reference = [label for label in row["labels"][start:] if label != IGNORE]
        questions.append(
            {
                "kind": "row",
                "id": row["id"],
                "group": row["group"],
                "prompt": chat.decode(row["input_ids"][:start]),
                "reference": chat.decode(reference, special=False).strip(),
                "ids": row["input_ids"][:start],
            }
        )
    return questions


# --- what this can show -----------------------------------------------------------------------------------------------


def tell_sharper(settings: dict, likelihoods: list[dict], answers: list[dict], log) -> None:
    """What plan has told, now with the base's own pass rates, and its own differences between rows."""
    expected = expectations(settings)
    passed: dict[str, list[bool]] = {}
    for row in answers:
        if expect := expected(row["kind"], row["id"]):
            part = passed.setdefault(PART[row["kind"]], [])
            part.append(all(check(row["answer"], expect, row["reference"]).values()))
    counts = {part: len(results) for part, results in passed.items()}
    rates = {part: sum(results) / len(results) for part, results in passed.items()}
    groups, spread = rows_apart(likelihoods)
    tell_power(settings, counts, groups, log, rates, spread)


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


if __name__ == "__main__":
    main()
