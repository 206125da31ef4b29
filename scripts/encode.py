"""Turn prepared rows into token ids and labels. The trainer uses them unchanged.

    python scripts/encode.py --settings '{"max_length": 512, ...}' --model config/demo/base \\
        --train results/prepared/demo/train.jsonl --val results/prepared/demo/val.jsonl --out results/demo/tokens

After prepare, before plan. Writes into --out: `train.parquet` and `val.parquet` (one sequence per row: id, group, source,
input_ids, labels, answer_start, trained_bytes), `chat_template.jinja` (empty if there is no template), `report.json` (what
happened to every row and token), and `preview.html` (ten rows, with the trained tokens marked). moult/data/labels.py makes and
checks the labels. This script counts them and handles sequences that are too long.
"""

import html
from collections import Counter
from itertools import pairwise
from pathlib import Path

from moult.data.labels import sequences_of
from moult.data.sequence import IGNORE
from moult.errors import MoultError, some
from moult.files import atomic_file, read_json, read_jsonl, write_json, write_text
from moult.model.chat import FROZEN_DATE, Chat, Unrenderable, choose_template, prints_date, template_sha256
from moult.model.manifest import open_model
from moult.parallel import ordered_map
from moult.run.cli import stage_parser
from moult.run.stage import stage

PREVIEWED = 10


def main() -> None:
    parser = stage_parser(__doc__, "encode", threads="processes")
    parser.add_argument(
        "--model", required=True, help="manifest or folder of the base model (only its tokenizer is read)"
    )
    parser.add_argument("--templates", default="config/chat_templates", help="folder with the chat templates of Moult")
    parser.add_argument("--train", required=True, help="prepared training rows (.jsonl)")
    parser.add_argument("--val", required=True, help="prepared validation rows (.jsonl)")
    parser.add_argument("--out", required=True, help="folder to write to")
    args = parser.parse_args()

    with stage("encode", args.log_file, args.settings) as log:
        encode(args.settings, args, log)


def encode(settings: dict, args, log) -> None:
    base = str(open_model(args.model)[0])
    template, origin = choose_template(base, settings["chat_template"], args.templates, settings["trust_remote_code"])
    rows = {"train": list(read_jsonl(args.train)), "val": list(read_jsonl(args.val))}
    if template is None and any("messages" in row for part in rows.values() for row in part):
        raise MoultError(
            f"{base}: the tokenizer has no chat template, but the rows are conversations",
            "set model.chat_template: chatml (a template that is part of Moult), or the path of a Jinja file",
        )
    chat_settings = (base, template, settings["chat_template_kwargs"], settings["trust_remote_code"])
    chat = Chat(*chat_settings)
    vocabulary = read_json(Path(base) / "config.json")
    vocabulary = vocabulary.get("vocab_size") or vocabulary.get("text_config", {}).get("vocab_size")

    report: dict = {"schema_version": 1, "template": {"origin": origin, "sha256": template_sha256(template)}}
    report["template"] |= describe_template(template, [*rows["train"], *rows["val"]], chat, log)
    if template is None:
        warn_of_added_end(chat, log)
    out = Path(args.out)
    made: dict[str, list[dict]] = {}
    sequences: dict[str, list[dict]] = {}
    for part in ("train", "val"):
        made[part], report[part] = encode_rows(part, rows[part], chat_settings, settings, args.threads)
        sequences[part], report[part]["length"] = limit_length(part, made[part], settings)
        report[part] |= count_tokens(sequences[part])
        check_vocabulary(part, sequences[part], vocabulary)
        warn_of_lost_characters(part, report[part], log)
    plain = {row["id"] for row in rows["train"] if "text" in row}
    stop = check_stop_tokens(made["train"], sequences["train"], plain, chat)
    report |= {
        "pad_token_id": chat.pad_id,
        "stop": stop,
        "vocabulary": vocabulary,
        "max_length": settings["max_length"],
    }

    write_text(out / "chat_template.jinja", chat.template or "")
    for part in ("train", "val"):
        write_sequences(out / f"{part}.parquet", sequences[part])
    write_text(out / "preview.html", preview(sequences["train"], chat, origin))
    write_json(out / "report.json", report)
    counted = (
        f"{part}: {report[part]['sequences']:,} sequences, {report[part]['tokens']:,} tokens, "
        f"{100 * report[part]['trained_share']:.0f} % of them trained, longest {report[part]['length']['longest_kept']:,}"
        for part in ("train", "val")
    )
    log.info("%s", "; ".join(counted))


# --- the template -----------------------------------------------------------------------------------------------------


def describe_template(template, rows: list[dict], chat, log) -> dict:
    """What the report says of the template besides its origin and hash; what is unusual is told on the console, too.

    `date`: what a template that prints today's date prints here and at evaluate; None if it prints none.
    `named`: the texts of the model's named templates besides the default one, and `tool_use_rows`, how many rows with tools
    are shown by that of this name. `tool_arguments`, if the rows hold tool calls: whether the template gets their arguments as
    an `object` or as JSON `text`.
    """
    told: dict = {"date": str(FROZEN_DATE) if prints_date(template) else None}
    if isinstance(template, dict):
        told["named"] = {name: text for name, text in template.items() if name != "default"}
        if "tool_use" in template:
            told["tool_use_rows"] = with_tools = sum("tools" in row for row in rows)
            log.info("chat templates: tool_use for %s rows with tools, default for the others", f"{with_tools:,}")
    calling = [row for row in rows if any(message.get("tool_calls") for message in row.get("messages", []))]
    if calling and chat.template is not None:
        texts = {chat.takes_text_arguments(row.get("tools")) for row in calling}
        told["tool_arguments"] = "text" if texts == {True} else "object" if texts == {False} else "object and text"
    if "text" in told.get("tool_arguments", ""):
        log.warning(
            "the chat template takes the arguments of tool calls as JSON text and not as an object: it gets text. vLLM gives it "
            "an object, so conversations that hold a tool call fail there, or are shown otherwise. To serve them, write in the "
            "template, where X is the call's function: X.arguments if X.arguments is string else X.arguments | tojson"
        )
    return told


def warn_of_added_end(chat, log) -> None:
    made = chat.tokenizer("a")["input_ids"]
    if added := made[len(chat.prompt_ids([{"content": "a"}])) :]:
        log.warning(
            "this tokenizer puts %r behind every text. What is asked here does not end with it, but vLLM's /v1/completions "
            "leaves it there, and the model answers behind the end: give it token ids",
            chat.decode(added),
        )


# --- rows to sequences ------------------------------------------------------------------------------------------------


def encode_rows(
    part: str, rows: list[dict], chat_settings: tuple, settings: dict, workers: int
) -> tuple[list[dict], dict]:
    """The sequences of all rows, and the counts for the report. Raises MoultError for rows that cannot be rendered."""
    results = ordered_map(encode_row, rows, workers, f"{part} rows: tokens", set_chat, chat_settings)
    made = [sequence for result in results for sequence in result["sequences"]]
    refused = [
        (row["id"], result["reason"], result["message"])
        for row, result in zip(rows, results, strict=True)
        if "reason" in result
    ]
    reasons = Counter(reason for _, reason, _ in refused)
    if refused and (settings["unrenderable"] == "error" or len(refused) == len(rows)):
        first = {reason: f"{place}: {message}" for place, reason, message in reversed(refused)}
        listing = "\n    ".join(
            f"{count:,} {reason}, for example {first[reason]}" for reason, count in reasons.most_common()
        )
        fix = "choose another model.chat_template (or its chat_template_kwargs)"
        if len(refused) < len(rows):
            fix = f"fix the rows, {fix}, or drop such rows with datasets.<name>.unrenderable: drop"
        raise MoultError(
            f"the chat template cannot show {len(refused):,} of {len(rows):,} {part} rows unchanged:\n    {listing}",
            fix,
        )
    lost: Counter = Counter()
    for result in results:
        lost.update(result["lost"])
    return made, {
        "rows": len(rows),
        "unrenderable": dict(reasons),
        "rows_in_several_sequences": sum(len(result["sequences"]) > 1 for result in results),
        "lost_characters": {
            "count": lost.total(),
            "rows": sum(bool(result["lost"]) for result in results),
            "which": dict(lost.most_common(20)),
        },
    }


def set_chat(*chat_settings) -> None:
    global _chat

    _chat = Chat(*chat_settings)


def encode_row(row: dict) -> dict:
    """{"sequences": [...], "lost": characters}, with "reason" and "message" if the row cannot be rendered."""
    said = [row] if "text" in row else row["messages"]
    said = "".join(part.get(key, "") for part in said for key in ("text", "content", "reasoning_content"))
    try:
        sequences = sequences_of(_chat, row)
    except Unrenderable as refusal:
        return {"sequences": [], "lost": "", "reason": refusal.reason, "message": str(refusal)}
    return {
        "lost": _chat.lost_characters(said),
        "sequences": [
            {
                "id": row["id"],
                "group": row["group"],
                "source": row["source"],
                "input_ids": sequence.input_ids,
                "labels": sequence.labels,
                "answer_start": sequence.answer_start,
                "trained_bytes": len(
                    _chat.decode([label for label in sequence.labels if label != IGNORE], special=False).encode()
                ),
            }
            for sequence in sequences
        ],
    }


def limit_length(part: str, sequences: list[dict], settings: dict) -> tuple[list[dict], dict]:
    """Apply `overlength` to sequences over max_length, within `max_token_loss`. Returns the kept sequences and the counts."""
    limit = settings["max_length"]
    lengths = sorted(len(sequence["input_ids"]) for sequence in sequences)
    over = sum(length > limit for length in lengths)
    share = over / len(sequences)
    advice = ", ".join(f"{q:.0%} fit into {quantile(lengths, q):,}" for q in (0.95, 0.99, 1.0))
    if over and settings["overlength"] == "error":
        raise MoultError(
            f"{over:,} of {len(sequences):,} {part} sequences are longer than max_length {limit:,}",
            f"raise datasets.<name>.max_length ({advice}), or set overlength: drop or truncate",
        )
    kept, trained, lost, cut, without_answer = [], 0, 0, 0, 0
    for sequence in sequences:
        count = sum(label != IGNORE for label in sequence["labels"])
        trained += count
        if len(sequence["input_ids"]) > limit:
            if settings["overlength"] == "drop":
                lost += count
                continue
            cut += 1
            sequence = {
                **sequence,
                "input_ids": sequence["input_ids"][:limit],
                "labels": sequence["labels"][:limit],
            }
            left = sum(label != IGNORE for label in sequence["labels"])
            lost += count - left
            if left == 0:
                without_answer += 1
                continue
            sequence["answer_start"] = -1
            # Bytes per token stay what they were, to the nearest byte.
            sequence["trained_bytes"] = round(sequence["trained_bytes"] * left / count)
        kept.append(sequence)
    if not kept:
        raise MoultError(
            f"all {len(sequences):,} {part} sequences are longer than max_length {limit:,}",
            f"raise datasets.<name>.max_length ({advice})",
        )
    if lost > settings["max_token_loss"] * trained:
        raise MoultError(
            f"max_length {limit:,} removes {lost / trained:.1%} of the trained {part} tokens "
            f"({over:,} sequences, {share:.1%}, are longer), more than max_token_loss {settings['max_token_loss']:.1%}",
            f"raise datasets.<name>.max_length ({advice}), or max_token_loss",
        )
    return kept, {
        "longest": lengths[-1],
        "longest_kept": max(len(sequence["input_ids"]) for sequence in kept),
        "quantiles": {f"{q:g}": quantile(lengths, q) for q in (0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)},
        "over_max_length": over,
        "dropped": over - cut,
        "truncated": cut,
        "truncated_before_the_answer": without_answer,
        "trained_tokens_made": trained,
        "trained_tokens_lost": lost,
    }


def quantile(values: list[int], q: float) -> int:
    """The smallest of the sorted `values` that is not below a share `q` of them."""
    return values[min(len(values) - 1, max(0, -(-int(q * 1_000_000) * len(values) // 1_000_000) - 1))]


# --- gates and counts -------------------------------------------------------------------------------------------------


def count_tokens(sequences: list[dict]) -> dict:
    tokens = sum(len(sequence["input_ids"]) for sequence in sequences)
    trained = sum(label != IGNORE for sequence in sequences for label in sequence["labels"])
    empty = [sequence["id"] for sequence in sequences if all(label == IGNORE for label in sequence["labels"])]
    if empty:
        raise MoultError(
            f"{len(empty):,} sequences have no trained token: {some(empty)}", "this is a bug in Moult; please report it"
        )
    return {
        "sequences": len(sequences),
        "tokens": tokens,
        "trained_tokens": trained,
        "trained_share": trained / tokens,
    }


def check_vocabulary(part: str, sequences: list[dict], vocabulary: int | None) -> None:
    largest, where = max((max(sequence["input_ids"]), sequence["id"]) for sequence in sequences)
    if vocabulary is not None and largest >= vocabulary:
        raise MoultError(
            f"{part} row {where}: token {largest} is outside the model's vocabulary of {vocabulary:,}",
            "use the tokenizer of this model; if tokens were added to it, the model must be resized too",
        )


def warn_of_lost_characters(part: str, report: dict, log) -> None:
    lost = report["lost_characters"]
    if lost["count"]:
        log.warning(
            "%s: this tokenizer has no tokens for %s characters in %s rows and leaves them out: %s",
            part,
            f"{lost['count']:,}",
            f"{lost['rows']:,}",
            " ".join(lost["which"]),
        )


def check_stop_tokens(made: list[dict], sequences: list[dict], plain: set[str], chat) -> dict:
    """Which tokens end the trained turns, and whether generation already stops at them.

    `made` are all sequences, uncut. `sequences` are those that are kept; some of them are cut. `plain` are the ids of rows with
    plain text. In the result, `added` are tokens that end turns but that generation_config does not name, usually because
    a base model was given a chat template. merge and finetune add them to generation_config.
    """
    trained = sorted(token for token in turn_ends(made) if token in chat.stop_ids or token in chat.special_ids)
    ends = turn_ends(sequences)
    learnt = sum(ends[token] for token in trained)
    # Only truncation leaves a turn without its end. Plain text may be cut: it is no turn.
    turns = turn_ends([sequence for sequence in sequences if sequence["id"] not in plain])
    ended = sum(turns[token] for token in trained)
    if ended < turns.total() / 2:
        raise MoultError(
            f"only {ended:,} of {turns.total():,} trained turns end with a stop token: the model would not learn to stop",
            "raise datasets.<name>.max_length, or set overlength: drop",
        )
    return {
        "trained_ends": ends.total(),
        "with_stop_token": learnt,
        "token_ids": trained,
        "tokens": [chat.decode([token]) for token in trained],
        "added": [token for token in trained if token not in chat.stop_ids],
        "generation_stop_ids": sorted(chat.stop_ids | set(trained)),
    }


def turn_ends(sequences: list[dict]) -> Counter:
    """How often each token is the last one of a trained span."""
    ends: Counter = Counter()
    for sequence in sequences:
        labels = [*sequence["labels"], IGNORE]
        ends.update(label for label, after in pairwise(labels) if label != IGNORE and after == IGNORE)
    return ends


# --- writing ----------------------------------------------------------------------------------------------------------


def write_sequences(path: Path, sequences: list[dict]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids = pa.list_(pa.int32())
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("group", pa.string()),
            ("source", pa.int32()),
            ("input_ids", ids),
            ("labels", ids),
            ("answer_start", pa.int32()),
            ("trained_bytes", pa.int32()),
        ]
    )
    with atomic_file(path) as partial:
        pq.write_table(pa.Table.from_pylist(sequences, schema), partial, compression="zstd")


def preview(sequences: list[dict], chat, origin: str) -> str:
    """A page with a few sequences, with the trained tokens marked, and with the id of each token on hover."""
    step = max(1, len(sequences) // PREVIEWED)
    articles = []
    for sequence in sequences[::step][:PREVIEWED]:
        tokens = []
        ids = sequence["input_ids"]
        for token, label, text in zip(ids, sequence["labels"], pieces(ids, chat), strict=True):
            text = html.escape(text).replace("\n", "↵\n")
            kind = "trained" if label != IGNORE else "context"
            tokens.append(f'<span class="{kind}" title="{token}">{text}</span>')
        trained = sum(label != IGNORE for label in sequence["labels"])
        title = f"{html.escape(sequence['id'])}: {trained} of {len(sequence['labels'])} tokens trained"
        articles.append(f"<h2>{title}</h2>\n<pre>{''.join(tokens)}</pre>")
    return PAGE.format(origin=html.escape(origin), articles="\n".join(articles))


def pieces(ids: list[int], chat) -> list[str]:
    """The text that each token adds. (Decoded alone, a token may lose its space, or be only a part of a character.)

    A character of several tokens is assigned to the last one.
    """
    texts, shown, start = [], 0, 0  # ids[start:shown] is text that was given out, there for what follows to lean on
    for end in range(1, len(ids) + 1):
        before, text = chat.decode(ids[start:shown]), chat.decode(ids[start:end])
        whole = not text.endswith("\ufffd") or end == len(ids)
        texts.append(text[len(before) :] if whole else "")
        if whole:
            start, shown = shown, end
    return texts


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Trained tokens</title><style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
h2 {{ font-size: 1rem; margin: 2rem 0 .5rem; }}
pre {{ white-space: pre-wrap; padding: 1rem; border: 1px solid #8884; border-radius: 6px; }}
.context {{ opacity: .65; }}
.trained {{ background: #2a93; border-bottom: 2px solid #2a9; }}
span:empty {{ padding-left: .2em; }}
span:hover {{ outline: 1px solid currentColor; }}
</style></head><body>
<h1>Trained tokens</h1>
<p>The model learns to produce the marked tokens. All others are context. Point at a token to see its id.</p>
<p>Chat template: {origin}.</p>
{articles}
</body></html>
"""


if __name__ == "__main__":
    main()
