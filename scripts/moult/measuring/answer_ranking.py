"""The ranking of tuned models by the answers that pass, on the same questions; ranking.py does the same with the loss."""

from typing import TypedDict

from moult.measuring.paired import compare_all_answers
from moult.measuring.ranking import holm_corrected


class Behind(TypedDict):
    """By how much the rate is above that of the best (so it is at most 0), with the interval of this difference alone.

    corrected_p: by Holm, for all pairs of runs. worse: corrected_p is at most 1 - confidence.
    """

    value: float
    interval: list[float]
    corrected_p: float
    worse: bool


class Place(TypedDict):
    """A run in the ranking. behind: None for the best."""

    run: str
    value: float
    behind: Behind | None


class AnswerRanking(TypedDict):
    """places: the best first, of those that are equally good the first by name. level: the runs that cannot be told from the
    best, itself included. n: how many questions all were asked. pairs: how many were compared."""

    n: int
    pairs: int
    level: list[str]
    places: list[Place]


def rank_answers(samples: dict[str, list[dict]], confidence: float) -> AnswerRanking:
    """Rank two runs or more: {name: samples.jsonl}. Raises MoultError if there is no checked question that all were asked."""
    pairs = compare_all_answers(samples, confidence)
    rates = {name: rate["value"] for (a, b), one in pairs.items() for name, rate in ((a, one["a"]), (b, one["b"]))}
    corrected = holm_corrected({pair: one["p"] for pair, one in pairs.items()})
    order = sorted(rates, key=lambda name: (-rates[name], name))
    best = order[0]
    places: list[Place] = [{"run": best, "value": rates[best], "behind": None}]
    for name in order[1:]:
        pair = (best, name) if (best, name) in pairs else (name, best)
        low, high = pairs[pair]["difference"]["interval"]
        behind: Behind = {
            "value": rates[name] - rates[best],
            "interval": [low, high] if pair[0] == best else [-high, -low],
            "corrected_p": corrected[pair],
            "worse": corrected[pair] <= 1 - confidence,
        }
        places.append({"run": name, "value": rates[name], "behind": behind})
    level = [place["run"] for place in places if not (place["behind"] and place["behind"]["worse"])]
    return {"n": next(iter(pairs.values()))["n"], "pairs": len(pairs), "level": level, "places": places}
