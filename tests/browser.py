"""Look at a page in Debian's Chromium, as a person with a mouse, a keyboard, a phone, or a dark screen would.

    python tests/browser.py results/demo/report.html [more pages ...]

`problems(page)` is for the tests: all that is wrong with a page, in words. The page is read with its content security policy;
what is measured is what the browser drew. (Chromium is Debian's, because playwright's own comes from another place.)
"""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

PHONE, DESK, PAPER = 360, 1440, 794  # pixels; paper is A4 at 96 to the inch
LEAST_CONTRAST = 4.5  # of a text to what is behind it (WCAG 2.2, AA)
SCRIPT = Path(__file__).with_suffix(".js")


def needs_chromium(test):
    """A page takes seconds, and few machines have the browser: only in `make test-all`."""
    return pytest.mark.slow(pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")(test))


@contextmanager
def opened(path: Path, width: int = DESK, scheme: str = "light") -> Iterator:
    """The page, and a list that grows with what the browser complains of and with each request for another file."""
    from playwright.sync_api import sync_playwright

    # Playwright runs an event loop in this thread until it stops, and Snakemake would refuse to start its own: hence one
    # playwright, and one browser, for each page.
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.set_default_timeout(60_000)
        told: list[str] = []
        own = path.resolve().as_uri()

        def hear(message):
            if message.type in ("error", "warning"):
                told.append(f"console: {message.text}")

        def watch(request):
            if request.url != own and not request.url.startswith("data:"):
                told.append(f"asks for {request.url}")

        page.on("console", hear)
        page.on("pageerror", lambda error: told.append(f"script: {error}"))
        page.on("request", watch)
        page.goto(own)
        page.evaluate(SCRIPT.read_text(encoding="utf-8"))
        yield page, told
        browser.close()


def problems(path: Path) -> list[str]:
    """What is wrong with a page; nothing if all is well."""
    with opened(path) as (page, told):
        found = told  # it grows until the page is closed
        found += page.evaluate("look.structure()")
        found += theme_problems(page)
        found += page.evaluate("look.tables()")
        found += page.evaluate("look.filters()")
        for width in (PHONE, DESK):
            page.set_viewport_size({"width": width, "height": 800})
            found += [f"{problem}, at {width} pixels" for problem in page.evaluate("look.layout()")]
            found += [f"{problem}, at {width} pixels" for problem in keyboard_problems(page)]
            for theme in ("light", "dark"):
                switch_to(page, theme)
                texts = page.evaluate("least => look.contrasts(least)", LEAST_CONTRAST)
                found += [f"{problem}, at {width} pixels in the {theme} theme" for problem in texts]
        found += paper_problems(page)
    return list(dict.fromkeys(found))


# --- the theme --------------------------------------------------------------------------------------------------------


def background(page) -> str:
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def theme(page) -> str:
    return page.locator("button.theme").inner_text().removeprefix("Theme: ")


def switch_to(page, wanted: str) -> None:
    for _ in range(3):
        if theme(page) == wanted:
            return
        page.locator("button.theme").click()
    raise AssertionError(f"the button never says {wanted}")


def theme_problems(page) -> list[str]:
    """The button goes through the themes, and each looks like its name, whatever the system has."""
    seen = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for name in ("system", "light", "dark"):
            switch_to(page, name)
            seen[scheme, name] = background(page)
    switch_to(page, "system")
    page.emulate_media(color_scheme="light")
    light, dark = seen["light", "light"], seen["light", "dark"]
    expected = {
        (scheme, name): dark if "dark" in (name, scheme if name == "system" else None) else light
        for scheme, name in seen
    }
    if light == dark:
        return [f"the theme button changes nothing: {light}"]
    return [
        f"the background is {seen[case]} for {case}, not {expected[case]}"
        for case in seen
        if seen[case] != expected[case]
    ]


# --- the keyboard -----------------------------------------------------------------------------------------------------


def keyboard_problems(page) -> list[str]:
    """Tab reaches all that can be used."""
    page.evaluate("look.leave()")
    left = set(range(page.evaluate("look.number()")))
    names = page.evaluate("look.names()")
    # Chromium stops at boxes that scroll, too.
    for _ in range(3 * len(left) + 10):
        page.keyboard.press("Tab")
        left.discard(page.evaluate("look.active()"))
        if not left:
            return []
    return [f"Tab does not reach {names[number]}" for number in sorted(left)]


# --- paper ------------------------------------------------------------------------------------------------------------


def paper_problems(page) -> list[str]:
    """On paper, the dark theme is not printed, as its background would not be; nothing is wider than the paper."""
    switch_to(page, "dark")
    page.emulate_media(media="print")
    page.set_viewport_size({"width": PAPER, "height": 1123})
    found = [
        f"{problem}, on white paper" for problem in page.evaluate("least => look.contrasts(least)", LEAST_CONTRAST)
    ]
    if page.evaluate("look.darkness()"):
        found.append("what is printed in the dark theme has a dark background")
    found += [f"{problem}, on paper" for problem in page.evaluate("look.layout()")]
    page.emulate_media(media="screen")
    return found


def main() -> None:
    report = {name: problems(Path(name)) for name in sys.argv[1:]}
    print(json.dumps(report, indent=1, ensure_ascii=False))
    sys.exit(any(report.values()))


if __name__ == "__main__":
    main()
