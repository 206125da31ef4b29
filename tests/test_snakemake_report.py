"""`snakemake --report`: the pages with captions, categories and labels, made and read without a network."""

import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import pytest
from browser import needs_chromium, opened
from showcase import ALL_PAGES
from workflow import PAGES, ROOT, snakemake

CAPTIONS = ROOT / "rules" / "captions"


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["html", "zip"])
def test_the_report_has_the_pages(pages, suffix, tmp_path, monkeypatch):
    monkeypatch.setenv("AUDIT", str(tmp_path / "audit.jsonl"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "audit"), prepend=os.pathsep)
    path = tmp_path / f"all.{suffix}"
    folder = shutil.copytree(pages, tmp_path / "pages", copy_function=shutil.copy2)
    output = snakemake(folder, *PAGES, "--report", str(path))
    assert "Report created" in output and "Missing metadata" not in output
    events = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [what for event, what, _ in events if event == "socket.connect" and not isinstance(what, str)] == []
    if suffix == "html":
        text = path.read_text(encoding="utf-8")
    else:
        with zipfile.ZipFile(path) as archive:
            text = archive.read("all/report.html").decode()
            inside = {Path(name).name: archive.read(name) for name in archive.namelist() if "/raw/" in name}
        assert inside == {Path(page).name: (pages / page).read_bytes() for page in PAGES}
    for word in ("Ten training rows of demo", "Whether tuning helped demo", "trained tokens", '"dataset": "demo"'):
        assert word in text, word


def test_every_caption_is_used():
    rules = "".join(path.read_text(encoding="utf-8") for path in [ROOT / "Snakefile", *(ROOT / "rules").glob("*.smk")])
    assert [path.name for path in CAPTIONS.glob("*.rst") if f'captions/{path.name}"' not in rules] == []


@needs_chromium
def test_the_report_is_read_without_a_network(showcase, tmp_path):
    path = tmp_path / "all.html"
    folder = shutil.copytree(showcase, tmp_path / "showcase", copy_function=shutil.copy2)
    snakemake(folder, "--configfile", "showcase.yaml", "--report", str(path), "--", *ALL_PAGES)
    categories = {
        "All runs": "Summary of 3 runs",
        "Comparisons": "demo and rank-2",
        "Runs": "40-steps",
        "Sweeps": "Sweep lr",
    }
    with opened(path) as (tab, told):
        for name, heading in categories.items():
            tab.reload()
            tab.locator("a", has_text=re.compile(f"^{name}$")).click()
            tab.locator("a[iconname=eye]").first.click()
            shown = tab.frame_locator("iframe")
            assert heading in shown.locator("h1").inner_text()
            assert shown.locator("button.theme").is_visible()  # our script runs there, too
        # Snakemake (9.27) has Tailwind's script in its page, which says that it should not.
        assert [line for line in told if "cdn.tailwindcss.com should not be used" not in line] == []
