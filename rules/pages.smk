"""What the pages share: their code and look, which no other stage depends on; and their input functions."""

import json
import math

from moult.errors import some

PAGES = [
    f"scripts/moult/pages/{name}"
    for name in (
        "page.py",
        "charts.py",
        "run_charts.py",
        "sweep_charts.py",
        "pair_charts.py",
        "look/layout.html",
        "look/parts.html",
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


# --- compare ---


def pair(wildcards):
    """The two runs that a target names. Snakemake would say of an unknown one only that there is no rule for it."""
    a, b = wildcards.a, wildcards.b
    unknown = [name for name in (a, b) if name not in config["runs"]]
    if unknown:
        raise SystemExit(
            f"results/compare/{a}..{b}.html: the config has no run {some(unknown)}\n"
            f"  -> take two of its runs: {some(config['runs'], 20)}"
        )
    if a == b:
        raise SystemExit(f"results/compare/{a}..{b}.html: that is the same run\n  -> name two runs")
    return a, b


def of_both(place, owner=str):
    """Input: a file of each of the two runs, from the run that has made it."""
    return known(
        lambda wildcards: [place.format(run=owner(run), ds=config["runs"][run]["dataset"]) for run in pair(wildcards)]
    )


def folders_of(name):
    """Param: the folders of the two files of an input."""
    return known(lambda wildcards, input: [Path(path).parent for path in input[name]])


# --- rung, sweep ---


def climbers(sweep, step):
    """The runs of a sweep that are still there at `step`. Snakemake asks again when the rung before is done."""
    settings = sweep_settings(config, sweep)
    before = [rung for rung in settings["rungs"] if rung < step]
    if not before:
        return list(settings["runs"])
    done = checkpoints.rung.get(sweep=sweep, step=before[-1]).output.ranking
    return json.loads(Path(done).read_text(encoding="utf-8"))["level"]


def likelihoods_of_rung(wildcards):
    """Input: of each run that is still there, and each of its seeds."""
    seeds = sweep_settings(config, wildcards.sweep)["runs"]
    return [
        at.tuned_likelihood.format(run=other)
        for run in climbers(wildcards.sweep, int(wildcards.step))
        for name in [rung_name(run, int(wildcards.step))]
        for other in (name, *seed_runs(name, config["runs"][name]))
    ]


def of_sweep(place, seeds):
    """Input: a file of each run of a sweep, and with `seeds` of each of their further seeds."""

    def files(wildcards):
        runs = sweep_settings(config, wildcards.sweep)["runs"]
        left = climbers(wildcards.sweep, math.inf)
        return [place.format(run=run) for name in left for run in (runs[name]["trained"] if seeds else [name])]

    return known(files)


def rungs_of_sweep(wildcards):
    """Input: the ranking at each rung."""
    steps = sweep_settings(config, wildcards.sweep)["rungs"]
    return [at.rung.format(sweep=wildcards.sweep, step=step) for step in steps]
