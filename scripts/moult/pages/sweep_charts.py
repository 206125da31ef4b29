"""The charts of a sweep's page. What they show is prepared by scripts/sweep.py; here is only how it looks."""

from functools import partial

from markupsafe import Markup

from moult.pages.charts import COLOUR, LABELS, NARROW, SERIES, figure

# Of the lines, as many as there are colours. More would not be told apart.
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left"]


def panel(key: str, points: list[dict], unit: str, confidence: float) -> Markup:
    """The loss over the values of one key, with a line for each combination of the others."""
    lines = list(dict.fromkeys(point["line"] for point in points))
    shown = f"with its {100 * confidence:g} % interval"
    if len(lines) > len(SHAPES):
        shown = f"on {len(lines)} lines, one for each combination of the other settings"
    caption = f"{key}: {unit} of each run, {shown}. Less is better; the ring is the lowest."
    return figure(caption, partial(drawn, key, points, lines, unit))


def drawn(key: str, points: list[dict], lines: list[str], unit: str, width: int):
    """Values of numbers along the bottom, joined by lines; words, which have no order and may be long, at the left."""
    import altair as alt

    joined = are_numbers(points)
    plot = width - (80 if joined else LABELS[width] + 40)
    at = numbers(key, points) if joined else words(lines, width)
    channel, side = ("y", alt.Y) if joined else ("x", alt.X)
    loss = {channel: side("loss:Q", title=unit, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=5))}
    chart = alt.Chart(alt.Data(values=beside(points, lines))).encode(**at, detail="line:N")
    many = len(lines) > len(SHAPES)
    look: dict = {"color": alt.value(SERIES[0])}
    shape: dict = {}
    if 1 < len(lines) <= len(SHAPES):
        legend = alt.Legend(title=None, columns=1 if width == NARROW else 3, labelLimit=plot - 30, columnPadding=30)
        scales = [alt.Scale(domain=lines, range=kinds[: len(lines)]) for kinds in (SERIES, SHAPES)]
        look = {"color": alt.Color("line:N", scale=scales[0], legend=legend)}
        shape = {"shape": alt.Shape("line:N", scale=scales[1], legend=legend)}
    marks = chart.mark_point(filled=True, size=40 if many else 90, opacity=1).encode(**loss, **look, **shape)
    best = chart.transform_filter("datum.best").mark_point(size=380, strokeWidth=2, color=COLOUR["text"]).encode(**loss)
    layers = [marks, best]
    if not many:
        bounds = {channel: side("low:Q", title=unit), f"{channel}2": "high:Q"}
        layers.insert(0, chart.mark_rule(strokeWidth=2).encode(**bounds, **look))
    if joined:
        layers.insert(0, chart.mark_line(strokeWidth=1 if many else 1.5).encode(**loss, **look))
    return alt.layer(*layers).properties(width=plot, height=260 if joined else alt.Step(20))


def numbers(key: str, points: list[dict]) -> dict:
    import altair as alt

    values = sorted({point["x"] for point in points})
    scale = alt.Scale(type="log" if is_wide(points) else "linear", zero=False, nice=False, padding=24)
    return {"x": alt.X("at:Q", title=key, scale=scale, axis=alt.Axis(values=values, format=".6~g", grid=False))}


def words(lines: list[str], width: int) -> dict:
    import altair as alt

    room = LABELS[width]  # some browsers' letters are wider than those that the limit is measured with
    axis = alt.Axis(labelLimit=0.8 * room, minExtent=room, grid=False)
    return {"y": alt.Y("x:N", sort=None, title=None, axis=axis), "yOffset": alt.YOffset("line:N", sort=lines)}


def are_numbers(points: list[dict]) -> bool:
    return all(not isinstance(point["x"], str) for point in points)


def is_wide(points: list[dict]) -> bool:
    """Whether the values are of several sizes, as learning rates are."""
    values = [point["x"] for point in points]
    return min(values) > 0 and max(values) >= 8 * min(values)


def beside(points: list[dict], lines: list[str]) -> list[dict]:
    """The points with `at`: their values, those of different lines a little apart, so that no interval hides another."""
    if not are_numbers(points):
        return points
    values = [point["x"] for point in points]
    low, high = min(values), max(values)
    step = min(0.02, 0.1 / len(lines))  # of the axis
    shifts = {line: step * (place - (len(lines) - 1) / 2) for place, line in enumerate(lines)}
    wide = is_wide(points)

    def shifted(x: float, shift: float) -> float:
        return x * (high / low) ** shift if wide else x + (high - low) * shift

    return [{**point, "at": shifted(point["x"], shifts[point["line"]])} for point in points]


def climbs(points: list[dict], unit: str) -> Markup:
    """The loss of each run at the rungs: those that went to the end, and those that were dropped.

    points: [{"step", "run", "loss", "dropped"}].
    """
    caption = f"{unit.capitalize()} on the test rows at each rung and at the end, a line for each run. Less is better."
    return figure(caption, partial(climbing, points, unit))


def climbing(points: list[dict], unit: str, width: int):
    import altair as alt

    kinds = ["went on", "dropped"]
    named = [{**point, "kind": kinds[point["dropped"]]} for point in points]
    losses = [point["loss"] for point in points]
    scale = alt.Scale(type="log" if min(losses) > 0 and max(losses) > 20 * min(losses) else "linear", zero=False)
    colour = alt.Color(
        "kind:N",
        scale=alt.Scale(domain=kinds, range=[COLOUR["tuned"], COLOUR["worse"]]),
        legend=alt.Legend(title=None),
    )
    shape = alt.Shape("kind:N", scale=alt.Scale(domain=kinds, range=["circle", "triangle-down"]))
    x = alt.X("step:Q", title="step", axis=alt.Axis(values=sorted({point["step"] for point in points}), format="~s"))
    y = alt.Y("loss:Q", title=unit, scale=scale, axis=alt.Axis(tickCount=5))
    chart = alt.Chart(alt.Data(values=named)).encode(x=x, y=y, detail="run:N", color=colour)
    marks = chart.mark_point(filled=True, size=70, opacity=1).encode(shape=shape)
    return alt.layer(chart.mark_line(strokeWidth=1.5), marks).properties(width=width - 80, height=240)
