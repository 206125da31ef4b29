"""What a container sees, with the real Apptainer: no more than it needs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from apptainer import NOBODY, contained, give_to_nobody
from workflow import ROOT, checkout, write_rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("apptainer"), reason="Apptainer is not installed"),
]


PROBE = """
import json, os, sys
from pathlib import Path

def try_to_write(path):
    try:
        Path(path, "written").touch()
        return True
    except OSError:
        return False

looked_for = json.loads(sys.argv[1])
json.dump(
    {
        "environment": dict(os.environ),
        "python": sys.path,
        "seen": [path for path in looked_for if os.path.exists(path)],
        "written": [path for path in looked_for if os.path.isdir(path) and try_to_write(path)],
        "tmp": sorted(os.listdir("/tmp")),
    },
    open("results/probe.json", "w"),
)
"""


def probe(folder: Path, config: dict, paths: list, environment=()) -> dict:
    """What a rule of ours finds in its container: which of `paths` there are, and which can be written into."""
    (folder / "probe.py").write_text(PROBE)
    (folder / "mine.yaml").write_text(yaml.safe_dump(config))
    with (folder / "Snakefile").open("a") as file:
        file.write(f"\nrule probe:\n    params: paths={json.dumps(list(map(str, paths)))!r},\n")
        file.write("    shell: 'python probe.py {params.paths:q}'\n")
    contained(folder, "probe", "--configfile", "mine.yaml", environment=environment)
    return json.loads((folder / "results" / "probe.json").read_text())


def test_the_container_sees_what_it_needs_and_nothing_else(folder, tmp_path, poisoned):
    for name in ("home/.ssh", "home/.cache/huggingface", "data", "models/org/m", "hub", "store/results", "bystander"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("home/.ssh/id", "home/.cache/huggingface/token", "data/rows.jsonl", "data/other", "template.jinja"):
        (tmp_path / name).touch()
    (folder / "results").symlink_to(tmp_path / "store/results")
    config = {
        "model": {"name": "org/m", "chat_template": str(tmp_path / "template.jinja")},
        "datasets": {"demo": None, "d": {"source": "~/../data/rows.jsonl"}},
        "paths": {"models": str(tmp_path / "models")},
    }
    (folder / "here").mkdir()
    readable = ["data/rows.jsonl", "models/org/m", "template.jinja", "home/.cache/huggingface/token"]
    writable = ["hub", "store/results", "moult/here", "home"]
    hidden = ["home/.ssh", "data/other", "bystander", "store/other"]
    told = {
        "HF_HOME": str(tmp_path / "hub"),
        "HF_TOKEN_PATH": str(tmp_path / "home/.cache/huggingface/token"),
        "CUDA_VISIBLE_DEVICES": "3",
        "SLURM_JOB_ID": "17",
        "RANK": "0",
        "OMP_NUM_THREADS": "1",
    }
    environment = {"HOME": str(tmp_path / "home"), "PYTHONPATH": poisoned["PYTHONPATH"], "OTHER": "x", **told}
    looked_for = [tmp_path / name for name in (*readable, *writable, *hidden)]
    found = probe(folder, config, looked_for, environment)

    def names(paths):
        return {str(Path(path).relative_to(tmp_path)) for path in paths}

    assert names(found["seen"]) == {*readable, *writable}
    assert names(found["written"]) == set(writable)
    assert not (tmp_path / "home" / "written").exists(), "that was to be a home of the container's own"
    assert {name: found["environment"].get(name) for name in told} == told
    assert found["environment"]["HOME"] == environment["HOME"]
    assert not {"PYTHONPATH", "PYTHONHOME", "OTHER", "VIRTUAL_ENV"} & found["environment"].keys()
    assert str(poisoned["PYTHONPATH"]) not in found["python"] and not (folder / "poisoned.txt").read_text().count(
        "/opt/"
    )
    assert all(path.startswith((str(folder), "/usr/lib", "/opt/moult")) for path in found["python"])
    # Folders on the way to what is mounted there, and nothing of the machine's.
    assert set(found["tmp"]) <= {tmp_path.parts[2]} if tmp_path.is_relative_to("/tmp") else not found["tmp"]


def test_the_hosts_libraries_do_not_get_in(folder, poisoned):
    """Without the clean environment the container would have it: Apptainer drops LD_LIBRARY_PATH, and it is not passed on."""
    found = probe(folder, {}, [], {"APPTAINERENV_OWN": "mine"})
    assert found["environment"]["LD_LIBRARY_PATH"] == "/.singularity.d/libs"
    assert found["environment"]["OWN"] == "mine"  # what a user says to Apptainer stands
    assert found["environment"]["PYTHONNOUSERSITE"] == "1" and found["environment"]["PATH"].startswith(
        "/opt/moult/bin:"
    )


def test_data_and_a_model_outside_of_the_checkout(folder, tmp_path):
    """By a path, by `~`, through links; up to the token ids."""
    rows = [{"prompt": f"How many is {n} and {n}, please tell me?", "completion": f"It is {2 * n}."} for n in range(40)]
    (tmp_path / "home").mkdir()
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data", rows[:20])
    write_rows(tmp_path / "home", rows[20:], "more.jsonl")
    (folder / "linked.jsonl").symlink_to(tmp_path / "data" / "rows.jsonl")
    shutil.copytree(folder / "config/demo/base", tmp_path / "models/org/base")
    (tmp_path / "home/chatml.jinja").write_text((folder / "config/chat_templates/chatml.jinja").read_text())
    config = {
        "model": {"name": "org/base", "chat_template": "~/chatml.jinja"},
        "datasets": {"d": {"source": ["linked.jsonl", "~/more.jsonl"]}},
        "paths": {"models": str(tmp_path / "models"), "results": str(tmp_path / "out" / "results")},
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(config))
    report = tmp_path / "out/results/d/tokens/report.json"
    environment = {"HOME": str(tmp_path / "home")}
    contained(folder, str(report), "--configfile", "mine.yaml", environment=environment)
    assert json.loads((tmp_path / "out/results/prepared/d/metadata.json").read_text())["ledger"]["read"] == 40
    assert report.exists() and not (tmp_path / "home" / ".cache").exists()


def test_in_a_folder_of_the_home_and_as_a_module(sif, tmp_path):
    """Snakemake then keeps its copies of our scripts below the home, which the container sees otherwise empty."""
    ours = checkout(tmp_path / "moult")
    own = tmp_path / "home" / "own"
    own.mkdir(parents=True)
    rows = [{"prompt": f"How many is {n} and {n}, please tell me?", "completion": f"It is {2 * n}."} for n in range(40)]
    write_rows(own, rows)
    (own / "Snakefile").write_text(
        f"""
module moult:
    snakefile: {str(ours / "Snakefile")!r}
    config: {{"model": {{"name": "a/model"}}, "datasets": {{"d": {{"source": "rows.jsonl"}}}}, "container": {str(sif)!r}}}

use rule * from moult as moult_*
"""
    )
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--cores",
        "1",
        "--use-singularity",
        "results/prepared/d/metadata.json",
    ]
    environment = {**os.environ, "HOME": str(own.parent), "XDG_CACHE_HOME": str(own.parent / ".cache")}
    done = subprocess.run(command, cwd=own, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "Activating singularity image" in done.stderr, done.stderr[-3000:]


def test_for_a_user_without_rights(sif, open_folder, monkeypatch):
    """Apptainer then works in a name space of the user's; home and checkout are mounted into one another all the same."""
    from moult.workflow.config import load_schema, resolve
    from moult.workflow.container import environment as environment_of

    folder = open_folder / "user"
    for name in ("home/checkout", "data"):
        (folder / name).mkdir(parents=True)
    for name in ("home/secret", "data/rows.jsonl", "data/secret"):
        (folder / name).touch()
    shutil.copy(sif, folder / "image.sif")
    monkeypatch.chdir(folder / "home" / "checkout")
    monkeypatch.setenv("HOME", str(folder / "home"))
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    config = {"model": {"name": "m"}, "datasets": {"d": {"source": str(folder / "data/rows.jsonl")}}}
    variables = environment_of(resolve(config, load_schema(str(ROOT / "config"))), ["results"], folder / "scratch")
    give_to_nobody(folder)
    script = "ls ~ ../../data; touch results/made /tmp/made; touch ../../data/rows.jsonl 2>&1 | grep -o Read-only.*"
    command = ["apptainer", "exec", "--home", str(Path.cwd()), folder / "image.sif", "bash", "-c"]
    command.append(f"export HOME={folder}/home; {script}")
    environment = {**variables, "PATH": os.environ["PATH"], "HOME": str(folder / "home")}
    done = subprocess.run(command, capture_output=True, text=True, user=NOBODY, group=NOBODY, env=environment)
    said = done.stdout.replace(str(folder), "").split("\n")
    assert said == ["../../data:", "rows.jsonl", "", "/home:", "checkout", "Read-only file system", ""], done
    assert Path("results/made").exists() and (folder / "scratch/tmp/made").exists()
