"""Get one split of a dataset from the hub, as a Parquet file.

    python scripts/fetch_dataset.py --settings '{"id": "openai/gsm8k", "subset": "main", "split": "train"}' \\
        --out results/datasets/openai--gsm8k--main--train.parquet \\
        --metadata results/datasets/openai--gsm8k--main--train.json

First stage, beside fetch_model; needs the network. The revision is resolved to a commit, which the metadata records with
the number of rows and the hash of the file. What the hub has in other formats is converted by `datasets`, in a folder
`<out>.partial` that is removed at the end, and stays when the download is cut off, to go on from there. The original
files go to the hub's own cache if HF_HOME says where that is, and otherwise into the same folder, so that they do not
fill ~/.cache. HF_TOKEN is read from the environment and written nowhere.
"""

import os
import shutil
from pathlib import Path

from moult.errors import MoultError, some
from moult.files import atomic_file, sha256_file, write_json
from moult.network import check_names, hub_errors, refusal, set_up_hub
from moult.run.cli import stage_parser
from moult.run.stage import stage

KEY = "datasets.<name>.source"


def main() -> None:
    parser = stage_parser(__doc__, "fetch_dataset", reads="id, subset, split, revision")
    parser.add_argument("--out", required=True, help="rows to write (.parquet)")
    parser.add_argument("--metadata", required=True, help="JSON to write: commit, rows, hash")
    parser.add_argument("--tls", default="verify", help="how to check the hub's certificate: verify, off, or a CA file")
    args = parser.parse_args()

    settings = {"subset": None, "split": "train", "revision": None} | args.settings
    with stage("fetch_dataset", args.log_file, settings, online=True) as log:
        fetch(settings, args, log)


def fetch(settings: dict, args, log) -> None:
    partial = Path(f"{args.out}.partial")
    set_up_caches(partial)
    set_up_hub(args.tls)
    from huggingface_hub import HfApi, constants

    with hub_errors(KEY, settings["id"], settings["revision"], "dataset"):
        info = HfApi().dataset_info(
            settings["id"], revision=settings["revision"], timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
        check_names(settings["id"], [file.rfilename for file in info.siblings])
        check_no_script(settings["id"], [file.rfilename for file in info.siblings])
        log.info("%s: downloading commit %s", settings["id"], info.sha)
        rows = load(settings, info.sha, partial / "datasets")
    with atomic_file(args.out) as path:
        rows.to_parquet(path)
    identity = {key: settings[key] for key in ("id", "subset", "split", "revision")}
    facts = {"commit": info.sha, "rows": len(rows), "columns": rows.column_names, "sha256": sha256_file(args.out)}
    write_json(args.metadata, {"schema_version": 1, **identity, **facts})
    shutil.rmtree(partial)
    log.info("%s: %s rows, commit %s", settings["id"], f"{len(rows):,}", info.sha)


def set_up_caches(partial: Path) -> None:
    """Where huggingface_hub and datasets put what they download; they read it when they are imported."""
    # Rows of an earlier attempt, perhaps of another commit: datasets falls back on them when the hub does not answer.
    shutil.rmtree(partial / "datasets", ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)
    if not {"HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"} & os.environ.keys():
        os.environ["HF_HUB_CACHE"] = str(partial.absolute() / "hub")


def check_no_script(name: str, files: list[str]) -> None:
    script = f"{name.split('/')[-1]}.py"
    if script in files:
        raise MoultError(
            f"{name} is a Python script ({script}), which datasets no longer runs",
            "take a copy in Parquet: the hub's own conversion is often revision: refs/convert/parquet, with subset: null",
        )


def load(settings: dict, commit: str, cache: Path):
    """The rows of the split, as a datasets.Dataset in `cache`."""
    from datasets import get_dataset_config_names, load_dataset_builder
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import (
        DataFilesNotFoundError,
        DatasetGenerationError,
        DatasetNotFoundError,
    )

    name, subset, split = settings["id"], settings["subset"], settings["split"]
    try:
        builder = load_dataset_builder(name, subset, revision=commit, cache_dir=str(cache))
    except (DataFilesNotFoundError, EmptyDatasetError):
        raise MoultError(f"{name} holds no data files that can be read", "look at its page on the hub") from None
    except DatasetNotFoundError:  # although the hub has just described it; datasets hides the error behind this one
        raise MoultError(*refusal(403, {"X-Error-Code": "GatedRepo"}, KEY, name, None, "dataset")) from None
    except ValueError as error:
        if "onfig" not in str(error):  # "BuilderConfig 'x' not found", "Config name is missing"
            raise
        there = some(get_dataset_config_names(name, revision=commit), 20)
        wrong = f"has no subset {subset}" if subset else "consists of subsets, and none is named"
        raise MoultError(f"{name} {wrong}; there are: {there}", "set datasets.<name>.subset") from None
    check_split(name, split, list(builder.config.data_files or {}))
    try:
        builder.download_and_prepare()
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, OSError):  # a full disk
            raise
        cause = " ".join(str(error.__cause__ or error).split())[:300]
        raise MoultError(
            f"{name}: its files do not make one table: {cause}",
            "set datasets.<name>.subset, or download the files that you need and give their path as source",
        ) from error
    return builder.as_dataset(split=split)


def check_split(name: str, split: str, there: list) -> None:
    """Before anything is downloaded. `split` may be one of those that datasets understands: `train[:1000]+test`."""
    missing = [part for part in split.split("+") if part.split("[")[0].strip() not in (*map(str, there), "all")]
    if there and missing:
        raise MoultError(f"{name} has no split {some(missing)}; there are: {some(there)}", "set datasets.<name>.split")


if __name__ == "__main__":
    main()
