"""Download a base model from the hub, and record its commit and the hash of every file.

    python scripts/fetch_model.py --name Qwen/Qwen3-0.6B --out results/models/Qwen--Qwen3-0.6B \\
        --manifest results/models/Qwen--Qwen3-0.6B.json

First stage for a model from the hub; it needs the network. (For a local folder: inspect_model.) The revision is resolved to a
commit. Only safetensors weights are downloaded, and of those only the files of the model itself. An interrupted download stays in
`<out>.partial`, and the next run continues it. HF_TOKEN is read from the environment and not written anywhere.
"""

import shutil
import signal
import threading
from pathlib import Path

from moult.errors import MoultError, some
from moult.files import fsync, write_json
from moult.model.manifest import IGNORED, check_code, describe
from moult.model.safetensors import weight_names
from moult.network import check_names, hub_errors, set_up_hub
from moult.run.cli import stage_parser
from moult.run.console import progress
from moult.run.stage import stage

MB = 1_000_000


def main() -> None:
    parser = stage_parser(__doc__, "fetch_model", reads="revision, trust_remote_code", optional=True)
    parser.add_argument("--name", required=True, help="name of the model in the config")
    parser.add_argument("--out", required=True, help="folder to download to")
    parser.add_argument("--manifest", required=True, help="output: files, hashes and commit (.json)")
    parser.add_argument("--tls", default="verify", help="how to check the hub's certificate: verify, off, or a CA file")
    args = parser.parse_args()

    settings = {"revision": None, "trust_remote_code": False} | args.settings
    with stage("fetch_model", args.log_file, settings, online=True) as log:
        fetch(settings, args, log)


def fetch(settings: dict, args, log) -> None:
    manifest = download(settings, args, log)
    write_json(args.manifest, manifest)
    log.info("%s: %s files, commit %s", args.name, len(manifest["files"]), manifest["commit"])
    if manifest["ignored"]:
        log.warning("%s: not part of the model, ignored: %s", args.name, some(manifest["ignored"]))


def download(settings: dict, args, log) -> dict:
    """Download the snapshot to --out, complete or not at all. Returns its manifest."""
    set_up_hub(args.tls)
    from huggingface_hub import HfApi, constants

    with hub_errors("model.name", args.name, settings["revision"]):
        info = HfApi().model_info(
            args.name, revision=settings["revision"], files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
        check_names(args.name, [file.rfilename for file in info.siblings])
        check_weights(args.name, [file.rfilename for file in info.siblings])
        partial = partial_folder(args.out, info.sha)
        download_files(args.name, info, partial, settings["trust_remote_code"], log)
    manifest = describe(partial, args.name, settings["trust_remote_code"], info.sha, local=False)
    check_whole(info, manifest, partial)
    put(partial, Path(args.out))
    return manifest


def check_weights(name: str, files: list[str]) -> None:
    """Raises MoultError if there are no safetensors weights, before anything is downloaded."""
    if "model.safetensors" in files or "model.safetensors.index.json" in files:
        return
    if "adapter_config.json" in files:
        raise MoultError(f"{name} is an adapter, not a model", "set model.name to the base model of this adapter")
    others = [file for file in files if file.endswith((".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf"))]
    raise MoultError(
        f"{name} has no safetensors weights{f', only: {some(others)}' if others else ''}",
        "choose a repository or a revision with model.safetensors; the hub's automatic conversion is often refs/pr/1",
    )


def partial_folder(out: str, commit: str) -> Path:
    """The folder for the download of `commit`. Removes downloads of other commits, which must not mix with it."""
    partial = Path(f"{out}.partial") / commit
    for other in partial.parent.glob("*"):
        if other != partial:
            shutil.rmtree(other)
    for cut_off in partial.glob(".cache/**/*.incomplete"):  # huggingface_hub 2 cannot continue a part of a file
        cut_off.unlink()
    return partial


def download_files(name: str, info, partial: Path, trust_remote_code: bool, log) -> None:
    """Download the small files first: the index among them lists the weights of the model."""
    from huggingface_hub import snapshot_download

    snapshot_download(name, revision=info.sha, local_dir=partial, ignore_patterns=[*IGNORED, "*.safetensors"])
    check_code(partial, name, trust_remote_code)
    weights = weight_names(partial, [file.rfilename for file in info.siblings])
    size = sum(file.size or 0 for file in info.siblings if file.rfilename in weights)
    there = sum(path.stat().st_size for path in partial.glob("*.safetensors"))
    free = shutil.disk_usage(partial).free
    if size - there > free:
        raise MoultError(
            f"{name} needs {(size - there) / 1e9:.1f} GB more, but {partial.parent.parent} has {free / 1e9:.1f} GB free",
            "free space, or set paths.results to a folder on a larger disk",
        )
    log.info("%s: downloading commit %s, %.2f GB of weights", name, info.sha, size / 1e9)
    with progress(size // MB, "MB of weights", initial=there // MB) as bar:
        bars = one_bar(bar, there)
        snapshot_download(name, revision=info.sha, local_dir=partial, allow_patterns=weights, tqdm_class=bars)


def one_bar(bar, received: int) -> type:
    """A class for the three progress bars of huggingface_hub. They are hidden; the one that counts bytes moves `bar`."""
    from huggingface_hub.utils import tqdm

    stop = stop_event()

    class Silent(tqdm):
        def __init__(self, *args, name: str | None = None, **kwargs):
            self.counts = name == "huggingface_hub.snapshot_download"
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            nonlocal received
            if stop.is_set():
                raise InterruptedError
            if self.counts:
                received += int(n or 0)
                bar.update(received // MB - bar.done)

    return Silent


def stop_event() -> threading.Event:
    """An event that SIGINT and SIGTERM set. Otherwise huggingface_hub would first finish its files, which can be gigabytes."""
    stop = threading.Event()

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def pass_on(number: int, frame) -> None:
        stop.set()
        handlers[number](number, frame)

    for number, handler in handlers.items():
        if callable(handler):  # not ignored
            signal.signal(number, pass_on)
    return stop


def check_whole(info, manifest: dict, partial: Path) -> None:
    """Raises MoultError if a file is missing or differs from the file on the hub."""
    from fnmatch import fnmatchcase

    for file in info.siblings:
        path = partial / file.rfilename
        spare = path.suffix == ".safetensors" and not path.exists()
        if spare or any(fnmatchcase(file.rfilename, pattern) for pattern in IGNORED):
            continue
        whole = path.is_file() and file.size in (None, path.stat().st_size)
        if not whole or (file.lfs and file.lfs.sha256 != manifest["files"].get(file.rfilename)):
            path.unlink(missing_ok=True)
            raise MoultError(f"the download of {file.rfilename} is damaged", "run again: the other files are kept")


def put(partial: Path, out: Path) -> None:
    """Move the complete snapshot to its final name."""
    shutil.rmtree(partial / ".cache")  # huggingface_hub's notes on what it has downloaded
    for path in partial.rglob("*"):
        fsync(path)
    shutil.rmtree(out, ignore_errors=True)
    partial.replace(out)
    partial.parent.rmdir()


if __name__ == "__main__":
    main()
