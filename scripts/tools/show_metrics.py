"""Print metrics.json as a table: base against tuned, with intervals and the verdict.

python scripts/tools/show_metrics.py results/demo/metrics.json [more metrics.json ...]
"""

import json
from pathlib import Path

import _library  # noqa: F401

from moult.measuring.table import table
from moult.run.cli import tool_parser


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("metrics", nargs="+", help="metrics.json of one or more runs")
    for path in map(Path, parser.parse_args().metrics):
        print(table(json.loads(path.read_text(encoding="utf-8")), path.parent))


if __name__ == "__main__":
    main()
