"""A Modelfile for Ollama, and whether `ollama create` would put a template of its own in place of the run's."""

from collections import Counter
from pathlib import Path

from moult.files import read_json, write_text

# Of each template that Ollama knows: its name, and which characters are in its first 64, in the next 64 and so on, sorted. Its
# text, which is Ollama's, is not here.
KNOWN = Path(__file__).with_name("ollama_templates.json")

# Ollama's default, in tokens. A larger context takes more memory.
CONTEXT = 4096


def write_modelfile(
    folder: Path, model: str, adapter: str | None, stops: list[str], context: int | None, longest: int
) -> None:
    """`folder`/Modelfile, for `ollama create`.

    It has no TEMPLATE: Ollama then takes the one in the file. temperature and repeat_penalty are those of the measurement.

    Args:
        model, adapter: files in the folder.
        stops: texts of the tokens that end generation.
        context: the model's, in tokens.
        longest: the longest sequence of the training, in tokens.
    """
    lines = [f"FROM ./{model}"]
    lines += [f"ADAPTER ./{adapter}"] if adapter else []
    wanted = max(CONTEXT, longest)
    lines += [
        f"PARAMETER num_ctx {min(wanted, context or wanted)}",
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",
    ]
    lines += [f"PARAMETER stop {quoted(stop)}" for stop in stops]
    write_text(folder / "Modelfile", "\n".join(lines) + "\n")


def quoted(text: str) -> str:
    """As Ollama's parser (parser/parser.go) reads it."""
    return f'"""{text}"""' if '"' in text else f'"{text}"'


def least_distance(pieces: list[str], text: str, limit: int) -> int:
    """A lower bound of the Levenshtein distance between `text` and another, of which only the characters of each piece are known;
    `limit` stands for that and more.

    However one text is edited into the other, each piece becomes some piece of it, and the best way to cut it is found here. What
    that costs is at least the difference of the characters: an edit takes one, brings one, or both (Bartolini, Ciaccia, Patella:
    String Matching with Metric Trees Using an Approximate Distance, SPIRE 2002).
    """
    reached = {0: 0}  # {place in the text: least cost of the pieces so far}, below the limit
    for piece in pieces:
        found: dict[int, int] = {}
        for begin, before in reached.items():
            left, missing, more = Counter(piece), len(piece), 0
            for end in range(begin, len(text) + 1):
                cost = before + max(missing, more)
                if cost < found.get(end, limit):
                    found[end] = cost
                if before + more >= limit or end == len(text):
                    break
                if left[text[end]] > 0:
                    left[text[end]] -= 1
                    missing -= 1
                else:
                    more += 1
        reached = found
    return reached.get(len(text), limit)


def template_check(template: str) -> dict:
    """Whether `ollama create` leaves the template alone. It replaces one that is near to one that it knows (template.go).

    Returns {"kept": True, or None if that is not sure, "nearest": name, "distance_at_least": edits, "commit": of Ollama}.
    """
    known = read_json(KNOWN)
    limit = known["replaces_below"]
    distance, nearest = min((least_distance(one["pieces"], template, limit), one["name"]) for one in known["templates"])
    kept = True if not template or distance >= limit else None
    near = {} if kept else {"nearest": nearest, "distance_at_least": distance}
    return {"kept": kept, "nearest": None, "distance_at_least": limit, **near, "commit": known["commit"]}
