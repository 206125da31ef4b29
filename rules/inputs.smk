"""Input functions: the files that a stage reads."""

from moult.files import glance
from moult.workflow.config import dataset_slug, is_local, local_model, source_entries
from moult.workflow.functions import known
from moult.data.readers import expand as expand_source


@known
def base_model(wildcards):
    """Input: the manifest of the run's base model."""
    return at.manifest.format(model=model_slug(config["runs"][wildcards.run]["model"]))


def of_dataset(place):
    """Input: a file that prepare writes for the run's dataset."""
    return known(lambda wildcards: place.format(ds=config["runs"][wildcards.run]["dataset"]))


def of_encoder(place):
    """Input: a file that encode writes, for this run or for another run with the same model and data."""
    return known(lambda wildcards: place.format(run=encoders[wildcards.run]))


def of_base_measurer(place):
    """Input: the measurement of the base model. Runs with the same model, data and prompts share it."""
    return known(lambda wildcards: place.format(run=base_measurers[wildcards.run]))


def of_other_seeds(place):
    """Input: a file of each run with a further seed of this run (moult/workflow/seeds.py)."""
    return known(
        lambda wildcards: [place.format(run=other) for other in seed_runs(wildcards.run, config["runs"][wildcards.run])]
    )


def run_before(place):
    """Input: a file of the run that this one goes on from, if there is one."""
    return of_run(lambda run: [place.format(run=run["start_from"])] if "start_from" in run else [])


def folder_of(name):
    """Param: the folder of the input `name`. Not tracked, because the input itself is."""
    return known(lambda wildcards, input: Path(input[name]).parent)


def runs_by_model(local):
    """{slug: run} of the models on this machine (`local`), or of the models from the hub."""
    return {
        model_slug(run["model"]): name
        for name, run in config["runs"].items()
        if (local_model(run["model"], config["paths"]) is not None) == local
    }


hub_models, local_models = runs_by_model(local=False), runs_by_model(local=True)


def local_model_files(wildcards):
    """Input: the files of a local model, except its card. If the folder is missing, the stage reports it."""
    run = local_models[wildcards.model]
    folder = Path(local_model(config["runs"][run]["model"], config["paths"]))
    files = [path for path in folder.glob("*") if path.is_file() and path.suffix != ".md"]
    return sorted(str(path) for path in files if not path.name.startswith("."))


def glances(files):
    """Param: a quick fingerprint of local input files. Snakemake compares times, and would not notice a file that was replaced
    by one with the same or an older time (cp -p, rsync -a, mv)."""
    return known(lambda wildcards: [glance(path) for path in files(wildcards) if not path.startswith("<results>")])


def all_entries(dataset):
    """(key, entry) of all sources of a dataset, including those of the validation and test rows."""
    return [
        (key, entry)
        for key in ("source", "val_source", "test_source")
        if dataset[key]
        for entry in source_entries(dataset[key], dataset)
    ]


@known
def dataset_files(wildcards):
    """Input: the files of a dataset: local files, or what fetch_dataset downloads."""
    dataset = config["datasets"][wildcards.ds]
    files = []
    for key, entry in all_entries(dataset):
        if is_local(entry["path"]):
            try:
                files += map(str, expand_source(entry["path"], dataset["split"]))
            except MoultError as error:
                if not workflow.dryrun and not rows_are_there(wildcards.ds):
                    return []  # prepare will report it, together with the errors of other runs
                # Snakemake would treat any other exception as a rule that does not apply, and would use the old rows.
                raise SystemExit(f"datasets.{wildcards.ds}.{key}: {error}") from None
        else:
            files.append(at.dataset.format(dataset=dataset_slug(dataset, entry["path"])))
    return files


def rows_are_there(dataset):
    """Whether the dataset has prepared rows. Snakemake would delete them before a job that cannot read its source."""
    return Path(workflow.pathvars.apply(at.ledger.format(ds=dataset))).exists()


@known
def chat_template_file(wildcards):
    """Input: the chat template that the config names, if it is a file."""
    template = config["runs"][wildcards.run]["model"]["chat_template"]
    return [template] if template and Path(template).is_file() else []


# What comes from the hub, by its slug.
hub_datasets = {
    dataset_slug(dataset, entry["path"]): {
        "id": entry["path"],
        **{key: dataset[key] for key in ("subset", "split", "revision")},
    }
    for dataset in config["datasets"].values()
    for _, entry in all_entries(dataset)
    if not is_local(entry["path"])
}


def model_of(wildcards, runs):
    """The model section of the config for a slug. `runs` is {slug: run}."""
    return config["runs"][runs[wildcards.model]]["model"]


def model_settings(stage, runs):
    """Param: the settings that the stage reads, for a slug."""
    return known(lambda wildcards: canonical(stage_settings(config, stage, runs[wildcards.model])))


def hub_names():
    """The models and datasets of the config that come from the hub."""
    models = [config["runs"][run]["model"] for run in hub_models.values()]
    return {
        "models": [{key: model[key] for key in ("name", "revision")} for model in models],
        "datasets": [{"name": dataset["id"], "revision": dataset["revision"]} for dataset in hub_datasets.values()],
    }
