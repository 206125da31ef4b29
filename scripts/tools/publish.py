"""Upload the merged model, the adapter or the exports of a run to the hub. It shows the files first, and asks.

    make publish RUN=demo REPO=name/demo                    # WHAT=adapter; YES=1 asks nothing; PUBLIC=1 for all to see
    make publish RUN=demo REPO=name/demo-GGUF WHAT=gguf     # all GGUF files that `exports` of the run lists
    python scripts/tools/publish.py --run demo --repo name/demo --what adapter --yes

A new repository is private unless you give --public. All files are uploaded in one commit. The examples in the model card name
the repository. The token is the one of huggingface_hub: HF_TOKEN, or `hf auth login`.
"""

from fnmatch import fnmatch
from pathlib import Path

import _library  # noqa: F401

from moult.errors import MoultError
from moult.exporting.upload import upload_of
from moult.files import read_json
from moult.model.export import PLACE
from moult.run.cli import tool_parser
from moult.workflow.exports import FORMATS, UPLOADS, listed_for

# Files of an earlier model, which would be loaded with the new one. Other files (a licence, a picture) stay.
LOADED = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model", "*.py", "merges.txt", "vocab.txt")
# Likewise of earlier GGUF files: they may lie beside a model that transformers loads.
LOADED_GGUF = ("*.gguf", "*.Modelfile")


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("--run", required=True, help="name of the run")
    parser.add_argument("--repo", required=True, help="repository on the hub: name/model")
    parser.add_argument(
        "--what", choices=("merged", "adapter", *UPLOADS), default="merged", help="what to upload (default: merged)"
    )
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--configfile", nargs="+", default=[], help="config files that are added to config/config.yaml")
    parser.add_argument("--log-file", help="log file (default: logs/publish.log)")
    args = parser.parse_args()

    from moult.run.stage import stage

    with stage("publish", args.log_file, online=True) as log:
        publish(args, log)


def publish(args, log) -> None:
    from moult.network import endpoint, hub_errors, set_up_hub, token
    from moult.workflow.runtime import read_config, the_run
    from moult.workflow.stages import places_of

    config = read_config(args.configfile)
    places = places_of(config, the_run(config, args.run))
    if args.what in UPLOADS:
        card, files = of_exports(args, config["runs"][args.run], places, log)
    else:
        card, files = of_model(args, places)
    card = card.replace(PLACE, args.repo)

    set_up_hub(config["network"]["tls"])
    if token()[0] is None:
        raise MoultError(
            "there is no token for the upload",
            f"run `hf auth login`, or set HF_TOKEN to a token with write permission ({endpoint()}/settings/tokens)",
        )
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    with hub_errors("--repo", args.repo):
        there = api.model_info(args.repo) if api.repo_exists(args.repo) else None
    others = {file.rfilename for file in there.siblings} - {"README.md", *files} if there else set()
    stale = sorted(name for name in others if is_loaded(name, LOADED_GGUF if args.what == "gguf" else LOADED))
    size = sum(path.stat().st_size for path in files.values())
    public = args.public if there is None else not there.private
    state = "new repository" if there is None else "existing repository"
    log.info("upload to %s/%s (%s, %s):", endpoint(), args.repo, state, "PUBLIC" if public else "private")
    log.info("  %-40s %15s", "README.md", f"{len(card.encode()):,}")
    for name, path in files.items():
        log.info("  %-40s %15s", name, f"{path.stat().st_size:,}")
    for name in stale:
        log.info("  %-40s %15s", name, "will be deleted")
    log.info("%d files, %s bytes", len(files) + 1, f"{size + len(card.encode()):,}")
    if not args.yes:
        ask(args.repo, log)
    operations = [
        CommitOperationAdd("README.md", card.encode()),
        *(CommitOperationAdd(name, path) for name, path in files.items()),
        *(CommitOperationDelete(name) for name in stale),
    ]
    with hub_errors("--repo", args.repo):
        api.create_repo(args.repo, private=not args.public, exist_ok=True)
        commit = api.create_commit(args.repo, operations, commit_message=f"{args.what} of the run {args.run}")
    log.info("uploaded: %s", commit.commit_url)


def of_model(args, places) -> tuple[str, dict[str, Path]]:
    """The card and the files of the merged model or the adapter. Raises MoultError if they are not what was measured."""
    folder = Path(places.merged if args.what == "merged" else places.adapter)
    made_by = read_json(places.merge_summary)["files" if args.what == "merged" else "adapter"]
    check_whole(folder, {**made_by, "README.md": None}, places.merged_card)
    return (folder / "README.md").read_text(encoding="utf-8"), files_of(folder, made_by)


def files_of(folder: Path, made_by: dict[str, str]) -> dict[str, Path]:
    """{name in the repository: file} of what the run has made, `made_by` names it, and its metadata."""
    return {name: folder / name for name in sorted({*made_by, "metadata.json"}) if (folder / name).is_file()}


def of_exports(args, run: dict, places, log) -> tuple[str, dict[str, Path]]:
    """The card and the files of the exports that the config lists. Raises MoultError if they are not what was measured."""
    files: dict[str, Path] = {}
    target = places.export_card.format(what=args.what)
    for format in listed_for(args.what, run):
        folder, found = Path(places.export.format(format=format)), places.export_metrics.format(format=format)
        check_whole(Path(found).parent, {Path(found).name: None}, target)
        export, made = read_json(found), read_json(places.export_made.format(format=format))
        if export["files"] != made["files"] or export["merged_files"] != read_json(places.merge_summary)["files"]:
            raise MoultError(
                f"{folder} is not the export that was measured, or the merged model is a newer one",
                f"run: snakemake --cores 1 {target}",
            )
        check_whole(folder, export["files"], target)
        own = upload_of(args.run, format, folder, export["files"])
        if "Modelfile" in export["files"] and len(own) == 1:
            log.info("the Modelfile of %s names other files, and is not uploaded", FORMATS[format].shown)
        log.info("%s", export["sentence"])
        files |= own
    check_whole(Path(target).parent, {Path(target).name: None}, target)
    return Path(target).read_text(encoding="utf-8"), files


def is_loaded(name: str, patterns: tuple[str, ...] = LOADED) -> bool:
    """Whether transformers or vLLM (or with LOADED_GGUF llama.cpp) load a file of this name in a model's repository."""
    folder, _, file = name.rpartition("/")
    return folder in ("", "additional_chat_templates") and any(fnmatch(file, like) for like in patterns)


def check_whole(folder: Path, files: dict[str, str | None], target: str) -> None:
    """Raises MoultError if a file is missing, or has another hash than when it was measured. `target` makes them."""
    from moult.files import sha256_file

    for name, wanted in files.items():
        if not (folder / name).is_file():
            raise MoultError(f"{folder}/{name} does not exist", f"run: snakemake --cores 1 {target}")
        if wanted and sha256_file(folder / name) != wanted:
            raise MoultError(f"{folder}/{name} was changed after it was measured", f"delete {folder} and run again")


def ask(repo: str, log) -> None:
    import sys

    if not sys.stdin.isatty():
        raise MoultError("cannot ask for confirmation: there is no terminal", "use --yes (make publish YES=1)")
    log.info("Upload this to %s? [y/N]", repo)  # the prompt of input() would go to the log only
    if input().strip().lower() not in ("y", "yes"):
        raise MoultError("nothing was uploaded", "answer y to upload")


if __name__ == "__main__":
    main()
