"""Get a base model from the hub, or look at a local one, and write down exactly what it is.

    python scripts/fetch_model.py --name Qwen/Qwen3-0.6B --out results/models/Qwen--Qwen3-0.6B --manifest results/models/Qwen--Qwen3-0.6B.json
    python scripts/fetch_model.py --name config/demo/base --folder config/demo/base --manifest results/models/config--demo--base.json

First stage; the rules fetch_model (hub, needs the network) and inspect_model (a local folder, used in place) call it.
The revision is resolved to a commit, which the manifest records with the hash of every file. Only safetensors weights
are taken. HF_TOKEN is read from the environment and written nowhere.
"""

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--settings", default="{}", help="JSON of what this stage reads of the config: revision, trust_remote_code, tls"
    )
    parser.add_argument("--name", required=True, help="the model's name in the config")
    parser.add_argument("--folder", help="local folder to look at; without it the model is downloaded")
    parser.add_argument("--out", help="folder to download to")
    parser.add_argument("--manifest", required=True, help="JSON to write: files and hashes, commit")
    parser.add_argument("--log", help="log file (default: logs/fetch_model.log)")
    args = parser.parse_args()

    from moult.stage import stage

    settings = {"revision": None, "trust_remote_code": False, "tls": "verify"} | json.loads(args.settings)
    with stage("fetch_model", args.log, settings, online=args.folder is None) as log:
        fetch(settings, args, log)


def fetch(settings: dict, args, log) -> None:
    from moult.files import write_json
    from moult.models import describe

    if args.folder:
        manifest = describe(Path(args.folder), args.name, settings["trust_remote_code"])
    else:
        commit = download(settings, args, log)
        manifest = describe(Path(args.out), args.name, settings["trust_remote_code"], commit, local=False)
    write_json(args.manifest, manifest)
    log.info(
        "%s: %s files%s",
        args.name,
        len(manifest["files"]),
        f", commit {manifest['commit']}" if manifest["commit"] else "",
    )


def download(settings: dict, args, log) -> str:
    """Download the snapshot to --out, whole or not at all. Returns the commit."""
    from huggingface_hub import HfApi, snapshot_download

    from moult.models import IGNORED
    from moult.network import hub_errors, set_up_hub

    set_up_hub(settings["tls"])
    partial = Path(f"{args.out}.partial")  # kept after a failure: the download goes on from there
    with hub_errors("model.name", args.name, settings["revision"]):
        info = HfApi().model_info(args.name, revision=settings["revision"])
        log.info("%s: downloading commit %s", args.name, info.sha)
        snapshot_download(args.name, revision=info.sha, local_dir=partial, ignore_patterns=list(IGNORED))
    partial.replace(args.out)
    return info.sha


if __name__ == "__main__":
    main()
