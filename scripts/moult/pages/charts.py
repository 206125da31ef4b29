"""Charts: drawn by Vega-Lite (Altair) into SVG that stands in the page, in the colours of the page's theme.

vl-convert draws without a browser and without a network. Its SVG has no script and no style attribute, so the page's content
security policy holds, and it names its marks and axes for screen readers. (Plotly's script alone is larger than a page may be;
Matplotlib's SVG needs inline styles, and its text is shapes.)
"""

import re
from collections.abc import Callable

from markupsafe import Markup, escape

from moult.pages.page import visible

# A chart is drawn twice: for a wide page and for a phone.
WIDE, NARROW = 760, 310

# The labels of rows are beside the plot, and no longer than this. Words at the right of the plot take the other.
LABELS = {WIDE: 230, NARROW: 120}
WORDS = {WIDE: 110, NARROW: 0}

# The variables of look/style.css, as colours that Vega takes. The page's theme decides what they look like.
NAMES = (
    "page",
    "line",
    "text",
    "soft",
    "base",
    "tuned",
    "better",
    "worse",
    "unclear",
    *(f"c{number}" for number in range(8)),
)
COLOUR = {name: f"#0d0e{number:02x}" for number, name in enumerate(NAMES)}
SERIES = [COLOUR[f"c{number}"] for number in range(8)]
CHANGES = {name: COLOUR[name] for name in ("better", "worse", "unclear")}

_VARIABLE = {colour: f"var(--{name})" for name, colour in COLOUR.items()}
_DRAWN = re.compile(r'(fill|stroke)="(#0d0e[0-9a-f]{2})"')

CONFIG = {
    "background": None,
    "padding": 6,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": COLOUR["soft"],
        "titleColor": COLOUR["soft"],
        "gridColor": COLOUR["line"],
        "domainColor": COLOUR["line"],
        "tickColor": COLOUR["line"],
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "labelLimit": 260,
        "labelSeparation": 10,  # the reader's letters may be wider than those that the labels were measured with
    },
    "legend": {
        "labelColor": COLOUR["text"],
        "titleColor": COLOUR["soft"],
        "labelFontSize": 12,
        "titleFontSize": 12,
        "orient": "top",
        "titleFontWeight": "normal",
        "symbolBaseStrokeColor": COLOUR["soft"],
        "symbolFillColor": COLOUR["soft"],
        "layout": {"top": {"direction": "vertical"}},
    },
    "title": {"color": COLOUR["text"], "fontSize": 13, "anchor": "start"},
    "header": {"labelColor": COLOUR["text"], "titleColor": COLOUR["soft"]},
    # What a chart does not colour itself: Vega's own colours are of no theme.
    "mark": {"color": COLOUR["tuned"]},
    "text": {"color": COLOUR["text"]},
    "rule": {"color": COLOUR["soft"]},
    "range": {"category": SERIES},
}


def figure(caption: str, chart: Callable[[int], object]) -> Markup:
    """A chart with its caption. `chart` makes an Altair chart for a width in pixels, WIDE or NARROW, in which all of it has room.

    The chart should name what it shows by more than its colour: a symbol, a line, a word.
    """
    drawn = Markup("").join(
        Markup('<div class="{}">{}</div>').format(name, Markup(_svg(chart(width), caption)))
        for name, width in (("wide", WIDE), ("narrow", NARROW))
    )
    return Markup("<figure>{}<figcaption>{}</figcaption></figure>").format(drawn, caption)


def _visible(spec):
    """All texts of a chart. A control character would end this process: vl-convert's SVG is XML."""
    if isinstance(spec, dict):
        return {_visible(key): _visible(value) for key, value in spec.items()}
    if isinstance(spec, list):
        return [_visible(value) for value in spec]
    return visible(spec) if isinstance(spec, str) else spec


def _svg(chart, caption: str) -> str:
    import vl_convert

    spec = _visible(chart.to_dict())
    spec["config"] = {**spec.get("config", {}), **CONFIG}
    svg = vl_convert.vegalite_to_svg(spec, allowed_base_urls=[])
    svg = _DRAWN.sub(lambda hit: f'{hit[1]}="{_VARIABLE[hit[2]]}"', svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(caption)}" ', 1)
