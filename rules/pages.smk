"""What the pages share: their code and look, which no other stage depends on."""

PAGES = [
    f"scripts/moult/pages/{name}"
    for name in (
        "page.py",
        "charts.py",
        "run_charts.py",
        "sweep_charts.py",
        "pair_charts.py",
        "look/layout.html",
        "look/style.css",
        "look/page.js",
        "look/preview.html",
        "look/report.html",
        "look/summary.html",
        "look/compare.html",
        "look/sweep.html",
    )
]


def page_code(stage):
    """Param: a hash of the script of a page, of what it imports, and of the look. Snakemake's copy has the look, too."""
    return code_of(stage, *PAGES)


def labels_of_run(page):
    """What `snakemake --report` calls a page of a run. Its caption is in rules/captions/."""
    return known(
        lambda wildcards: {"run": wildcards.run, "dataset": config["runs"][wildcards.run]["dataset"], "page": page}
    )


for path in PAGES:
    own_file(path)
