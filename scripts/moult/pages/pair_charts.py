"""The chart of two runs: how many rows got better or worse, and by how much."""

from moult.pages.charts import COLOUR

BARS = 40


def changes(values: list[float], unit: str, width: int):
    """A histogram of `values`, in BARS bars as wide as to hold the 1st and the 99th percentile; what is farther out is in the
    outermost. One of the borders is 0, so that no bar is both better and worse."""
    import altair as alt
    import numpy as np

    reach = float(np.abs(np.quantile(values, [0.01, 0.99])).max()) or 1.0
    step = 2 * reach / BARS
    places = np.floor(np.clip(np.array(values) / step, -BARS / 2, BARS / 2 - 0.5))
    bars = [
        {
            "from": place * step,
            "to": (place + 1) * step,
            "rows": count,
            "zero": 0,
            "kind": "better" if place < 0 else "worse",
        }
        for place, count in zip(*(part.tolist() for part in np.unique(places, return_counts=True)), strict=True)
    ]
    kinds = ["better", "worse"]
    colour = alt.Color(
        "kind:N",
        scale=alt.Scale(domain=kinds, range=[COLOUR[kind] for kind in kinds]),
        legend=alt.Legend(title=None, labelExpr="datum.label == 'better' ? 'lower loss' : 'higher loss'"),
    )
    x = alt.X("from:Q", title=unit, axis=alt.Axis(tickCount=6 if width > 400 else 4))
    drawn = alt.Chart(alt.Data(values=bars)).mark_bar(stroke=COLOUR["page"], strokeWidth=1)
    drawn = drawn.encode(
        x=x,
        x2="to:Q",
        y=alt.Y("rows:Q", title="rows", axis=alt.Axis(tickCount=4, format="~s")),
        y2="zero:Q",
        color=colour,
    )
    zero = alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(color=COLOUR["text"], strokeWidth=1).encode(x="zero:Q")
    return alt.layer(drawn, zero).properties(width=width - 70, height=180)
