"""Get one split of a dataset from the hub, as a Parquet file.

    python scripts/fetch_dataset.py --settings '{"id": "openai/gsm8k", "subset": "main", "split": "train"}' \\
        --out results/datasets/openai--gsm8k--main--train.parquet \\
        --metadata results/datasets/openai--gsm8k--main--train.json

First stage, beside fetch_model; needs the network. The revision is resolved to a commit, which the metadata records with
the number of rows and the hash of the file. JSON, JSON Lines and CSV are read as prepare reads a local file, so that
both give the same rows: `datasets` makes dates of texts that look like dates, 1.0 of 1 beside 2.5, and cuts numbers to ten
digits (5.2). All else it converts, in a folder `<out>.partial` that is removed at the end, and stays when the download is
cut off, to go on from there. The original files go to the hub's own cache if HF_HOME says where that is, and otherwise
into the same folder, so that they do not fill ~/.cache. HF_TOKEN is read from the environment and written nowhere.
"""

import dataclasses
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from moult.data.readers import read_rows
from moult.data.row_file import columns_of, write_rows
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
        builder = find(settings, info.sha, partial / "datasets")
        own = download(builder, settings, info.sha, log)
        table = None if own else convert(builder, settings)
    with atomic_file(args.out) as path:
        if own:
            count, columns = write_rows(path, own.rows(settings["split"]), own.columns), list(own.columns)
        else:
            table.to_parquet(path)
            count, columns = len(table), table.column_names
    identity = {key: settings[key] for key in ("id", "subset", "split", "revision")}
    facts = {"commit": info.sha, "rows": count, "columns": columns, "sha256": sha256_file(args.out)}
    write_json(args.metadata, {"schema_version": 1, **identity, **facts})
    shutil.rmtree(partial)
    log.info("%s: %s rows, commit %s", settings["id"], f"{count:,}", info.sha)


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


def find(settings: dict, commit: str, cache: Path):
    """What `datasets` makes of the repository: a builder, which knows the files of each split and works in `cache`."""
    from datasets import get_dataset_config_names, load_dataset_builder
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError

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
    return builder


@dataclasses.dataclass
class OwnFiles:
    """Files that Moult reads by itself.

    files: {split: local copies}. counts: {split: rows}. columns: {column: whether it holds nothing but text}.
    """

    files: dict[str, list[Path]]
    counts: dict[str, int]
    columns: dict[str, bool]

    def rows(self, split: str) -> Iterator[dict]:
        """The rows of a split, or of what `split` makes of several: "train[:1000]+test"."""
        from datasets import ReadInstruction

        for part in ReadInstruction.from_spec(whole(split, self.files)).to_absolute(self.counts):
            yield from itertools.islice(rows_of(self.files[part.splitname]), part.from_, part.to)


def rows_of(files: list[Path]) -> Iterator[dict]:
    return (row for file in files for _, row in read_rows(file, file.name))


def whole(split: str, splits: dict) -> str:
    return "+".join(map(str, splits)) if split == "all" else split


def download(builder, settings: dict, commit: str, log) -> OwnFiles | None:
    """Local copies of the split's files, if they are of a kind, and written in a way, that Moult reads by itself."""
    from huggingface_hub import hf_hub_download

    where = f"hf://datasets/{settings['id']}@{commit}/"
    names = {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}
    asked = [part.split("[")[0].strip() for part in whole(settings["split"], names).split("+")]
    names = {split: names.get(split, []) for split in asked}
    flat = [name for files in names.values() for name in files]
    if not flat or not all(name.startswith(where) and is_own(name, builder.config) for name in flat):
        return None
    files = {
        split: [
            Path(hf_hub_download(settings["id"], name.removeprefix(where), repo_type="dataset", revision=commit))
            for name in of_split
        ]
        for split, of_split in names.items()
    }
    try:
        counted = {split: columns_of(rows_of(of_split)) for split, of_split in files.items()}
    except MoultError as error:  # NaN, an object of columns
        log.info("%s; datasets reads it instead", error.what)
        return None
    columns: dict[str, bool] = {}
    for found, _ in counted.values():
        columns |= {column: is_text and columns.get(column, True) for column, is_text in found.items()}
    return OwnFiles(files, {split: count for split, (_, count) in counted.items()}, columns)


def is_own(name: str, config) -> bool:
    """Whether a file is JSON, JSON Lines, CSV or TSV, and the dataset's card says nothing of how to read it."""
    suffix = Path(name.lower().removesuffix(".gz")).suffix
    if suffix not in (".json", ".jsonl", ".ndjson", ".csv", ".tsv"):
        return False
    usual = type(config)()
    told = {field.name for field in dataclasses.fields(config)}
    told = {key for key in told if getattr(config, key) != getattr(usual, key)}
    return told <= {
        "name",
        "version",
        "data_dir",
        "data_files",
        "description",
        "features",
        *(["sep"] * (suffix == ".tsv")),
    }


def convert(builder, settings: dict):
    """The rows of the split as `datasets` reads them: a datasets.Dataset."""
    from datasets.exceptions import DatasetGenerationError

    name = settings["id"]
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
    return builder.as_dataset(split=settings["split"])


def check_split(name: str, split: str, there: list) -> None:
    """Before anything is downloaded. `split` may be one of those that datasets understands: `train[:1000]+test`."""
    missing = [part for part in split.split("+") if part.split("[")[0].strip() not in (*map(str, there), "all")]
    if there and missing:
        raise MoultError(f"{name} has no split {some(missing)}; there are: {some(there)}", "set datasets.<name>.split")


if __name__ == "__main__":
    main()
