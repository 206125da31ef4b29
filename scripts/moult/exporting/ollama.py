"""A Modelfile for Ollama, and whether `ollama create` would put a template of its own in place of the run's."""

from collections import Counter
from pathlib import Path

from moult.files import read_json, write_text

# Of each template that Ollama knows: its name, its length, and how often it has each character. The texts are Ollama's.
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


def bag_distance(a: Counter, b: Counter) -> int:
    """A lower bound of the Levenshtein distance of two texts, by how often each character is in them.

    An edit takes a character, brings one, or does both (Bartolini, Ciaccia, Patella: String Matching with Metric Trees Using
    an Approximate Distance, SPIRE 2002).
    """
    return max((a - b).total(), (b - a).total())


def template_check(template: str) -> dict:
    """Whether `ollama create` leaves the template alone. It replaces one that is near to one that it knows (template.go).

    Returns {"kept": True, or None if that is not sure, "nearest": name, "distance_at_least": edits, "commit": of Ollama}.
    """
    known = read_json(KNOWN)
    own = Counter(template)
    distance, nearest = min((bag_distance(own, Counter(one["characters"])), one["name"]) for one in known["templates"])
    kept = True if not template or distance >= known["replaces_below"] else None
    return {"kept": kept, "nearest": nearest, "distance_at_least": distance, "commit": known["commit"]}
