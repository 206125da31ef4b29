"""The verdict: what the measurements together allow to say of a tuned model.

Several measurements are looked at, so one of them would be clear by chance more often than the confidence says. Holm's step-down
test corrects that: with the confidence 95 %, a tuning that changes nothing is called helped or hurt in at most 5 % of all
cases, whatever is measured (tests/test_verdict.py). The intervals that are shown are each of the configured confidence.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moult.errors import MoultError
from moult.measuring.power import smallest_effect, smallest_shift

# The share of the error that the likelihood may use: little, because it shows more than the answers do. They have the rest,
# each part by its number of questions: the parts that can show most lose least to those that can show little (weighted Holm;
# Benjamini and Hochberg, Scandinavian Journal of Statistics 24:407, 1997).
LIKELIHOOD_WEIGHT = 0.25

# The parts of the answers that count, by their names in the reasons.
PARTS = {"prompts": "prompts passed", "rows": "rows passed", "instructions": "instructions passed"}
GENERAL = "general text"
POINTS = "points"  # of a hundred questions


@dataclass
class Measure:
    """One measurement that can make a tuned model better or worse.

    difference: value, interval and p of tuned - base. groups: how many independent things it rests on.
    sign: 1 if more is better, else -1. weight: its share of the error. rows: what it rests on, for people. unit: for people.
    shows: the smallest difference that it shows in 80 % of all cases, at a confidence.
    """

    name: str
    difference: dict
    groups: int
    sign: int
    weight: float
    rows: str
    unit: str
    shows: Callable[[float], float | None]

    @property
    def p(self) -> float:
        """A few groups may all change in the same direction by chance (sign test): the intervals are no evidence below that."""
        return max(self.difference["p"], 2.0 ** (1 - self.groups))

    def too_few(self, confidence: float) -> bool:
        """Whether it rests on so few groups that even all of them together are no evidence."""
        return 2.0 ** (1 - self.groups) > 1 - confidence

    @property
    def better(self) -> bool:
        return self.sign * self.difference["value"] > 0


def verdict(
    measures: list[Measure], answers: dict, general: dict | None, settings: dict, cautions: Sequence[str] = ()
) -> dict:
    """helped: something is better and nothing is worse; hurt: the reverse; otherwise inconclusive. What is lost of the general
    text beyond the limit makes it hurt, whatever is better. How many answers stop is reported but does not count: a model with
    longer answers stops less often within max_new_tokens.

    Args:
        measures: what counts (measures_of).
        answers: the rates of all parts; of these, how many answers stop.
        general: the comparison of the general text, if it was measured.
        settings: confidence, forgetting_limit.
        cautions: the last of the reasons.
    """
    confidence = settings["confidence"]
    if not any(measure.name != PARTS["instructions"] for measure in measures):
        raise MoultError(
            "; ".join(["nothing was measured", *cautions]),
            "set eval.perplexity: true, or add checks to eval.prompts (expect) or eval.row_expect",
        )
    clear = holm({m.name: m.p for m in measures}, {m.name: m.weight for m in measures}, 1 - confidence)
    found: dict[str, list[str]] = {"better": [], "worse": [], "unclear": []}
    reasons, smallest = [], {}
    for measure in measures:
        kind = "unclear" if measure.name not in clear else "better" if measure.better else "worse"
        found[kind].append(measure.name)
        reason = f"{measure.name} {'inconclusive' if kind == 'unclear' else kind}: {change(measure)}"
        if kind == "unclear":
            shown = smallest_shown(measure, measures, confidence)
            smallest[measure.name] = shown
            reason += f"; {why_unclear(measure, shown, confidence, len(measures))}"
        reasons.append(reason)
    if general:
        lost, reason = general_lost(general, settings)
        found["worse"] += [GENERAL] if lost else []
        reasons.append(reason)
    if "all" in answers:
        stopped = answers["all"]["stopped"]
        reasons.append(f"answers that stop: {stopped['base']['value']:.0%} -> {stopped['tuned']['value']:.0%}")
    reasons += cautions
    word = "inconclusive"
    if GENERAL in found["worse"] or (found["worse"] and not found["better"]):
        word = "hurt"
    elif found["better"] and not found["worse"]:
        word = "helped"
    return {"verdict": word, **found, "smallest_effect": smallest, "reasons": reasons, "cautions": list(cautions)}


def measures_of(
    likelihood: dict | None, answers: dict, benchmarks: dict, groups: int, confidence: float
) -> list[Measure]:
    """What counts in the verdict. `groups`: of the rows whose likelihood was measured."""
    checked = {part: answers[part]["passed"] for part in PARTS if answers.get(part, {}).get("passed")}
    # A benchmark whose questions are all in the training rows has no figures.
    asked = {f"benchmark {name}": one["metrics"].get(one["metric"]) for name, one in benchmarks.items()}
    asked = {name: metric for name, metric in asked.items() if metric}
    weights = shares({name: rates["n"] for name, rates in (checked | asked).items()}, bool(likelihood))
    found = []
    if likelihood:
        shift = likelihood["difference"]["nll_per_token"]
        rows, shows = f"{groups:,} groups of rows", by_shift(shift, confidence)
        found.append(Measure("loss", shift, groups, -1, weights["likelihood"], rows, "nats per token", shows))
    for part, rates in checked.items():
        # Rows of one group may still have answers of their own; what they are worth together is in `independent`.
        worth, rows = round(rates["independent"]), f"{rates['n']:,} {part}"
        shows = by_rate(worth, rates["base"]["value"])
        found.append(Measure(PARTS[part], rates["difference"], worth, 1, weights[part], rows, POINTS, shows))
    for name, metric in asked.items():
        n, sign, shift = metric["n"], 1 if metric["higher_is_better"] else -1, metric["difference"]
        shows = by_rate(n, metric["base"]["value"]) if metric["is_rate"] else by_shift(shift, confidence)
        unit = POINTS if metric["is_rate"] else "on average"
        found.append(Measure(name, shift, n, sign, weights[name], f"{n:,} questions", unit, shows))
    return found


def by_rate(n: int, base: float) -> Callable[[float], float | None]:
    return lambda level: smallest_effect(max(1, n), base, level)


def by_shift(difference: dict, confidence: float) -> Callable[[float], float | None]:
    """Of a mean. `confidence`: of its interval."""
    return lambda level: smallest_shift(difference["interval"], confidence, level)


def shares(questions: dict[str, int], likelihood: bool) -> dict[str, float]:
    """The weight of each part that is measured, together 1. `questions`: how many of them each part of the answers has."""
    own = LIKELIHOOD_WEIGHT if likelihood and questions else float(likelihood)
    total = sum(questions.values())
    weights = {part: (1 - own) * n / total for part, n in questions.items()}
    return {"likelihood": own, **weights} if likelihood else weights


def holm(p_values: dict[str, float], weights: dict[str, float], error: float) -> set[str]:
    """The names that are clear, so that in at most the share `error` of all cases any of them is so by chance."""
    left, clear = dict(p_values), set()
    while left:
        name = min(left, key=lambda name: left[name] / weights[name])
        if left.pop(name) > error * weights[name] / sum(weights[other] for other in (name, *left)):
            break
        clear.add(name)
    return clear


def smallest_shown(measure: Measure, measures: list[Measure], confidence: float) -> float | None:
    """What this measurement shows in 80 % of all cases beside the others: with its share of the error. None: nothing."""
    if measure.too_few(confidence):
        return None
    return measure.shows(1 - (1 - confidence) * measure.weight / sum(other.weight for other in measures))


def change(measure: Measure) -> str:
    scale = 100 if measure.unit == POINTS else 1
    value, low, high = (
        f"{scale * limit:+.3g}" for limit in (measure.difference["value"], *measure.difference["interval"])
    )
    return f"{value} {measure.unit} [{low}, {high}]"


def why_unclear(measure: Measure, shown: float | None, confidence: float, measures: int) -> str:
    text = f"too few to show any difference: {measure.rows}"
    if measure.too_few(confidence):
        return text
    if shown is not None:
        size = f"{100 * shown:.0f}" if measure.unit == POINTS else f"{shown:.2g}"
        text = f"these {measure.rows} show {size} {measure.unit} or more"
    low, high = measure.difference["interval"]
    if not low <= 0 <= high:
        text += f" (clear by itself, but one of {measures} measurements may be so by chance: Holm)"
    return text


def general_lost(general: dict, settings: dict) -> tuple[bool, str]:
    """Whether more of the general text is lost than the limit allows, by the bound of the interval; and what to say."""
    shift, limit = general["difference"], settings["forgetting_limit"]
    value, low, high = (f"{number:+.3g}" for number in (shift["value"], *shift["interval"]))
    kind = "worse" if shift["interval"][0] > 0 else "better" if shift["interval"][1] < 0 else "not clearly changed"
    if general["guess"] and general["base"]["value"] > general["guess"]:
        nats = f"{general['base']['value']:.3g} nats per token, and a guess takes {general['guess']:.3g}"
        return False, f"{GENERAL} does not count: the base does not know it ({nats})"
    said = f"{GENERAL} {kind}: {value} nats per token [{low}, {high}]"
    if 2.0 ** (1 - general["texts"]) > 1 - settings["confidence"]:
        return False, f"{said}; too few to count: {general['texts']} texts"
    if shift["interval"][0] > limit:
        return True, f"{said}, more than eval.forgetting_limit ({limit:g}) allows"
    return False, said
