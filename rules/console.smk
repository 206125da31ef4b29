"""What a person sees: a table of what will run, a line for each stage with what it found, and the runs' results at the end."""

from snakemake.logging import ColorizingTextHandler, logger

from moult.files import read_json
from moult.measuring.table import table as table_of_metrics
from moult.workflow.console import FewerLines


def show_less():
    """Leave out most of Snakemake's own lines, in a run that a person looks at: not in another workflow that uses this one
    as a module, and not in the jobs on a cluster, whose output is a log."""
    output = workflow.output_settings
    if workflow.is_main_process and workflow.modifier.is_main_snakefile() and not output.verbose:
        for handler in logger.handlers:
            if isinstance(handler, ColorizingTextHandler):
                handler.addFilter(FewerLines(output.printshellcmds, logger.info))


def tell_results():
    """Base against tuned, for each run that was scored; of more than three, where they are."""
    place = workflow.pathvars.apply(at.metrics)
    paths = [Path(place.format(run=run)) for run in config["runs"]]
    scored = [path for path in paths if path.exists() and path.stat().st_mtime >= started]
    if len(scored) > 3:
        logger.info(f"{len(scored)} runs were scored: python scripts/tools/show_metrics.py {place.format(run='*')}")
        return
    for path in scored:
        print(table_of_metrics(read_json(path), path.parent), file=sys.stderr)


show_less()
