"""The image that the tests with a real Apptainer run in, and Snakemake with it."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from workflow import ROOT, checkout, snakemake

CACHE = Path(os.environ.get("MOULT_TEST_CACHE", ROOT.parent / "moult-test-cache")).absolute()
BASE_MAKER = ROOT.parent / "shared" / "tools" / "make-test-image.sh"
TARGET = "results/demo/metrics.json"


def pip_setting(name: str) -> str:
    command = [sys.executable, "-m", "pip", "config", "get", f"global.{name}"]
    return " ".join(subprocess.run(command, capture_output=True, text=True).stdout.split())


def local_packages() -> list[Path]:
    """Folders of this machine that pip is told to look in."""
    words = f"{pip_setting('extra-index-url')} {pip_setting('find-links')}".split()
    folders = [Path(word.removeprefix("file://")) for word in words if re.match(r"(file://)?/", word)]
    return [folder.parent if folder.name == "simple" else folder for folder in folders]


def make_image(folder: Path, base: Path, **environment) -> subprocess.CompletedProcess:
    """`make image` in a checkout."""
    for name in ("containers", "envs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.sif"))
    shutil.copy(ROOT / "Makefile", checkout(folder))
    environment = {
        **os.environ,
        "APPTAINER_BINDPATH": ",".join(map(str, local_packages())),
        "APPTAINER_MKSQUASHFS_ARGS": "-comp zstd -Xcompression-level 3",  # a quarter of the time
        "APPTAINER_TMPDIR": str(folder),
        **environment,
    }
    command = ["make", "image", f"BASE_IMAGE={base}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def inside(sif: Path, *command: str) -> str:
    return subprocess.run(["apptainer", "exec", sif, *command], capture_output=True, text=True, check=True).stdout


def with_image(folder: Path, sif: Path) -> Path:
    from moult import __version__

    (checkout(folder) / "containers").mkdir()
    (folder / "containers" / f"moult-train-{__version__}.sif").symlink_to(sif)
    return folder


def contained(folder: Path, *arguments: str, environment=(), code: int | None = 0) -> str:
    """`snakemake --use-singularity`, with these variables."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in dict(environment).items():
            patch.setenv(name, value)
        return snakemake(folder, "--use-singularity", *arguments, code=code)


NOBODY = 65534


def give_to_nobody(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        os.chown(path, NOBODY, NOBODY)


def processes(folder: Path) -> str:
    """The command lines of those that work in `folder`, in containers or not."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").readlink() == folder:
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return "\n".join(filter(None, found))


def wait(until, seconds: int) -> None:
    limit = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < limit, "not in time"
        time.sleep(0.2)
