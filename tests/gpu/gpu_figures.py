"""The result of tests/gpu/benchmark.py as Markdown."""

from pathlib import Path

BEGIN, END = "<!-- gpu: made by tests/gpu/benchmark.py -->", "<!-- end of gpu -->"


def table(result: dict) -> str:
    """The card, a table of the trainings, and a line for each other case."""
    machine, cases = result["machine"], result["cases"]
    packages = ", ".join(
        f"{name} {machine['versions'][name]}" for name in ("torch", "transformers", "trl", "peft", "moult")
    )
    card = "; ".join(machine["cards"]) or "no GPU"
    head = ["case", "tokens/s", "MFU", "predicted GB", "used GB", "used / predicted"]
    lines = [head, ["---", *["---:"] * 5]]
    notes = []
    for name, found in cases.items():
        if "tokens_per_second" in found and not name.startswith("validation"):
            used, predicted = found.get("peak_used"), found.get("predicted")
            lines.append(
                [
                    name + (" (checkpointed)" if found.get("checkpointed") and "checkpointed" not in name else ""),
                    shown(found["tokens_per_second"], ",.0f"),
                    shown(found.get("mfu"), ".0%"),
                    shown(predicted and predicted / 1e9, ".1f"),
                    shown(used and used / 1e9, ".1f"),
                    shown(used and predicted and used / predicted, ".2f"),
                ]
            )
            notes += [f"- {name}, {key}: {brief(value)}" for key, value in found.items() if key.startswith("compared")]
        elif found["status"] != "done":
            notes.append(f"- {name}: {found['status']}{': ' + found['why'].splitlines()[0] if 'why' in found else ''}")
        else:
            hidden = ("status", "wall_seconds", "machine", "plan")
            figures = (f"{key} {brief(value)}" for key, value in found.items() if key not in hidden)
            notes.append(f"- {name}: {', '.join(figures)}")
    rows = [f"| {' | '.join(line)} |" for line in lines]
    about = f"{card}; CUDA {machine['cuda']}; {packages}" + (
        "; --tiny: says nothing of speed" if result["tiny"] else ""
    )
    return "\n".join([about, "", *rows, "", *notes])


def shown(number: float | None, form: str) -> str:
    return format(number, form) if number else "–"


def brief(value) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} {brief(part)}" for key, part in value.items()) + "}"
    if isinstance(value, float):
        return f"{value:,.3g}"
    return f"{value:,}" if type(value) is int else str(value)


def write_into(page: Path, text: str) -> None:
    """Put the text between the two marks of the page."""
    old = page.read_text(encoding="utf-8")
    page.write_text(f"{old.split(BEGIN)[0]}{BEGIN}\n{text}\n{END}{old.split(END)[1]}", encoding="utf-8")
