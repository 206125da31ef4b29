"""What a stage's code is (moult/workflow/code.py), and the walls between the rooms of the library."""

import ast
import re
import sys

import pytest
from rooms import MAY_IMPORT
from workflow import ROOT

from moult.workflow.code import closure, code_hash, hash_of_script
from moult.workflow.stages import STAGES

SCRIPTS = ROOT / "scripts"
LIBRARY = sorted(path.relative_to(SCRIPTS).as_posix() for path in (SCRIPTS / "moult").rglob("*.py"))
# Two rules share a script where they do the same to another model.
SCRIPT_OF = (
    {stage: stage for stage in STAGES}
    | dict.fromkeys(("evaluate_base", "evaluate_tuned"), "evaluate_model")
    | dict.fromkeys(("benchmark_base", "benchmark_tuned"), "run_benchmark")
)


def read(path: str) -> str:
    return (SCRIPTS / path).read_text(encoding="utf-8")


def imports(path: str, inside_functions: bool) -> set[str]:
    """The modules that a file imports, by Python's own parser."""
    tree = ast.parse(read(path))
    nodes = ast.walk(tree) if inside_functions else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full: the code hash looks for `from moult.`"
            found.add(node.module)
    return found


def modules_of(files: dict[str, str]) -> set[str]:
    return {path for path in files if not path.endswith("__init__.py")}


def test_a_closure_follows_imports_of_imports_and_ends_in_a_circle():
    files = {
        "a.py": "from moult.room.b import f\n",
        "moult/room/b.py": "def f():\n    from moult.c import g\n    import os\n",
        "moult/c.py": "from moult.room.b import f\n",
        "moult/__init__.py": "",
        "moult/room/__init__.py": "",
        "moult/other.py": "",
    }
    assert closure("a.py", files.__getitem__).keys() == files.keys() - {"moult/other.py"}


def test_what_cannot_change_a_result_is_in_no_hash():
    files = {"a.py": "1", "moult/run/stage.py": "2", "moult/__init__.py": "3", "moult/x.py": "4"}
    for path, tracked in (
        ("a.py", True),
        ("moult/x.py", True),
        ("moult/run/stage.py", False),
        ("moult/__init__.py", False),
    ):
        assert (code_hash({**files, path: "edited"}) != code_hash(files)) == tracked
    assert code_hash(files, "image") != code_hash(files)
    assert code_hash(files, "ab", "c") != code_hash(files, "a", "bc")


@pytest.mark.parametrize("script", sorted(set(SCRIPT_OF.values())))
def test_a_closure_is_all_that_python_would_import_of_ours(script):
    """The regular expression, which Snakemake can afford at each start, sees what the parser sees."""
    found, waiting = set(), [f"{script}.py"]
    while waiting:
        path = waiting.pop()
        found.add(path)
        ours = {name for name in imports(path, inside_functions=True) if name.startswith("moult.")}
        waiting += [module for name in ours if (module := f"{name.replace('.', '/')}.py") not in found]
    assert modules_of(closure(f"{script}.py", read)) == found
    assert re.fullmatch("[0-9a-f]{16}", hash_of_script(SCRIPTS / f"{script}.py"))


def test_training_depends_on_what_trains():
    """An edit of how rows are read, rendered, labelled, scored or served is no reason to train again."""
    rooms = {path.split("/")[1] for path in modules_of(closure("finetune.py", read)) if path.count("/") == 2}
    assert rooms <= {"run", "training", "model", "measuring", "data", "workflow"}
    found = modules_of(closure("finetune.py", read))
    never = {f"moult/data/{name}.py" for name in ("readers", "conversation", "language", "labels")}
    never |= {"moult/model/chat.py", "moult/workflow/config.py", "moult/workflow/stages.py", "moult/parallel.py"}
    assert not found & never


@pytest.mark.parametrize("path", [path for path in LIBRARY if path.startswith("moult/workflow/")])
def test_nothing_heavy_gets_into_what_snakemake_parses(path):
    """Not even inside a function: these modules are read in every job, and by people who look for what a job costs."""
    for name in imports(path, inside_functions=True):
        root = name.split(".")[0]
        light = root in sys.stdlib_module_names or root in ("moult", "yaml", "jsonschema", "tabulate")
        assert light, f"{path} imports {name}"


def imported_by_rules() -> set[str]:
    found = set()
    for rules in (ROOT / "rules").glob("*.smk"):
        found |= set(re.findall(r"^from (moult[\w.]+) import", rules.read_text(), re.MULTILINE))
    return {f"{module.replace('.', '/')}.py" for module in found}


def test_what_the_rules_import_is_brought_to_where_a_workflow_from_elsewhere_finds_it():
    """rules/code.smk names the modules; a module or a workflow from GitHub has no others (Snakemake's source cache)."""
    text = (ROOT / "rules" / "code.smk").read_text(encoding="utf-8")
    (workflow, others) = re.findall(r"^for module in \((.+)\):", text, re.MULTILINE)
    named = [f"moult/workflow/{name}.py" for name in re.findall(r'"(.+?)"', workflow)]
    named += [f"moult/{name}.py" for name in re.findall(r'"(.+?)"', others)]
    brought = set().union(
        *(closure(path, read) for path in [*named, "moult/workflow/code.py", "moult/workflow/functions.py"])
    )
    assert imported_by_rules() - brought == set()


def test_what_the_rules_import_imports_nothing_heavy():
    """The other modules that a rule file names may use libraries, inside functions that no rule calls."""
    named = imported_by_rules()
    assert {"moult/workflow/stages.py", "moult/data/readers.py"} <= named
    for module in named:
        for path in closure(module, read):
            for name in imports(path, inside_functions=False):
                root = name.split(".")[0]
                light = root in sys.stdlib_module_names or root in ("moult", "yaml", "jsonschema", "tabulate")
                assert light, f"{path} imports {name} at its top"


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_the_walls_between_the_rooms_hold(room):
    assert set(MAY_IMPORT) == {path.split("/")[1] for path in LIBRARY if path.count("/") == 2}
    for path in LIBRARY:
        if path.startswith(f"moult/{room}/"):
            names = imports(path, inside_functions=True)
            rooms = {name.split(".")[1] for name in names if name.startswith("moult.") and name.count(".") == 2}
            assert rooms <= MAY_IMPORT[room] | {room, "run"}, f"{path} reaches into {rooms}"


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_the_init_of_a_room_says_what_the_room_is_for_and_does_nothing(room):
    """It is in no code hash."""
    (statement,) = ast.parse(read(f"moult/{room}/__init__.py")).body
    assert isinstance(statement, ast.Expr) and isinstance(statement.value.value, str)


@pytest.mark.parametrize("path", sorted(path.relative_to(SCRIPTS).as_posix() for path in SCRIPTS.rglob("*.py")))
def test_a_file_has_at_most_500_lines(path):
    assert len(read(path).splitlines()) <= 500


def test_every_stage_has_a_script_a_rule_a_log_and_a_benchmark_of_its_name():
    rules = {path.stem: path.read_text() for path in (ROOT / "rules").glob("*.smk")}
    for stage, script in SCRIPT_OF.items():
        assert (SCRIPTS / f"{script}.py").is_file(), stage
        (home,) = [text for text in rules.values() if re.search(rf"^rule {stage}:$", text, re.MULTILINE)]
        body = re.search(rf"^rule {stage}:\n(.*?)(?=^rule |\Z)", home, re.MULTILINE | re.DOTALL)[1]
        assert f'script=script_of("{script}")' in body
        for kind in ("logs", "benchmarks"):
            folder = {
                "fetch_model": "models/{model}",
                "inspect_model": "models/{model}",
                "fetch_dataset": "datasets/{dataset}",
                "fetch_benchmark": "benchmarks/{benchmark}",
                "benchmark_base": "{run}/benchmark_base_{benchmark}",
                "benchmark_tuned": "{run}/benchmark_tuned_{benchmark}",
                "summary": "summary",
                "compare": "compare/{a}..{b}",
                "export_gguf": "{run}/export_{format}",
                "export_compressed": "{run}/export_{format}",
                "evaluate_export": "{run}/evaluate_export_{format}",
                "score_export": "{run}/score_export_{format}",
                "export_card": "{run}/export_card_{what}",
            }
            of_dataset = stage in ("prepare", "contamination")
            place = folder.get(stage, f"{{ds}}/{stage}" if of_dataset else f"{{run}}/{stage}")
            assert f'"<{kind}>/{place}.' in body, (stage, kind)
    named = set(re.findall(r'(?:script_of|settings|code_of)\("(\w+)"', "".join(rules.values())))
    targets = {"plans", "check_connectivity", "sweep", "rung"}  # of no one run
    assert named <= set(STAGES) | set(SCRIPT_OF.values()) | targets
