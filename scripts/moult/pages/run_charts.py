"""The charts of a run's page. What they show is prepared by scripts/report.py; here is only how it looks."""

import math
from functools import partial

from markupsafe import Markup

from moult.measuring.measured import Measured
from moult.measuring.paired import NATS
from moult.pages.charts import CHANGES, COLOUR, LABELS, NARROW, WORDS, figure

# What the verdict says of a measure, in words; how that looks.
WORDS_OF = {"better": "better", "worse": "worse", "unclear": "inconclusive", "": "not counted"}
KINDS = {
    "better": (CHANGES["better"], "triangle-up"),
    "worse": (CHANGES["worse"], "triangle-down"),
    "inconclusive": (CHANGES["unclear"], "circle"),
    "not counted": (COLOUR["base"], "cross"),
}


def line(name: str, unit: str, one: Measured) -> dict:
    """What a forest plot shows of a measure."""
    low, high = one["difference"]["interval"]
    values = {side: one[side]["value"] for side in ("base", "tuned")}
    difference = {"value": one["difference"]["value"], "low": low, "high": high}
    return {"name": name, "unit": unit, **values, **difference, "change": one["change"]}


def forests(measures: list[dict], confidence: str) -> list[Markup]:
    """A forest plot for each unit: the difference of each measure, with its interval, and what base and tuned have."""
    units = dict.fromkeys(measure["unit"] for measure in measures)
    return [
        figure(
            f"Tuned against base: the difference in {unit}, with its {confidence} interval. "
            + ("Less is better." if unit.startswith(NATS) else "More is better.")
            + " A difference whose interval contains 0 may be chance.",
            partial(forest, [one for one in measures if one["unit"] == unit], unit),
        )
        for unit in units
    ]


def forest(measures: list[dict], unit: str, width: int):
    import altair as alt

    rows = [
        {
            **measure,
            "change": WORDS_OF[measure["change"]],
            "label": f"{measure['name']}",
            "told": f"{measure['base']:.3g} → {measure['tuned']:.3g}",
        }
        for measure in measures
    ]
    data = alt.Chart(alt.Data(values=rows))
    y = alt.Y("label:N", sort=None, title=None, axis=alt.Axis(labelLimit=LABELS[width], domain=False, ticks=False))
    plot = width - LABELS[width] - WORDS[width] - 20
    kinds = {kind: look for kind, look in KINDS.items() if any(row["change"] == kind for row in rows)}
    colours, shapes = zip(*kinds.values(), strict=True)
    colour = alt.Color(
        "change:N", scale=alt.Scale(domain=list(kinds), range=list(colours)), legend=alt.Legend(title=None)
    )
    shape = alt.Shape("change:N", scale=alt.Scale(domain=list(kinds), range=list(shapes)))
    x = alt.X("low:Q", title=f"difference, {unit}", axis=alt.Axis(tickCount=5), scale=alt.Scale(zero=True, padding=8))
    zero = alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(color=COLOUR["soft"], strokeWidth=1).encode(x="zero:Q")
    layers = [
        zero,
        data.mark_rule(strokeWidth=3).encode(x=x, x2="high:Q", y=y, color=colour),
        data.mark_point(filled=True, size=110, opacity=1).encode(x="value:Q", y=y, color=colour, shape=shape),
    ]
    if width != NARROW:
        layers.append(
            data.mark_text(align="left", color=COLOUR["soft"], fontSize=12, baseline="middle").encode(
                x=alt.value(plot + 14), y=y, text="told:N"
            )
        )
    return alt.layer(*layers).properties(width=plot, height=alt.Step(26))


def curves(steps: list[dict], adapter: dict) -> Markup:
    """Loss of train and validation, learning rate and gradient norm over the steps; the published step, and resumes."""
    caption = (
        f"Loss, learning rate and gradient norm over the steps. The dashed line is step {adapter['step']:,}, whose adapter is "
        f"published ({adapter['chosen']})."
    )
    if resumed := [f"{entry['resumed_from']:,}" for entry in steps if "resumed_from" in entry]:
        caption += f" Dotted lines: the training was interrupted, and resumed from step {', '.join(resumed)}."
    return figure(caption, lambda width: curve_panels(steps, adapter, width))


def curve_panels(steps: list[dict], adapter: dict, width: int):
    import altair as alt

    plot = width - 70
    last = max((entry["step"] for entry in steps), default=1)
    x = alt.X(
        "step:Q", title=None, scale=alt.Scale(domain=[0, last], nice=False), axis=alt.Axis(tickCount=6, format="~s")
    )
    best = (
        alt.Chart(alt.Data(values=[{"step": adapter["step"]}]))
        .mark_rule(strokeDash=[5, 4], color=COLOUR["soft"])
        .encode(x=x)
    )
    resumed = [{"step": entry["resumed_from"]} for entry in steps if "resumed_from" in entry]
    if resumed:
        dots = alt.Chart(alt.Data(values=resumed)).mark_rule(strokeDash=[1, 3], strokeWidth=2, color=COLOUR["unclear"])
        best = alt.layer(best, dots.encode(x=x))
    losses = [
        {"step": entry["step"], "value": entry[key], "of": name}
        for key, name in (("loss", "train"), ("eval_loss", "validation"))
        for entry in steps
        if key in entry and math.isfinite(entry[key])
    ]
    values = [entry["value"] for entry in losses] or [1.0]
    wide = min(values) > 0 and max(values) > 20 * min(values)
    scale = alt.Scale(type="log") if wide else alt.Scale(zero=False)
    colour = alt.Color(
        "of:N",
        scale=alt.Scale(domain=["train", "validation"], range=[COLOUR["base"], COLOUR["tuned"]]),
        legend=alt.Legend(title=None, symbolType="stroke"),
    )
    title = "loss, log scale" if wide else "loss"
    chart = alt.Chart(alt.Data(values=losses))
    loss_y = alt.Y("value:Q", title=title, scale=scale, axis=alt.Axis(tickCount=4))
    dash = alt.StrokeDash("of:N", scale=alt.Scale(domain=["train", "validation"], range=[[1, 0], [6, 3]]), legend=None)
    shape = alt.Shape("of:N", scale=alt.Scale(domain=["train", "validation"], range=["circle", "diamond"]), legend=None)
    panels = [
        alt.layer(
            best,
            chart.mark_line(strokeWidth=2).encode(x=x, y=loss_y, color=colour, strokeDash=dash),
            chart.transform_filter("datum.of == 'validation'")
            .mark_point(filled=True, size=45, opacity=1)
            .encode(x=x, y=loss_y, color=colour, shape=shape),
        ).properties(width=plot, height=200)
    ]
    for key, title in (("learning_rate", "learning rate"), ("grad_norm", "gradient norm")):
        values = [
            {"step": entry["step"], "value": entry[key]}
            for entry in steps
            if key in entry and math.isfinite(entry[key])
        ]
        if values:
            line = alt.Chart(alt.Data(values=values)).mark_line(strokeWidth=2, color=COLOUR["tuned"])
            y = alt.Y("value:Q", title=title, axis=alt.Axis(tickCount=3, format="~g"))
            title_of_x = "step" if key == "grad_norm" else None
            panels.append(alt.layer(best, line.encode(x=x.title(title_of_x), y=y)).properties(width=plot, height=90))
    return alt.vconcat(*panels, spacing=8)


def flow(fates: list[dict]) -> Markup:
    """From the rows that were read to the sequences that are trained, as a waterfall."""
    return figure(
        "From the rows that were read to the sequences that are trained: what left on the way, and why.",
        lambda width: waterfall(fates, width),
    )


def waterfall(fates: list[dict], width: int):
    import altair as alt

    rows, level = [], 0
    for fate in fates:
        start = 0 if fate["kind"] == "have" else level
        end = fate["count"] if fate["kind"] == "have" else level + fate["count"]
        level = end
        told = f"{fate['count']:,}" if fate["kind"] == "have" else f"{fate['count']:+,}".replace("-", "−")
        rows.append({**fate, "start": min(start, end), "end": max(start, end), "told": told})
    data = alt.Chart(alt.Data(values=rows))
    y = alt.Y("what:N", sort=None, title=None, axis=alt.Axis(labelLimit=LABELS[width], domain=False, ticks=False))
    kinds = {"have": "rows", "used": "held out to measure", "lost": "left out"}
    named = " : ".join(f"datum.label == '{kind}' ? '{told}'" for kind, told in kinds.items())
    colour = alt.Color(
        "kind:N",
        scale=alt.Scale(domain=list(kinds), range=[COLOUR["tuned"], COLOUR["base"], COLOUR["worse"]]),
        legend=alt.Legend(title=None, labelExpr=f"{named} : ''"),
    )
    x = alt.X("start:Q", title="rows", axis=alt.Axis(tickCount=5, format="~s"))
    bars = data.mark_bar(height=14).encode(x=x, x2="end:Q", y=y, color=colour)
    words = data.mark_text(align="left", dx=5, fontSize=12, color=COLOUR["text"]).encode(x="end:Q", y=y, text="told:N")
    return alt.layer(bars, words).properties(width=width - LABELS[width] - 60, height=alt.Step(22))


def lengths(report: dict) -> Markup:
    """How long the sequences are: the share of them that is no longer than so many tokens, and max_length."""
    longest = max(report[part]["length"]["longest"] or 0 for part in ("train", "val", "test"))
    over = sum(report[part]["length"]["over_max_length"] for part in ("train", "val", "test"))
    caption = (
        f"Lengths of the sequences in tokens: the share that is no longer. The longest has {longest:,} tokens; max_length is "
        f"{report['max_length']:,}, and {over:,} rows are longer."
    )
    return figure(caption, lambda width: length_curves(report, longest, width))


def length_curves(report: dict, longest: int, width: int):
    import altair as alt

    parts = {"train": "train", "val": "validation", "test": "test"}
    rows = [
        {"part": name, "length": length, "share": float(share)}
        for part, name in parts.items()
        for share, length in (report[part]["length"]["quantiles"] or {}).items()
    ]
    shown = [name for part, name in parts.items() if report[part]["length"]["quantiles"]]
    limit = report["max_length"]
    x = alt.X("length:Q", title="tokens", scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=6))
    count = len(shown)
    colours = alt.Scale(domain=shown, range=[COLOUR["tuned"], COLOUR["c1"], COLOUR["base"]][:count])
    dashes = alt.Scale(domain=shown, range=[[1, 0], [6, 3], [2, 2]][:count])
    lines = (
        alt.Chart(alt.Data(values=rows))
        .mark_line(interpolate="step-after", strokeWidth=2)
        .encode(
            x=x,
            order="share:Q",
            y=alt.Y("share:Q", title="share of sequences", axis=alt.Axis(format="%", tickCount=5)),
            color=alt.Color("part:N", scale=colours, legend=alt.Legend(title=None, symbolType="stroke")),
            strokeDash=alt.StrokeDash("part:N", scale=dashes, legend=None),
        )
    )
    if limit and limit <= 1.5 * longest:
        rule = alt.Chart(alt.Data(values=[{"length": limit}])).mark_rule(strokeDash=[5, 4], color=COLOUR["worse"])
        return alt.layer(lines, rule.encode(x=x)).properties(width=width - 70, height=200)
    return lines.properties(width=width - 70, height=200)
