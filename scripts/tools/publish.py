"""Upload the merged model or the adapter of a run to the hub. It shows the files first, and asks.

    make publish RUN=demo REPO=name/demo                    # WHAT=adapter; YES=1 asks nothing; PUBLIC=1 for all to see
    python scripts/tools/publish.py --run demo --repo name/demo --what adapter --yes

A new repository is private unless you give --public. All files are uploaded in one commit. The examples in the model card name
the repository. The token is the one of huggingface_hub: HF_TOKEN, or `hf auth login`.
"""

from fnmatch import fnmatch
from pathlib import Path

import _library  # noqa: F401

from moult.errors import MoultError
from moult.model.export import PLACE
from moult.run.cli import tool_parser

# Files of an earlier model, which would be loaded with the new one. Other files (a licence, a picture) stay.
LOADED = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model", "*.py", "merges.txt", "vocab.txt")


def main() -> None:
    parser = tool_parser(__doc__)
    parser.add_argument("--run", required=True, help="name of the run")
    parser.add_argument("--repo", required=True, help="repository on the hub: name/model")
    parser.add_argument(
        "--what", choices=("merged", "adapter"), default="merged", help="what to upload (default: merged)"
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
    from moult.files import read_json
    from moult.network import endpoint, hub_errors, set_up_hub, token
    from moult.workflow.runtime import read_config, the_run
    from moult.workflow.stages import places_of

    config = read_config(args.configfile)
    places = places_of(config, the_run(config, args.run))
    folder = Path(places.merged if args.what == "merged" else places.adapter)
    made_by = read_json(places.merge_summary)["files" if args.what == "merged" else "adapter"]
    check_whole(folder, made_by, args.run)
    card = (folder / "README.md").read_text(encoding="utf-8").replace(PLACE, args.repo)
    files = files_of(folder, made_by)

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
    stale = sorted(name for name in others if is_loaded(name))
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


def files_of(folder: Path, made_by: dict[str, str]) -> dict[str, Path]:
    """{name in the repository: file} of what the run has made, `made_by` names it, and its metadata."""
    return {name: folder / name for name in sorted({*made_by, "metadata.json"}) if (folder / name).is_file()}


def is_loaded(name: str) -> bool:
    """Whether transformers or vLLM load a file of this name in a model's repository."""
    folder, _, file = name.rpartition("/")
    return folder in ("", "additional_chat_templates") and any(fnmatch(file, like) for like in LOADED)


def check_whole(folder: Path, made_by: dict[str, str], run: str) -> None:
    """Raises MoultError if a file was changed after it was measured."""
    from moult.files import sha256_file

    for name, wanted in {**made_by, "README.md": None}.items():
        if not (folder / name).is_file():
            raise MoultError(
                f"{folder}/{name} does not exist", f"run: snakemake --cores 1 results/{run}/cards/merged.md"
            )
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
