"""The pages: what is in them, and what a browser makes of them (tests/browser.py says what it looks for)."""

import base64
import hashlib
import re
from pathlib import Path

import pytest
from browser import needs_chromium, opened, problems, switch_to, theme
from showcase import ALL_PAGES

from moult.pages import page
from moult.pages.charts import CHANGES, COLOUR, SERIES, figure
from moult.pages.page import LONGEST_TEXT, render, shown

TEMPLATES = sorted(page.LOOK.glob("*.html"))
MARKUP = "</pre><script>alert(1)</script><style>*{display:none}</style><img src=x onerror=alert(1)>{{ 7*7 }}&lt;"
# What a row, its name, or an answer may be.
NASTY = {
    "markup": MARKUP,
    "right to left": "start \u202eesrever\u202c \u2067\u05e9\u05dc\u05d5\u05dd\u2069 \u0627\u0644\u0639 end",
    "control characters": "".join(map(chr, range(32))) + "\x7f\x9b\u200b\ufeff\ud800\U000e0041",
    "100 kB without a space": "x" * 100_000,
    "100 kB of words": "a word " * 15_000,
    "wide letters": "漢" * 3_000,
    "many accents": "Z" + "\u0301" * 500,
}


def preview(texts: dict[str, str]) -> str:
    """The preview of rows of two tokens, each of which is a text."""
    examples = [
        {"id": f"{name}: {text}", "trained": 1, "tokens": [[1, text, True], [2, text, False]]}
        for name, text in texts.items()
    ]
    return render("preview.html", examples=examples, origin=MARKUP)


# --- pages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a\tb\nc", "a\tb\nc"),
        ("a\r\nb\rc", "a\nb⟨U+000D⟩c"),
        ("\x00\x1b[31m", "⟨U+0000⟩⟨U+001B⟩[31m"),
        ("\u202eabc\u2069", "⟨U+202E⟩abc⟨U+2069⟩"),
        ("a\u200bb\ufeff\U000e0041", "a⟨U+200B⟩b⟨U+FEFF⟩⟨U+E0041⟩"),
        ("\ud800", "?"),
        (
            "👩\u200d💻 \u0645\u06cc\u200c\u062e",
            "👩\u200d💻 \u0645\u06cc\u200c\u062e",
        ),  # the joiners are part of the writing
        ("x" * LONGEST_TEXT, "x" * LONGEST_TEXT),
        ("x" * (LONGEST_TEXT + 1234), "x" * LONGEST_TEXT + " … (1,234 more characters)"),
        (None, "None"),
    ],
)
def test_what_is_invisible_is_shown_and_what_is_long_is_cut(text, expected):
    assert shown(text) == expected


def test_a_template_that_forgets_to_ask_shows_what_is_invisible_too():
    row = {"id": "x", "trained": "\u202e\x07\ud800", "tokens": []}
    assert "⟨U+202E⟩⟨U+0007⟩? of 0 tokens" in render("preview.html", examples=[row], origin="x")


def test_the_policy_lets_our_own_style_and_script_pass_and_nothing_else():
    text = preview(NASTY)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1].replace("&#39;", "'")
    parts = dict(part.split(" ", 1) for part in policy.split("; "))
    for name, tag in (("style-src", "style"), ("script-src", "script")):
        inside = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert len(inside) == 1
        digest = base64.b64encode(hashlib.sha256(inside[0].encode()).digest()).decode()
        assert parts.pop(name) == f"'sha256-{digest}'"
    assert parts == {"default-src": "'none'", "img-src": "data:", "base-uri": "'none'"}


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_a_template_needs_nothing_that_the_policy_refuses(path):
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"<[^>]*\s(?:style|on\w+)\s*=", text) == []
    assert re.findall(r"(?:src|href)\s*=\s*[\"'](?:https?:)?//", text) == []
    safe = re.findall(r"\{\{[^}]*\|\s*safe\b[^}]*\}\}", text)
    assert safe == (["{{ style | safe }}", "{{ script | safe }}"] if path.name == "layout.html" else [])


def test_every_template_is_in_the_hash_of_the_pages():
    rules = (page.LOOK.parents[3] / "rules" / "pages.smk").read_text(encoding="utf-8")
    files = [path for path in (page.LOOK.parent).rglob("*") if path.suffix in (".py", ".html", ".css", ".js")]
    missing = [path.name for path in files if path.name != "__init__.py" and f'{path.name}"' not in rules]
    assert missing == []


def test_of_a_long_row_the_preview_shows_beginning_and_end():
    tokens = [[number, f"w{number} ", True] for number in range(2003)]
    text = render("preview.html", examples=[{"id": "x", "trained": 2003, "tokens": tokens}], origin="x")
    assert re.findall(r'title="(\d+)"', text) == [str(number) for number in range(2003) if not 1000 <= number < 1003]
    assert text.count("… 3 more tokens …") == 1
    assert "more tokens" not in render(
        "preview.html", examples=[{"id": "x", "trained": 2000, "tokens": tokens[:2000]}], origin="x"
    )


# --- charts -----------------------------------------------------------------------------------------------------------


def drawing(text: str = "a", caption: str = "a caption") -> str:
    """A figure with what our charts have: lines, points, rules, legends."""
    import altair

    rows = [{"x": x, "y": x * x, "name": f"{text} {x % 3}", "change": list(CHANGES)[x % 3]} for x in range(9)]

    def chart(width):
        legend = altair.Legend(columns=2)
        data = altair.Chart(altair.Data(values=rows)).encode(x=altair.X("x:Q", title=text), y="y:Q")
        names = altair.Color("name:N", scale=altair.Scale(range=SERIES), legend=legend)
        changes = altair.Color("change:N", scale=altair.Scale(domain=list(CHANGES), range=list(CHANGES.values())))
        layers = (
            data.mark_line(clip=True).encode(color=names)
            + data.mark_point(filled=True).encode(color=changes.legend(columns=2))
            + data.mark_rule()
        )
        return layers.resolve_scale(color="independent").properties(width=width - 60, height=200)

    return str(figure(caption, chart))


def test_a_chart_has_no_script_no_style_and_only_the_colours_of_the_page():
    text = drawing()
    assert re.findall(r"<(?:script|style)\b|\s(?:style|on\w+)=", text) == []
    colours = set(re.findall(r'(?:fill|stroke|stop-color)="([^"]*)"', text))
    assert {"var(--c0)", "var(--better)", "var(--line)"} <= colours
    assert all(colour == "none" or colour.startswith("var(--") for colour in colours), colours
    names = set(re.findall(r"var\(--([\w-]+)\)", text))
    style = (page.LOOK / "style.css").read_text(encoding="utf-8")
    assert [name for name in names | set(COLOUR) if f"--{name}:" not in style] == []


def test_what_a_chart_says_is_only_text():
    text = drawing(MARKUP + "\u202e\x07\ud800", MARKUP)
    assert re.findall(r"<(?:script|img|style)\b", text) == []
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 4  # the captions, twice as a name; the axes
    assert "\x07" not in text and "\u202e" not in text


# --- in a browser -----------------------------------------------------------------------------------------------------


def written(folder: Path, text: str) -> Path:
    (folder / "page.html").write_text(text, encoding="utf-8")
    return folder / "page.html"


@needs_chromium
def test_a_preview_of_nasty_rows(tmp_path):
    path = written(tmp_path, preview(NASTY))
    assert problems(path) == []
    with opened(path) as (tab, _):
        text = tab.locator("main").inner_text()
        assert text.count(MARKUP) == 4  # the template's name, the row's, and both tokens
        assert "⟨U+202E⟩" in text and "⟨U+0000⟩" in text and "more characters" in text


@needs_chromium
def test_tables_filters_and_charts(tmp_path):
    """All that the look offers, on one page."""
    rows = [("b", "10", "worse"), ("a", "9.5", "better"), ("c", "", "better worse"), ("d", "-1e-4", "better")]
    cells = "".join(
        f'<tr data-entry data-change="{change}"><td>{name}</td><td class="number" data-value="{value}">{value} %</td></tr>'
        for name, value, change in rows
    )
    head = '<thead><tr><th>name</th><th class="number">value</th></tr></thead>'
    part = f"""
        <div class="filters" data-filters="#rows" hidden><label>Change <select name="change"><option value="">all</option>
          <option>better</option><option>worse</option></select></label>
          <label>Search <input type="search" placeholder="a word"></label><output></output></div>
        <div class="scroll" tabindex="0" role="region" aria-label="values">
          <table class="sortable" id="rows">{head}<tbody>{cells}</tbody></table></div>
        <div class="scroll" tabindex="0" role="region" aria-label="wide">
          <table><tr>{"<td>a-long-name-of-a-column</td>" * 12}</tr></table></div>
        <p><span class="verdict helped">helped</span> <span class="verdict hurt">hurt</span>
          <span class="verdict inconclusive">inconclusive</span> <ins>added</ins> <del>removed</del> <a href="#rows">rows</a></p>
        {drawing()}"""
    path = written(tmp_path, preview({"x": "text"}).replace("</main>", f"{part}</main>"))
    assert problems(path) == []
    with opened(path) as (tab, _):
        column = tab.locator("#rows tbody td:first-child")
        for heading, orders in {"name": ("abcd", "dcba"), "value": ("badc", "dabc")}.items():
            for order in orders:
                tab.locator("#rows th", has_text=heading).locator("button").click()
                assert "".join(column.all_inner_texts()) == order
        tab.locator("select[name=change]").select_option("worse")
        assert sorted(column.filter(visible=True).all_inner_texts()) == ["b", "c"]
        assert tab.locator(".filters output").inner_text() == "2 of 4 shown"


@needs_chromium
def test_the_theme_is_kept(tmp_path):
    path = written(tmp_path, preview({"x": "text"}))
    with opened(path) as (tab, _):
        switch_to(tab, "dark")
        tab.reload()
        assert theme(tab) == "dark"


FAULTS = {
    '<p class="a-fault">pale</p>': 'the contrast of "pale" is 1.61',
    '<svg aria-label="s" width="90" height="30"><text fill="#dddddd" y="20">faint</text></svg>': 'the contrast of "faint"',
    '<svg aria-label="t" width="90" height="30"><text y="20">much too long a text</text></svg>': "is cut off",
    '<svg aria-label="u"><text y="20">one</text><text y="20">two</text></svg>': '"two" lies over "one"',
    "<svg></svg>": "has no name",
    '<div class="a-fault wide">x</div>': "reaches from 16 to 2016",
    '<div class="a-fault box"><p>1</p><p>2</p></div>': "scrolls and has no tabindex",
    '<p id="twice"></p><p id="twice"></p>': "id twice is there twice",
    '<a href="#nowhere">x</a>': "leads to nothing",
    "<h4>deep</h4>": "skips a level",
    '<input aria-label="" name="x">': "has no label",
    '<button onfocus="this.blur()">shy</button>': "Tab does not reach",
    '<img src="other.png" alt="x">': "other.png",
    "<script>console.warn('careful')</script>": "console: careful",
    "<script>undefined.x</script>": "script: Cannot read",
    '<table class="sortable"><thead><tr><th class="number">n</th></tr></thead><tbody><tr><td>1 %</td></tr></tbody></table>': (
        "numbers that do not sort as numbers: 1 %"
    ),
    '<div class="filters" data-filters="#none"><select aria-label="k" name="k"><option>z</option></select></div>': (
        "the filter k never shows anything"
    ),
}


@needs_chromium
def test_what_is_wrong_with_a_page_is_found(tmp_path):
    """Without its policy, a page can have every fault. With it, the first inline style is one."""
    text = preview({"x": "text"})
    style = (
        "<style>p.a-fault {color: #ccc} .wide {width: 2000px} .box {height: 20px; overflow: auto} .box p {height: 9rem}"
        "</style>"
    )
    policy = re.search(r"<meta http-equiv.*>\n", text)[0]
    bad = text.replace(policy, "").replace("</main>", f"{style}{''.join(FAULTS)}</main>")
    found = "\n".join(problems(written(tmp_path, bad)))
    assert [fault for fault in FAULTS.values() if fault not in found] == [], found
    found = problems(written(tmp_path, text.replace("<h1>", '<h1 style="color: red">')))
    assert any("Content Security Policy" in problem for problem in found), found


@needs_chromium
@pytest.mark.parametrize("name", ALL_PAGES)
def test_a_page_of_the_demo(name, showcase):
    assert problems(showcase / name) == []
