"""The command line of a stage: what all of them share is written here once.

Standard library only, so that `--help` answers at once.
"""

import argparse
import json


def tool_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose --help shows `doc`, the docstring of the script, as it is written."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def stage_parser(
    doc: str | None, name: str, *, reads: str = "", optional: bool = False, threads: str = ""
) -> argparse.ArgumentParser:
    """The parser of the stage `name`, with the options that all stages have. The stage adds those for its files.

    --settings   JSON of what the stage reads of the config, parsed. `reads` names its keys where there are few. It must be
                 given, unless it is `optional`: then {} stands for the defaults.
    --threads    only for a stage that says what its `threads` are.
    --log-file   None if it is not given: `stage` then takes logs/<name>.log.
    """
    parser = tool_parser(doc)
    keys = f": {reads}" if reads else " of the config"
    parser.add_argument(
        "--settings", type=json.loads, required=not optional, default={}, help=f"JSON of what this stage reads{keys}"
    )
    if threads:
        parser.add_argument("--threads", type=int, default=1, help=threads)
    parser.add_argument("--log-file", help=f"log file (default: logs/{name}.log)")
    return parser
