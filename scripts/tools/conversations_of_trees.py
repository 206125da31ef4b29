"""Make conversations of trees of messages, as OpenAssistant publishes them (oasst1, oasst2).

    python scripts/tools/conversations_of_trees.py trees.jsonl.gz --out oasst.jsonl
    python scripts/tools/conversations_of_trees.py results/datasets/OpenAssistant--oasst1.parquet --out oasst.jsonl --best

Both layouts are read: a message per row, which names its parent (message_id, parent_id, role, text), and a tree per row (the
message `prompt` with its `replies`). There is a conversation for each answer that no other answer follows: the messages from the
root to it, with the tree as `group`, so that no tree is on both sides of the split. An answer that stands in several
conversations is trained in the first and is context in the others ("train": false). Deleted messages are left out, with what
follows them.

Then: `datasets: {oasst: {source: oasst.jsonl}}`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import _library  # noqa: F401

from moult.data.readers import expand, read_rows
from moult.errors import MoultError
from moult.files import write_jsonl
from moult.run.cli import tool_parser
from moult.run.stage import stage


@dataclass
class Message:
    """A message of a tree. rank: 0 is the best of its siblings."""

    id: str
    parent: str | None
    role: str
    text: str
    rank: float
    deleted: bool
    replies: list["Message"] = field(default_factory=list)


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("source", help="file, folder or glob with the messages or trees")
    parser.add_argument("--out", required=True, help="conversations to write (.jsonl)")
    parser.add_argument("--best", action="store_true", help="one conversation per tree, of the best-ranked replies")
    parser.add_argument("--log-file", help="log file (default: logs/conversations_of_trees.log)")
    args = parser.parse_args()
    with stage("conversations_of_trees", args.log_file) as log:
        messages = list(read_messages(args.source))
        roots = trees_of(messages)
        paths = [path for root in roots for path in paths_of(root)[: 1 if args.best else None]]
        if not paths:
            raise MoultError(
                f"{args.source}: no answer in {len(messages):,} messages", "check that it holds such trees"
            )
        write_jsonl(args.out, rows_of(paths))
        used = {message.id for path in paths for message in path}
        log.info(
            "%s messages in %s trees: %s conversations", f"{len(messages):,}", f"{len(roots):,}", f"{len(paths):,}"
        )
        log.info(
            "%s messages are in none: deleted, without their parent or an answer%s",
            f"{len(messages) - len(used):,}",
            ", or not the best" if args.best else "",
        )


def read_messages(source: str) -> Iterator[Message]:
    """All messages, of either layout. Raises MoultError with the place of a row that is neither."""
    for file in expand(source):
        for place, row in read_rows(file, file.name):
            waiting = [(row["prompt"] if isinstance(row.get("prompt"), dict) else row, row.get("parent_id"))]
            while waiting:
                item, parent = waiting.pop()
                try:
                    rank = item.get("rank")
                    message = Message(
                        id=item["message_id"],
                        parent=parent,
                        role=item["role"],
                        text=item["text"],
                        rank=float("inf") if rank is None else rank,
                        deleted=bool(item.get("deleted")),
                    )
                    waiting += [(reply, message.id) for reply in reversed(item.get("replies") or [])]
                except (KeyError, AttributeError, TypeError):
                    raise MoultError(
                        f"{place}: not a message of a tree: message_id, role and text are needed",
                        "give this command the messages or trees of OpenAssistant's layout",
                    ) from None
                yield message


def trees_of(messages: list[Message]) -> list[Message]:
    """The roots, with the replies of each message linked, the best first."""
    by_id = {message.id: message for message in messages}
    for message in messages:
        if message.parent in by_id:
            by_id[message.parent].replies.append(message)
    for message in messages:
        message.replies.sort(key=lambda reply: reply.rank)
    return [message for message in messages if message.parent is None]


def paths_of(root: Message) -> list[list[Message]]:
    """The messages from the root to each answer that no other follows, the path of the best replies first."""
    paths, waiting = [], [[root]]
    while waiting:
        path = waiting.pop()
        if path[-1].deleted:
            continue
        if path[-1].role == "assistant":
            paths.append(path)
        replies = [reply for reply in path[-1].replies if not reply.deleted]
        waiting += [[*path, reply] for reply in reversed(replies)]
    followed = {message.id for path in paths for message in path[:-1]}
    return [path for path in paths if path[-1].id not in followed]


def rows_of(paths: list[list[Message]]) -> Iterator[dict]:
    trained: set[str] = set()
    for path in paths:
        yield {"messages": [turn(message, message.id in trained) for message in path], "group": path[0].id}
        trained |= {message.id for message in path}


def turn(message: Message, is_trained: bool) -> dict:
    row = {"role": "user" if message.role == "prompter" else message.role, "content": message.text}
    return {**row, "train": False} if is_trained and message.role == "assistant" else row


if __name__ == "__main__":
    main()
