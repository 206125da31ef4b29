"""What several test files share.

`make test` runs what is not marked slow, `make test-all` everything; both in a process for each core. Tests that need the same
dear fixture run in the same process, so that it is made once.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

# Before anything imports torch: tests run side by side, and a second thread would only take turns with another test.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import examples  # noqa: F401 (hypothesis asks for its profiles before a test is imported)
import pytest
from filelock import FileLock
from showcase import make_pages
from workflow import PAGES, ROOT, SECRETS, checkout, snakemake

GIVEN = set(os.environ)
# Fixtures that take long to make, and that every process would make anew (those of `once` are shared). A test that needs several
# goes with the first.
DEAR = ("sif", "whole", "undisturbed")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist looks at the marks in the same hook
def pytest_collection_modifyitems(items):
    for item in items:
        found = [name for name in DEAR if name in item.fixturenames]
        if found and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(found[0]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """xdist cannot send a report that quotes half a surrogate pair, as fuzzed input does, and would end all tests."""
    report = yield
    text = str(report.longrepr or "")
    if text != (safe := text.encode(errors="backslashreplace").decode()):
        report.longrepr = safe
    report.sections = [(name, part.encode(errors="backslashreplace").decode()) for name, part in report.sections]
    return report


@pytest.fixture(autouse=True)
def own_environment():
    """Libraries set variables that would reach the stages that a later test starts. torch's compiler does when it is imported,
    which may be before the first test."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        if name not in GIVEN:
            os.environ.pop(name, None)
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real models and datasets that nobody in this project wrote, kept beside the repository."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the shared data is not beside the repository")
    return folder


@pytest.fixture(scope="session")
def chat_of(shared, tmp_path_factory):
    """The Chat of a family of families.py, made once."""
    from families import FAMILIES
    from tokenizers_for_tests import DEMO, SHIPPED, make_tokenizer

    from moult.model.chat import Chat, choose_template

    made: dict[str, Chat] = {}

    def make(name: str) -> Chat:
        if name not in made:
            family = FAMILIES[name]
            source = DEMO if family.source == "demo" else shared / family.source
            folder, setting = source, None
            if family.template == "shipped":
                setting = "chatml"
            elif family.template:
                folder = make_tokenizer(tmp_path_factory.mktemp("family"), source, **family.tokenizer)
                setting = str(shared / "chat_templates" / f"{family.template}.jinja")
            template, _ = choose_template(str(folder), setting, SHIPPED)
            made[name] = Chat(str(folder), template, family.settings)
        return made[name]

    return make


@pytest.fixture
def run_script():
    """Run a stage as a rule does: `run_script("prepare", "--train", path, ...)` -> returncode, stdout, stderr."""

    def run(name: str, *arguments, **options) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)

    return run


@pytest.fixture(scope="session")
def once(tmp_path_factory, worker_id):
    """`once(name, fill)`: a folder that the first process to need it has filled, for all of them.

    As https://pytest-xdist.readthedocs.io/en/stable/how-to.html has it; they share the folder above their own.
    """
    own = tmp_path_factory.getbasetemp()
    root = own if worker_id == "master" else own.parent

    def folder_of(name: str, fill) -> Path:
        folder, done = root / name, root / f"{name} is there"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def watched_demo(once):
    """(a checkout in which the demo has run, a folder with what it did elsewhere: HOME, TMPDIR, audit.jsonl, console.txt)."""
    folder = once("demo", run_demo)
    return folder / "moult", folder / "beside"


def run_demo(folder: Path) -> None:
    beside = folder / "beside"
    with pytest.MonkeyPatch.context() as environment:
        for name, value in SECRETS.items():
            environment.setenv(name, value)
        for name in ("HOME", "TMPDIR"):
            (beside / name).mkdir(parents=True)
            environment.setenv(name, str(beside / name))
        environment.setenv("AUDIT", str(beside / "audit.jsonl"))
        environment.setenv("PYTHONPATH", str(ROOT / "tests" / "audit"), prepend=os.pathsep)
        output = snakemake(checkout(folder / "moult"), "results/demo/metrics.json")
        (beside / "console.txt").write_text(output)


@pytest.fixture(scope="session")
def demo(watched_demo):
    """A checkout in which the demo has run. Nothing may run in it, since other processes copy it meanwhile: see `again`."""
    return watched_demo[0]


@pytest.fixture(scope="session")
def pages(demo, once) -> Path:
    """A copy of it, with all pages. Nothing may run in it either."""

    def make(folder: Path) -> None:
        shutil.copytree(demo, folder / "demo", copy_function=shutil.copy2)
        snakemake(folder / "demo", *PAGES)

    return once("pages", make) / "demo"


@pytest.fixture(scope="session")
def showcase(pages, once) -> Path:
    """A copy of that, with more runs and a page of every kind. It takes minutes. Nothing may run in it either."""

    def make(folder: Path) -> None:
        shutil.copytree(pages, folder / "demo", copy_function=shutil.copy2)
        make_pages(folder / "demo")

    return once("showcase", make) / "demo"


@pytest.fixture
def again(demo, tmp_path):
    """A copy of it, for a test that changes something. Times stay, as Snakemake looks at them."""
    shutil.copytree(demo, tmp_path / "demo", copy_function=shutil.copy2)
    return tmp_path / "demo"
