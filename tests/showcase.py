"""The demo beside two runs with other settings, and a sweep: a page of every kind, for the browser and for the README."""

from pathlib import Path

import yaml
from workflow import PAGES, snakemake

ALL_PAGES = [
    *PAGES,
    "results/summary.html",
    "results/compare/demo..rank-2.html",
    "results/sweeps/lr.html",
]
FEW_STEPS = 40


def make_pages(folder: Path) -> str:
    """Make all pages in `folder`, a checkout in which the demo may have run. Returns what Snakemake prints."""
    demo = yaml.safe_load((folder / "config" / "config.yaml").read_text(encoding="utf-8"))["runs"]["demo"]
    shared = {key: demo[key] for key in ("model", "lora", "train", "eval")}
    runs = {
        "rank-2": {"dataset": "demo", "lora": {"r": 2, "lora_alpha": 4}},
        "40-steps": {"dataset": "demo", "train": {"max_steps": FEW_STEPS}},
    }
    sweep = {"dataset": "demo", "over": {"train.learning_rate": [1e-3, 3e-3]}, "seeds": [0, 1]}
    sweep["train"] = {"max_steps": FEW_STEPS}
    (folder / "showcase.yaml").write_text(yaml.safe_dump({**shared, "runs": runs, "sweeps": {"lr": sweep}}))
    return snakemake(folder, "--configfile", "showcase.yaml", "--", *ALL_PAGES, cores=2, timeout=1800)
