"""Input functions: which files a stage takes, of those that others may have made."""

from moult.files import glance
from moult.workflow.config import dataset_slug, is_local, local_model, source_entries
from moult.data.readers import expand as expand_source


def base_model(wildcards):
    """Input: the manifest of a run's base model."""
    return at.manifest.format(model=model_slug(config["runs"][wildcards.run]["model"]))


def of_dataset(place):
    """Input: a file that prepare wrote for the run's dataset."""
    return lambda wildcards: place.format(ds=config["runs"][wildcards.run]["dataset"])


def of_encoder(place):
    """Input: a file that encode wrote for the run, or for another one with the same model and data."""
    return lambda wildcards: place.format(run=encoders[wildcards.run])


def of_base_measurer(place):
    """Input: the base's measurement, shared by all runs that ask it the same."""
    return lambda wildcards: place.format(run=base_measurers[wildcards.run])


def folder_of(name):
    """Param: the folder of the input `name`. Not tracked; the file in it is."""
    return lambda wildcards, input: Path(input[name]).parent


def runs_by_model(local):
    """{slug: run} of the models that are on this machine, or of those that come from the hub."""
    return {
        model_slug(run["model"]): name
        for name, run in config["runs"].items()
        if (local_model(run["model"], config["paths"]) is not None) == local
    }


hub_models, local_models = runs_by_model(local=False), runs_by_model(local=True)


def local_model_files(wildcards):
    """Input: the files of a local model, but for its card. A missing folder is reported by the stage, in plain words."""
    run = local_models[wildcards.model]
    folder = Path(local_model(config["runs"][run]["model"], config["paths"]))
    files = [path for path in folder.glob("*") if path.is_file() and path.suffix != ".md"]
    return sorted(str(path) for path in files if not path.name.startswith("."))


def glances(files):
    """Param: what local input files hold, at a glance. Snakemake goes by time, and does not see a file that was put in
    place of another with its old time (cp -p, rsync -a, mv)."""
    return lambda wildcards: [glance(path) for path in files(wildcards) if not path.startswith("<results>")]


def all_entries(dataset):
    """The parts of a dataset, those to validate on as well."""
    return [
        entry
        for source in (dataset["source"], dataset["val_source"])
        if source
        for entry in source_entries(source, dataset)
    ]


def dataset_files(wildcards):
    """Input: the files of a dataset: local ones as they are, those of the hub where fetch_dataset puts them."""
    dataset = config["datasets"][wildcards.ds]
    files = []
    for entry in all_entries(dataset):
        if is_local(entry["path"]):
            try:
                files += map(str, expand_source(entry["path"], dataset["split"]))
            except MoultError as error:
                if not workflow.dryrun and not rows_are_there(wildcards.ds):
                    return []  # prepare will say it, in one table with what is wrong with other runs
                # Whatever else is raised here Snakemake takes for a rule that does not apply, and goes on with old rows.
                raise SystemExit(f"datasets.{wildcards.ds}.source: {error}") from None
        else:
            files.append(at.dataset.format(dataset=dataset_slug(dataset, entry["path"])))
    return files


def rows_are_there(dataset):
    """Whether there are rows that a job which cannot read its source would make Snakemake delete."""
    return Path(workflow.pathvars.apply(at.ledger.format(ds=dataset))).exists()


def chat_template_file(wildcards):
    """Input: the template that the config names, if it is a file of the user's."""
    template = config["runs"][wildcards.run]["model"]["chat_template"]
    return [template] if template and Path(template).is_file() else []
