"""Turn prepared rows into token ids and labels. The trainer uses them unchanged.

    python scripts/encode.py --settings '{"max_length": 512, ...}' --model config/demo/base \\
        --train results/prepared/demo/train.jsonl --val results/prepared/demo/val.jsonl \\
        --test results/prepared/demo/test.jsonl --out results/demo/tokens

After prepare, before plan. Writes into --out: `train.parquet`, `val.parquet` and `test.parquet` (one sequence per row: id, group,
source, length, input_ids, labels, answer_start, trained_bytes), `chat_template.jinja` (empty if there is no template),
`report.json` (what happened to every row and token), and `preview.html` and `.json` (ten rows, with the trained tokens marked).
moult/data/labels.py makes and checks the labels. This script counts them and handles sequences that are too long.

Rows are read, encoded and written as they come, so memory does not grow with their number. Only counts are kept.
"""

import json
from collections import Counter
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

from moult.data.contamination import rows_told
from moult.data.labels import sequences_of_all
from moult.data.portions import portion_count, portions
from moult.data.preview import examples
from moult.data.sequence import IGNORE, Sequence
from moult.data.token_file import TokenFile, every_nth, token_schema
from moult.errors import MoultError
from moult.files import atomic_files, read_json, read_jsonl, write_json, write_text
from moult.model.chat import FROZEN_DATE, Chat, Unrenderable, choose_template, prints_date, template_sha256
from moult.model.manifest import open_model
from moult.model.tokenizer import without_torch
from moult.pages.page import write_page
from moult.parallel import ordered_stream
from moult.run.cli import stage_parser
from moult.run.console import progress
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
    parser.add_argument("--test", required=True, help="prepared test rows (.jsonl)")
    parser.add_argument("--without", nargs="*", default=[], help="ids of training rows to leave out (.json)")
    parser.add_argument("--out", required=True, help="folder to write to")
    args = parser.parse_args()

    with stage("encode", args.log_file, args.settings) as log, without_torch(args.settings["trust_remote_code"]):
        encode(args.settings, args, log)


def encode(settings: dict, args, log) -> None:
    base = str(open_model(args.model)[0])
    template, origin = choose_template(base, settings["chat_template"], args.templates, settings["trust_remote_code"])
    paths = {"train": Path(args.train), "val": Path(args.val), "test": Path(args.test)}
    if template is None and any("messages" in row for path in paths.values() for row in read_jsonl(path)):
        raise MoultError(
            f"{base}: the tokenizer has no chat template, but the rows are conversations",
            "set model.chat_template: chatml (a template that is part of Moult), or the path of a Jinja file",
        )
    chat_settings = (base, template, settings["chat_template_kwargs"], settings["trust_remote_code"])
    chat = Chat(*chat_settings)
    vocabulary = read_json(Path(base) / "config.json")
    vocabulary = vocabulary.get("vocab_size") or vocabulary.get("text_config", {}).get("vocab_size")
    if template is None:
        warn_of_added_end(chat, log)

    without = frozenset(id for path in args.without for id in read_json(path))
    report: dict = {"schema_version": 1, "contaminated_rows": rows_told(without)}
    out = Path(args.out)
    with atomic_files(out, *(f"{part}.parquet" for part in paths)) as files:
        counts: dict[str, Counts] = {}
        for part, path in paths.items():
            left_out = without if part == "train" else frozenset()
            target = files[f"{part}.parquet"]
            counts[part] = encode_rows(part, path, left_out, target, chat_settings, settings, args.threads)
            check_rows(part, counts[part], settings)
            check_lengths(part, counts[part], settings)
            check_vocabulary(part, counts[part], vocabulary)
            report[part] = described(counts[part], settings["max_length"])
            warn_of_lost_characters(part, report[part], log)
            warn_of_repeated_turns(part, counts[part], log)
        report |= {
            "template": {"origin": origin, "sha256": template_sha256(template)}
            | describe_template(template, counts, log),
            "pad_token_id": chat.pad_id,
            "stop": check_stop_tokens(counts["train"], chat),
            "vocabulary": vocabulary,
            "max_length": settings["max_length"],
        }
        preview = examples(every_nth(files["train.parquet"], PREVIEWED), chat)
    write_text(out / "chat_template.jinja", chat.template or "")
    write_json(out / "preview.json", preview)
    write_page(out / "preview.html", "preview.html", examples=preview, origin=origin)
    write_json(out / "report.json", report)
    counted = (
        f"{part}: {report[part]['sequences']:,} sequences, {report[part]['tokens']:,} tokens, "
        f"{100 * report[part]['trained_share']:.0f} % of them trained, longest {report[part]['length']['longest_kept']:,}"
        for part in paths
    )
    log.info("%s", "; ".join(counted))


# --- the template -----------------------------------------------------------------------------------------------------


def describe_template(template, counts: dict[str, "Counts"], log) -> dict:
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
            told["tool_use_rows"] = with_tools = sum(count.with_tools for count in counts.values())
            log.info("chat templates: tool_use for %s rows with tools, default for the others", f"{with_tools:,}")
    arguments = set().union(*(count.tool_arguments for count in counts.values()))
    if arguments:
        told["tool_arguments"] = " and ".join(sorted(arguments))
    if "text" in arguments:
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


@dataclass
class Counts:
    """What became of the rows and tokens of a portion, or of a whole part."""

    rows: int = 0
    with_tools: int = 0
    tool_arguments: set = field(default_factory=set)  # the forms in which the template takes them
    refused: Counter = field(default_factory=Counter)  # {reason: rows}
    examples: dict = field(default_factory=dict)  # {reason: the first such row and what is wrong with it}
    several: int = 0  # rows that make several sequences,
    several_made: int = 0  # how many,
    several_tokens: int = 0  # of how many tokens,
    several_longest: int = 0  # and of how many tokens the longest of each row
    lost: Counter = field(default_factory=Counter)  # characters that the tokenizer has no tokens for
    lost_rows: int = 0

    lengths: Counter = field(default_factory=Counter)  # {tokens: sequences}, before any are cut or dropped
    trained_made: int = 0  # tokens
    trained_lost: int = 0
    cut: int = 0  # sequences
    without_answer: int = 0

    sequences: int = 0  # these are kept
    tokens: int = 0
    trained: int = 0
    largest: tuple = (-1, "")  # the largest token, and the row that it is in
    longest: int = 0  # tokens
    # {the last token of a trained span: spans}, before any were cut
    ends_made: Counter = field(default_factory=Counter)
    ends: Counter = field(default_factory=Counter)  # of what is kept
    turn_ends: Counter = field(default_factory=Counter)  # of what is kept, but for plain text

    def add(self, other: "Counts") -> None:
        """Count those of the portion that follows, too."""
        for one in fields(self):
            mine, theirs = getattr(self, one.name), getattr(other, one.name)
            if isinstance(mine, Counter | set):
                mine.update(theirs)
            elif isinstance(mine, dict):
                setattr(self, one.name, theirs | mine)
            else:
                setattr(self, one.name, max(mine, theirs) if one.name in ("largest", "longest") else mine + theirs)


def encode_rows(
    part: str, path: Path, without: frozenset[str], target: Path, chat_settings: tuple, settings: dict, workers: int
) -> Counts:
    """Write the sequences of all rows to `target`, and count."""
    with path.open("rb") as file:
        total = sum(1 for _ in file)
    workers = min(workers, portion_count(path, total))
    counts = Counts()
    work = partial(encode_portion, limit=settings["max_length"], overlength=settings["overlength"])
    with progress(total, f"{part} rows: tokens") as bar, TokenFile(target) as made:
        for found, batch in ordered_stream(
            work, portions(path, without), workers, f"{part} rows", set_chat, chat_settings
        ):
            counts.add(found)
            made.add(batch)
            bar.update(found.rows)
    return counts


def set_chat(*chat_settings) -> None:
    global _chat

    _chat = Chat(*chat_settings)


def encode_portion(lines: list[bytes], limit: int, overlength: str):
    """(Counts, a RecordBatch of the sequences that are kept) of some rows."""
    import pyarrow as pa

    counts, kept = Counts(), []
    rows = [json.loads(line) for line in lines]
    for row, result in zip(rows, encode_batch(rows, limit), strict=True):
        count_row(counts, row, result)
        for sequence in result["sequences"]:
            sequence = within_limit(counts, sequence, limit, overlength, "text" in row)
            if sequence is not None:
                kept.append(sequence)
    schema = token_schema()
    columns = [pa.array([sequence[column.name] for sequence in kept], column.type) for column in schema]
    return counts, pa.record_batch(columns, schema=schema)


def encode_batch(rows: list[dict], limit: int | None = None) -> list[dict]:
    """Of each row {"sequences": [...], "lost": characters}, with "reason" and "message" if it cannot be rendered.

    `limit` as in `sequences_of`.
    """
    return [encoded(row, made) for row, made in zip(rows, sequences_of_all(_chat, rows, limit), strict=True)]


def encoded(row: dict, sequences: list[Sequence] | Unrenderable) -> dict:
    if isinstance(sequences, Unrenderable):
        return {"sequences": [], "lost": "", "reason": sequences.reason, "message": str(sequences)}
    said = [row] if "text" in row else row["messages"]
    said = "".join(part.get(key, "") for part in said for key in ("text", "content", "reasoning_content"))
    return {
        "lost": _chat.lost_characters(said),
        "sequences": [
            {
                "id": row["id"],
                "group": row["group"],
                "source": row["source"],
                "length": len(sequence.input_ids),
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


def count_row(counts: Counts, row: dict, result: dict) -> None:
    counts.rows += 1
    counts.with_tools += "tools" in row
    if any(message.get("tool_calls") for message in row.get("messages", [])):
        counts.tool_arguments.add("text" if _chat.takes_text_arguments(row.get("tools")) else "object")
    if "reason" in result:
        counts.refused[result["reason"]] += 1
        counts.examples.setdefault(result["reason"], f"{row['id']}: {result['message']}")
    counts.lost.update(result["lost"])
    counts.lost_rows += bool(result["lost"])
    lengths = [sequence["length"] for sequence in result["sequences"]]
    counts.lengths.update(lengths)
    if len(lengths) > 1:
        counts.several += 1
        counts.several_made += len(lengths)
        counts.several_tokens += sum(lengths)
        counts.several_longest += max(lengths)


def within_limit(counts: Counts, sequence: dict, limit: int, overlength: str, is_text: bool) -> dict | None:
    """The sequence, cut if it is longer than the limit; or None if it is dropped."""
    import numpy as np

    ids, labels = np.array(sequence["input_ids"], np.int32), np.array(sequence["labels"], np.int32)
    sequence |= {"input_ids": ids, "labels": labels}
    trained, ends = trained_spans(labels)
    counts.trained_made += trained
    counts.ends_made.update(ends)
    if len(ids) <= limit:
        count_kept(counts, sequence, trained, ends, is_text)
        return sequence
    if overlength != "truncate":
        counts.trained_lost += trained
        return None
    ids, labels = ids[:limit], labels[:limit]
    left, ends = trained_spans(labels)
    counts.cut += 1
    counts.trained_lost += trained - left
    if left == 0:
        counts.without_answer += 1
        return None
    # Bytes per token stay what they were, to the nearest byte.
    size = round(sequence["trained_bytes"] * left / trained)
    sequence |= {"length": limit, "input_ids": ids, "labels": labels, "answer_start": -1, "trained_bytes": size}
    count_kept(counts, sequence, left, ends, is_text)
    return sequence


def count_kept(counts: Counts, sequence: dict, trained: int, ends: list[int], is_text: bool) -> None:
    if not trained:
        raise MoultError(
            f"row {sequence['id']} has a sequence without a trained token", "this is a bug in Moult; please report it"
        )
    counts.sequences += 1
    counts.tokens += sequence["length"]
    counts.trained += trained
    counts.longest = max(counts.longest, sequence["length"])
    counts.largest = max(counts.largest, (sequence["input_ids"].max().item(), sequence["id"]))
    counts.ends.update(ends)
    if not is_text:  # plain text may be cut: it is no turn
        counts.turn_ends.update(ends)


def trained_spans(labels) -> tuple[int, list[int]]:
    """How many tokens are trained, and the last one of each trained span."""
    import numpy as np

    trained = labels != IGNORE
    last = trained.copy()
    np.greater(trained[:-1], trained[1:], out=last[:-1])
    return int(np.count_nonzero(trained)), labels[last].tolist()


# --- gates and counts -------------------------------------------------------------------------------------------------


def check_rows(part: str, counts: Counts, settings: dict) -> None:
    if not counts.rows:
        raise MoultError(
            f"every {part} row has a question of the evaluation (results/prepared/<dataset>/contamination.json)",
            "set eval.contamination: exclude, or ask other questions",
        )
    refused = counts.refused.total()
    if refused and (settings["unrenderable"] == "error" or refused == counts.rows):
        listing = "\n    ".join(
            f"{count:,} {reason}, for example {counts.examples[reason]}"
            for reason, count in counts.refused.most_common()
        )
        fix = "choose another model.chat_template (or its chat_template_kwargs)"
        if refused < counts.rows:
            fix = f"fix the rows, {fix}, or drop such rows with datasets.<name>.unrenderable: drop"
        raise MoultError(
            f"the chat template cannot show {refused:,} of {counts.rows:,} {part} rows unchanged:\n    {listing}", fix
        )


def check_lengths(part: str, counts: Counts, settings: dict) -> None:
    """`overlength`, within `max_token_loss`."""
    limit, made = settings["max_length"], counts.lengths.total()
    over = over_limit(counts, limit)
    advice = ", ".join(f"{q:.0%} fit into {quantile(counts.lengths, q):,}" for q in (0.95, 0.99, 1.0))
    if over and settings["overlength"] == "error":
        raise MoultError(
            f"{over:,} of {made:,} {part} sequences are longer than max_length {limit:,}",
            f"raise datasets.<name>.max_length ({advice}), or set overlength: drop or truncate",
        )
    if not counts.sequences:
        raise MoultError(
            f"all {made:,} {part} sequences are longer than max_length {limit:,}",
            f"raise datasets.<name>.max_length ({advice})",
        )
    if counts.trained_lost > settings["max_token_loss"] * counts.trained_made:
        raise MoultError(
            f"max_length {limit:,} removes {counts.trained_lost / counts.trained_made:.1%} of the trained {part} tokens "
            f"({over:,} sequences, {over / made:.1%}, are longer), more than max_token_loss {settings['max_token_loss']:.1%}",
            f"raise datasets.<name>.max_length ({advice}), or max_token_loss",
        )


def described(counts: Counts, limit: int) -> dict:
    """What the report says of a part."""
    over = over_limit(counts, limit)
    return {
        "rows": counts.rows,
        "unrenderable": dict(counts.refused),
        "rows_in_several_sequences": counts.several,
        "lost_characters": {
            "count": counts.lost.total(),
            "rows": counts.lost_rows,
            "which": dict(counts.lost.most_common(20)),
        },
        "length": {
            "longest": max(counts.lengths),
            "longest_kept": counts.longest,
            "quantiles": {f"{q:g}": quantile(counts.lengths, q) for q in (0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)},
            "over_max_length": over,
            "dropped": over - counts.cut,
            "truncated": counts.cut,
            "truncated_before_the_answer": counts.without_answer,
            "trained_tokens_made": counts.trained_made,
            "trained_tokens_lost": counts.trained_lost,
        },
        "sequences": counts.sequences,
        "tokens": counts.tokens,
        "trained_tokens": counts.trained,
        "trained_share": counts.trained / counts.tokens,
    }


def over_limit(counts: Counts, limit: int) -> int:
    return sum(count for length, count in counts.lengths.items() if length > limit)


def quantile(lengths: Counter, q: float) -> int:
    """The smallest of the counted lengths that is not below a share `q` of them."""
    place = max(1, -(-int(q * 1_000_000) * lengths.total() // 1_000_000))
    for length in sorted(lengths):
        place -= lengths[length]
        if place <= 0:
            return length
    return max(lengths)


def check_vocabulary(part: str, counts: Counts, vocabulary: int | None) -> None:
    largest, where = counts.largest
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


def warn_of_repeated_turns(part: str, counts: Counts, log) -> None:
    """Say what it costs where a template does not show earlier turns as it showed them when they were the last."""
    if counts.several_tokens > 2 * counts.several_longest:
        log.warning(
            "%s: %s rows make %s sequences, %s times as many tokens as the conversations have: the template asks for an answer, "
            "or shows it, otherwise while it is the last turn than later on, so that each turn needs a sequence where it "
            "stands as it will when the model writes it. If the difference is one of white space only, change the template: "
            "what add_generation_prompt writes must be what stands before each answer ({{- ... -}} writes no line breaks)",
            part,
            f"{counts.several:,}",
            f"{counts.several_made:,}",
            f"{counts.several_tokens / counts.several_longest:.1f}",
        )


def check_stop_tokens(counts: Counts, chat) -> dict:
    """Which tokens end the trained turns, and whether generation already stops at them.

    In the result, `added` are tokens that end turns but that generation_config does not name, usually because a base model was
    given a chat template. merge and finetune add them to generation_config.
    """
    trained = sorted(token for token in counts.ends_made if token in chat.stop_ids or token in chat.special_ids)
    # Only truncation leaves a turn without its end.
    ended, turns = sum(counts.turn_ends[token] for token in trained), counts.turn_ends.total()
    if ended < turns / 2:
        raise MoultError(
            f"only {ended:,} of {turns:,} trained turns end with a stop token: the model would not learn to stop",
            "raise datasets.<name>.max_length, or set overlength: drop",
        )
    return {
        "trained_ends": counts.ends.total(),
        "with_stop_token": sum(counts.ends[token] for token in trained),
        "token_ids": trained,
        "tokens": [chat.decode([token]) for token in trained],
        "added": [token for token in trained if token not in chat.stop_ids],
        "generation_stop_ids": sorted(chat.stop_ids | set(trained)),
    }


if __name__ == "__main__":
    main()
