"""The image, and the demo in it: made once."""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from apptainer import BASE_MAKER, CACHE, TARGET, contained, local_packages, make_image, pip_setting, with_image
from recipes import files_of_definition
from workflow import ROOT


@pytest.fixture(scope="session")
def base(once):
    """A Debian to build on, with this machine's settings of pip in it: no registry can be reached from a test."""
    if not BASE_MAKER.exists() or os.geteuid():
        pytest.skip("the maker of a base image is not beside the repository, or this is not root")
    return once("base", unpack_base)


def unpack_base(folder: Path) -> None:
    CACHE.mkdir(exist_ok=True)
    environment = {**os.environ, "TEST_IMAGE_CACHE": str(CACHE)}
    subprocess.run([BASE_MAKER, "tar", CACHE / "base.tar"], check=True, env=environment)
    subprocess.run(["tar", "-C", folder, "--exclude=./dev/*", "-xpf", CACHE / "base.tar"], check=True)
    shutil.copy("/etc/ssl/certs/ca-certificates.crt", folder / "etc/test-ca.crt")
    settings = ["[global]", "cert = /etc/test-ca.crt"]
    for name in ("index-url", "extra-index-url", "find-links"):
        if value := pip_setting(name):
            settings.append(f"{name} = {value}")
    (folder / "etc/pip.conf").write_text("\n".join(settings) + "\n")
    for local in local_packages():
        (folder / local.relative_to("/")).mkdir(parents=True, exist_ok=True)


@pytest.fixture(scope="session")
def sif(base, once):
    """The image that `make image` makes, or has made."""
    inputs = {"containers/train.def", *files_of_definition("train.def")}
    content = hashlib.sha256(b"".join((ROOT / path).read_bytes() for path in sorted(inputs))).hexdigest()[:16]
    kept = CACHE / f"train-{content}.sif"
    once("image", lambda folder: kept.exists() or build(kept, base, folder))
    return kept


def build(kept: Path, base: Path, folder: Path) -> None:
    from moult import __version__

    done = make_image(folder, base)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"^  torch +\d", done.stdout, re.MULTILINE), "the build did not run the self-test"
    assert [path.name for path in (folder / "containers").glob("*.sif*")] == [f"moult-train-{__version__}.sif"]
    for old in CACHE.glob("train-*.sif"):
        old.unlink()
    shutil.move(folder / "containers" / f"moult-train-{__version__}.sif", kept)


# Python runs it at its start, wherever PYTHONPATH leads there, and for an interpreter without a site of the user's
# excluded also from ~/.local: it tells which interpreter has started with which script.
POISON = """
import os, sys
with open(os.environ.get("POISONED", "poisoned.txt"), "a") as file:
    file.write(f"{sys.prefix} {sys.orig_argv}\\n")
"""


@pytest.fixture(scope="session")
def poisoned(tmp_path_factory):
    """An environment in which every Python of the host is told what it must not be told in a container."""
    folder = tmp_path_factory.mktemp("poison")
    for place, module in (("path", "sitecustomize"), ("home/.local/lib/python3.%d/site-packages", "usercustomize")):
        for minor in range(11, 15) if "%" in place else [0]:
            path = folder / (place % minor if "%" in place else place) / f"{module}.py"
            path.parent.mkdir(parents=True)
            path.write_text(POISON)
    library = folder / "lib"
    library.mkdir()
    (library / "libz.so.1").write_text("no library")
    return {"PYTHONPATH": str(folder / "path"), "HOME": str(folder / "home"), "LD_LIBRARY_PATH": str(library)}


@pytest.fixture
def folder(tmp_path, sif):
    """A checkout with the image where the config has it."""
    folder = tmp_path / "moult"
    folder.mkdir()
    return with_image(folder, sif)


@pytest.fixture(scope="session")
def contained_demo(sif, poisoned, tmp_path_factory):
    """(a checkout in which the demo has run in containers, what Snakemake has said)."""
    folder = with_image(tmp_path_factory.mktemp("contained"), sif)
    # Snakemake itself needs a library path that works; the stages are what this is about.
    environment = {name: value for name, value in poisoned.items() if name != "LD_LIBRARY_PATH"}
    return folder, contained(folder, TARGET, environment=environment)


@pytest.fixture(scope="session")
def open_folder():
    """A folder that another user gets to; those of pytest are closed."""
    folder = Path(tempfile.mkdtemp(prefix="moult-test-", dir="/var/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)
