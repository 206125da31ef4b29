"""What tuning broke: a text and instructions that have nothing to do with anybody's data, the same for every model.

general_text.txt: 128 short texts in 20 languages, of code, arithmetic and conversations, to be measured without a chat
template. instructions.jsonl: instructions and simple questions in plain chat, in the form of eval.prompts. All were written
for this purpose.
"""

import json
import re
from pathlib import Path

TEXTS, INSTRUCTIONS = (Path(__file__).parent / name for name in ("general_text.txt", "instructions.jsonl"))


def general_texts() -> dict[str, str]:
    """{id: text}. The first part of an id is the language, or `code`, `math` or `chat`."""
    blocks = re.split(r"^=== (.+)\n", TEXTS.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return dict(zip(blocks[::2], (text.rstrip("\n") for text in blocks[1::2]), strict=True))


def instructions() -> list[dict]:
    return [json.loads(line) for line in INSTRUCTIONS.read_text(encoding="utf-8").splitlines()]
