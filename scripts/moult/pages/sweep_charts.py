"""The charts of a sweep's page. What they show is prepared by scripts/sweep.py; here is only how it looks."""

from functools import partial

from markupsafe import Markup

from moult.pages.charts import COLOUR, NARROW, SERIES, figure

# Of the lines, as many as there are colours. More would not be told apart.
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left"]


def panel(key: str, points: list[dict], unit: str, confidence: float) -> Markup:
    """The loss over the values of one key, with a line for each combination of the others."""
    lines = sorted({point["line"] for point in points})
    caption = (
        f"{key}: {unit} of each run with its {100 * confidence:g} % interval. Less is better; the ring is the lowest."
    )
    if len(lines) > len(SHAPES):
        caption += f" Each of the {len(lines)} lines is a combination of the other settings."
    return figure(caption, partial(drawn, key, points, lines, unit))


def drawn(key: str, points: list[dict], lines: list[str], unit: str, width: int):
    import altair as alt

    numbers = all(not isinstance(point["x"], str) for point in points)
    chart = alt.Chart(alt.Data(values=beside(points, lines) if numbers else points))
    y = alt.Y("loss:Q", title=unit, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=5))
    x: dict = {"x": alt.X("x:N", sort=None, title=key), "xOffset": alt.XOffset("line:N", sort=lines)}
    if numbers:
        values = sorted({point["x"] for point in points})
        scale = alt.Scale(type="log" if is_wide(points) else "linear", zero=False, nice=False, padding=24)
        x = {"x": alt.X("at:Q", title=key, scale=scale, axis=alt.Axis(values=values, format=".6~g", grid=False))}
    named: dict = {"color": alt.value(SERIES[0])}
    shape: dict = {}
    if 1 < len(lines) <= len(SHAPES):
        legend = alt.Legend(title=None, columns=1 if width == NARROW else 3, labelLimit=width - 60)
        named = {"color": alt.Color("line:N", sort=lines, scale=alt.Scale(range=SERIES), legend=legend)}
        shape = {"shape": alt.Shape("line:N", sort=lines, scale=alt.Scale(range=SHAPES))}
    best = chart.transform_filter("datum.best").mark_point(size=380, strokeWidth=2, color=COLOUR["text"])
    layers = [
        chart.mark_rule(strokeWidth=2, opacity=0.6).encode(**x, **named, y=alt.Y("low:Q", title=unit), y2="high:Q"),
        chart.mark_point(filled=True, size=90, opacity=1).encode(**x, **named, **shape, y=y),
        best.encode(**x, y=y),
    ]
    if numbers:  # words have no order
        layers.insert(0, chart.mark_line(strokeWidth=1.5).encode(**x, **named, y=y, detail="line:N"))
    return alt.layer(*layers).properties(width=width - 80, height=260)


def is_wide(points: list[dict]) -> bool:
    """Whether the values are of several sizes, as learning rates are."""
    values = [point["x"] for point in points]
    return min(values) > 0 and max(values) >= 8 * min(values)


def beside(points: list[dict], lines: list[str]) -> list[dict]:
    """The points with `at`: their values, those of different lines a little apart, so that no interval hides another."""
    values = [point["x"] for point in points]
    low, high = min(values), max(values)
    step = min(0.02, 0.1 / len(lines))  # of the axis
    shifts = {line: step * (place - (len(lines) - 1) / 2) for place, line in enumerate(lines)}
    return [
        {
            **point,
            "at": point["x"] * (high / low) ** shifts[point["line"]]
            if is_wide(points)
            else point["x"] + (high - low) * shifts[point["line"]],
        }
        for point in points
    ]
