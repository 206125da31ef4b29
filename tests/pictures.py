"""Make the screenshots of the README: the demo's report and a summary of three runs, as Chromium shows them.

    make pictures

They lie beside the tests, because only their tools are needed to make them and a checkout that runs the workflow does without
them. MADE_FROM has a hash of what decides how the pages look; tests/test_pictures.py fails when that has changed since. (The
README's graph of the stages is text, and a test compares it with the rules.)
"""

import hashlib
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from browser import CHROMIUM, opened
from showcase import make_pages
from workflow import ROOT, checkout

from moult.files import read_json, write_json
from moult.run.cli import tool_parser

FOLDER = ROOT / "tests" / "screenshots"
MADE_FROM = FOLDER / "made_from.json"
# Of a page, from its top; small enough for a README.
PICTURES = {"report.png": "results/demo/report.html", "summary.png": "results/summary.html"}
LOOK = (
    *("charts.py", "run_charts.py", "look/layout.html", "look/style.css"),
    *("look/parts.html", "look/report.html", "look/summary.html"),
)
WIDTH, HEIGHT = 1120, 840
LARGEST = 150_000


def look() -> dict[str, str]:
    """{file: hash} of what decides how the two pages look."""
    pages = ROOT / "scripts" / "moult" / "pages"
    return {name: hashlib.sha256((pages / name).read_bytes()).hexdigest()[:16] for name in LOOK}


def changed() -> list[str]:
    """The files that are not those that the pictures were made from."""
    before, now = read_json(MADE_FROM), look()
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("--demo", help="a folder in which the pages are already (default: run the demo in a new one)")
    args = parser.parse_args()
    if CHROMIUM is None:
        sys.exit("chromium is not installed (Debian: apt install chromium)")
    with tempfile.TemporaryDirectory() as scratch:
        if args.demo is None:
            print("running the demo, and more runs beside it: some minutes")
            make_pages(checkout(Path(scratch) / "moult"))
        folder = Path(args.demo or Path(scratch) / "moult")
        FOLDER.mkdir(exist_ok=True)
        for name, page in PICTURES.items():
            take(folder / page, FOLDER / name)
    write_json(MADE_FROM, look())


def take(page: Path, picture: Path) -> None:
    with opened(page, WIDTH) as (tab, _):
        tab.set_viewport_size({"width": WIDTH, "height": HEIGHT})
        tab.screenshot(path=picture)
    print(f"{picture.relative_to(ROOT)}: {picture.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
