"""Print the plans of one or more runs as a table: what each will do, and what it needs.

python scripts/plans.py results/demo/plan.json [more plan.json ...]
"""

import json
import shutil
from pathlib import Path

from tabulate import tabulate

from moult.run.cli import tool_parser

GB = 10**9


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("plans", nargs="+", help="plan.json of one or more runs")
    paths = [Path(path) for path in parser.parse_args().plans]
    plans = {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    print(table(plans))
    print(room(plans, shutil.disk_usage(paths[0].parent).free))


def room(plans: dict[str, dict], free: int) -> str:
    """Whether what all runs write fits together. Each run's plan has looked at it alone."""
    needed = sum(plan["disk"]["total"] for plan in plans.values())
    text = f"disk: {needed / GB:.1f} GB for all runs, and {free / GB:.1f} GB are free"
    return text if needed <= free else f"WARNING: {text}: run some at a time, or set paths.results to another disk"


def table(plans: dict[str, dict]) -> str:
    text = tabulate(
        [row(run, plan) for run, plan in plans.items()],
        headers=("run", "steps", "sequences", "trained", "GPU memory", "if checkpointed", "disk", "merge", "serve"),
        tablefmt="plain",
        disable_numparse=True,
        colalign=("left", *["right"] * 6, "left", "left"),
    )
    return f"\n{text}"


def row(run: str, plan: dict) -> tuple[str, ...]:
    steps, memory = plan["steps"], plan["memory"]
    return (
        run,
        f"{'at most ' if steps['early_stopping'] else ''}{steps['total']:,}",
        f"{steps['sequences']:,}",
        f"{plan['parameters']['trainable_share']:.2%}",
        f"{memory['total'] / GB:.1f} GB" if memory else "unknown",
        f"{memory['total_with_gradient_checkpointing'] / GB:.1f} GB" if memory else "unknown",
        f"{plan['disk']['total'] / GB:.1f} GB",
        plan["merge"]["how"],
        plan["serve"]["as"],
    )


if __name__ == "__main__":
    main()
