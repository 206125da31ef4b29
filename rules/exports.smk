"""Input functions and params of the exports."""

from moult.workflow.environments import EXPORTS, VLLM, check_python, python_of_exports
from moult.workflow.exports import COMPRESSED, FORMATS, GGUF, UPLOADS, listed_for


def exports_of(run, place):
    """A file of each export that the config names for the run."""
    return [place.format(run=run, format=format) for format in config["runs"][run]["exports"]]


def of_exports(place):
    """Input: a file of each export that the config names for the run."""
    return known(lambda wildcards: exports_of(wildcards.run, place))


def export_cards_of(run):
    """The cards of all that can be uploaded of the exports of a run."""
    listed = config["runs"][run]["exports"]
    return [at.export_card.format(run=run, what=what) for what, formats in UPLOADS.items() if {*formats} & {*listed}]


@known
def of_upload(wildcards):
    """Input: export.json of each format that is uploaded together. Snakemake would take another error for a rule that does not
    apply."""
    try:
        formats = listed_for(wildcards.what, config["runs"][wildcards.run])
    except MoultError as error:
        raise SystemExit(f"{wildcards.run}: {error}") from None
    return [at.export_metrics.format(run=wildcards.run, format=format) for format in formats]


def export_python(wildcards):
    """Param: the Python that has llama.cpp and llmcompressor."""
    export = config["runs"][wildcards.run]["export"]
    return "python" if in_containers else python_of_exports(export) or "python"


def need_python(python, environment):
    """Before a job runs, and without containers: end if the Python does not have what the exports need."""
    if workflow.executor_plugin is not None and not (workflow.dryrun or workflow.touch or in_containers):
        try:
            check_python(python, *environment)
        except MoultError as error:
            raise SystemExit(str(error)) from None


def export_image(wildcards):
    """Container of the exports. Without containers, this checks the Python."""
    need_python(export_python(wildcards), EXPORTS)
    return shown(config["runs"][wildcards.run]["export"]["container"])


def export_engine_image(wildcards):
    """Container of what measures an export: that of its server."""
    serve = config["runs"][wildcards.run]["serve"]
    if wildcards.format in COMPRESSED and serve["engine"] == "vllm":
        need_python(serve["python"] or export_python(wildcards), VLLM)
        if in_containers:
            return server_image(wildcards)
    return export_image(wildcards)


def calibration(wildcards):
    """Input: the training tokens, for the formats that are calibrated on them."""
    calibrated = wildcards.format in ("w8a8", "w4a16") or config["runs"][wildcards.run]["export"]["imatrix"]
    return [at.train_tokens.format(run=encoders[wildcards.run])] if calibrated else []
