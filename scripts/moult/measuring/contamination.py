"""What it means for the score that questions of the evaluation are in the training rows (eval.contamination)."""

from dataclasses import dataclass, field

from moult.data.contamination import question_of


@dataclass
class Contamination:
    """What of a run's questions is in the training rows of its dataset.

    policy: exclude, drop or report. prompts: ids of those that were found, of so many `asked`. questions: {slug of a benchmark:
    (task, doc_id) of those that were found}. rows: how many training rows have a question of this run or of another one.
    """

    policy: str
    asked: int
    prompts: list[str]
    names: dict[str, str]  # {slug: name} of the run's benchmarks
    questions: dict[str, set[tuple[str, int]]] = field(default_factory=dict)
    rows: int = 0

    @classmethod
    def of(cls, found: dict, settings: dict) -> "Contamination":
        """`found`: contamination.json, which is about all runs of the dataset. `settings`: this run's eval."""
        prompts = {entry["question"] for entry in found["found"] if entry["kind"] == "prompt"}
        names = {one["slug"]: name for name, one in settings["benchmarks"].items()}
        questions: dict[str, set[tuple[str, int]]] = {slug: set() for slug in names}
        for entry in found["found"]:
            if entry.get("benchmark") in names:
                questions[entry["benchmark"]].add((entry["task"], entry["doc_id"]))
        ids = [prompt["id"] for prompt in settings["prompts"] if question_of(prompt) in prompts]
        rows = found["contaminated_rows"]["count"]
        return cls(settings["contamination"], len(settings["prompts"]), ids, names, questions, rows)

    def prompts_left_out(self) -> list[str]:
        return self.prompts if self.policy == "exclude" else []

    def questions_left_out(self, slug: str) -> set[tuple[str, int]]:
        return self.questions[slug] if self.policy == "exclude" else set()

    def told(self) -> dict:
        """For metrics.json."""
        return {
            "policy": self.policy,
            "prompts": self.prompts,
            "benchmarks": {self.names[slug]: len(found) for slug, found in self.questions.items()},
            "training_rows": self.rows,
        }

    def reason(self) -> str:
        """For the verdict, "" if nothing was found."""
        parts = [f"{len(self.prompts)} of {self.asked} prompts"] if self.prompts else []
        parts += [f"{len(found)} questions of {self.names[slug]}" for slug, found in self.questions.items() if found]
        then = {"exclude": "they do not count", "drop": "these rows were left out", "report": "they count all the same"}
        return f"in the training rows: {', '.join(parts)}; {then[self.policy]}" if parts else ""
