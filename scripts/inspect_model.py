"""Look at a local base model, which is used in place, and write down exactly what it is.

    python scripts/inspect_model.py --name config/demo/base --folder config/demo/base \\
        --manifest results/models/config--demo--base.json

First stage for a model that is on this machine. (One of the hub is downloaded: fetch_model.) The manifest has the hash of
each file. Only safetensors weights are taken, and code that the model brings is refused unless the config allows it.
"""

from pathlib import Path

from moult.errors import some
from moult.files import write_json
from moult.model.manifest import describe
from moult.run.cli import stage_parser
from moult.run.stage import stage


def main() -> None:
    parser = stage_parser(__doc__, "inspect_model", reads="revision, trust_remote_code", optional=True)
    parser.add_argument("--name", required=True, help="the model's name in the config")
    parser.add_argument("--folder", required=True, help="the model's folder")
    parser.add_argument("--manifest", required=True, help="JSON to write: files and hashes")
    args = parser.parse_args()

    settings = {"trust_remote_code": False} | args.settings
    with stage("inspect_model", args.log_file, settings) as log:
        manifest = describe(Path(args.folder), args.name, settings["trust_remote_code"])
        write_json(args.manifest, manifest)
        log.info("%s: %s files", args.name, len(manifest["files"]))
        if manifest["ignored"]:
            log.warning("%s: not part of the model, ignored: %s", args.name, some(manifest["ignored"]))


if __name__ == "__main__":
    main()
