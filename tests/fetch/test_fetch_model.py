"""fetch_model against a hub of our own on the loopback interface."""

import errno
import json
import signal
import subprocess
import time

import pytest
from fake_hub import TOKEN, FakeHub
from fetching import assert_fails, assert_written_nowhere, model, weights
from workflow import ROOT, hear_sigint

from moult.errors import MoultError
from moult.files import sha256_file
from moult.network import hub_errors

# --- models -----------------------------------------------------------------------------------------------------------


def test_model_is_fetched_whole_and_only_what_it_consists_of(hub, fetch):
    spare = {
        "pytorch_model.bin": b"x",
        "consolidated.safetensors": weights(),
        "onnx/model.onnx": b"x",
        ".gitattributes": b"",
    }
    commit = hub.add("model", "org/tiny", model(**spare))
    result = fetch.model()
    assert result.returncode == 0, result.stderr
    assert fetch.files("results") == {"tiny.json", "tiny/config.json", "tiny/tokenizer.json", "tiny/model.safetensors"}
    manifest = fetch.json("tiny.json")
    assert manifest["commit"] == commit
    assert manifest["folder"] is None
    assert set(manifest["files"]) == {"config.json", "tokenizer.json", "model.safetensors"}
    assert manifest["files"]["model.safetensors"] == sha256_file(fetch.folder / "results/tiny/model.safetensors")
    assert not [path for path in hub.paths("GET") if any(name in path for name in spare)]
    assert fetch.files("home") == set(), "nothing outside of the results"


def test_revision_is_resolved_and_recorded(hub, fetch):
    hub.add("model", "org/tiny", model())
    second = hub.add("model", "org/tiny", model(**{"config.json": b'{"model_type": "llama", "new": 1}'}), revision="v2")
    assert fetch.model(settings={"revision": "v2"}).returncode == 0
    assert fetch.json("tiny.json")["commit"] == second
    assert "new" in fetch.json("tiny/config.json")


def test_sharded_model_takes_the_files_of_its_index(hub, fetch):
    shards = {f"model-0000{n}-of-00002.safetensors": weights(name=f"w{n}") for n in (1, 2)}
    index = {"weight_map": {f"w{n}": f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}}
    files = model(
        **shards, **{"model.safetensors.index.json": json.dumps(index).encode(), "model.fp16.safetensors": b"x"}
    )
    del files["model.safetensors"]
    hub.add("model", "org/tiny", files)
    assert fetch.model().returncode == 0
    assert {file for file in fetch.files("results/tiny") if file.endswith(".safetensors")} == set(shards)


def test_a_single_file_beside_shards_is_the_one_that_is_downloaded(hub, fetch):
    """As transformers chooses, which would load it."""
    shards = {f"model-0000{n}-of-00002.safetensors": weights(name=f"w{n}") for n in (1, 2)}
    index = {"weight_map": {f"w{n}": f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}}
    hub.add("model", "org/tiny", model(**shards, **{"model.safetensors.index.json": json.dumps(index).encode()}))
    assert fetch.model().returncode == 0
    assert {file for file in fetch.files("results/tiny") if file.endswith(".safetensors")} == {"model.safetensors"}
    assert fetch.json("tiny.json")["ignored"] == ["model.safetensors.index.json"]


@pytest.mark.parametrize("variable", ["HF_TOKEN", "HUGGINGFACE_HUB_TOKEN"])
def test_token_is_sent_to_the_hub_alone_and_written_nowhere(hub, fetch, variable):
    hub.add("model", "org/tiny", model(), private=True)
    hub.elsewhere = True
    assert fetch.model(**{variable: TOKEN}).returncode == 0
    sent = {path.startswith("/elsewhere/"): authorization for _, path, authorization in hub.requests}
    assert sent == {False: f"Bearer {TOKEN}", True: None}
    assert_written_nowhere(fetch.folder)
    assert "Signature=" not in (fetch.folder / "logs/fetch.log").read_text(), "signed addresses are secrets, too"
    hub.status = 500  # the log of a failure holds the values of all variables
    assert fetch.model(**{variable: TOKEN}).returncode == 1
    assert_written_nowhere(fetch.folder)


@pytest.mark.parametrize(
    ("files", "what", "fix"),
    [
        (
            {"pytorch_model.bin": b"x" * 10},
            "org/tiny has no safetensors weights, only: pytorch_model.bin",
            "choose a repo",
        ),
        ({"tiny.Q4.gguf": b"x"}, "org/tiny has no safetensors weights, only: tiny.Q4.gguf", "choose a repository"),
        (
            {"adapter_config.json": b"{}", "adapter_model.safetensors": weights()},
            "org/tiny is an adapter, not a model",
            "set model.name to the base model of this adapter",
        ),
    ],
)
def test_repository_without_safetensors_is_refused_before_the_download(hub, fetch, files, what, fix):
    hub.add("model", "org/tiny", {"config.json": b"{}", **files})
    assert_fails(fetch.model(), what, fix)
    assert not [path for path in hub.paths("GET") if "/resolve/" in path]


@pytest.mark.parametrize("name", ["../../evil.json", "/evil.json", "a/../../../evil.json", "..\\evil.json"])
def test_files_that_lead_out_of_the_folder_are_refused(hub, fetch, name):
    hub.add("model", "org/tiny", model(**{name: b"{}"}))
    assert_fails(
        fetch.model(), f"org/tiny has files that would be written outside its folder: {name!r}", "do not use it"
    )
    hub.add("dataset", "org/math", {"main/train.jsonl": b'{"a": 1}\n', name: b"{}"})
    assert_fails(
        fetch.dataset(), f"org/math has files that would be written outside its folder: {name!r}", "do not use it"
    )
    assert not [path for path in hub.paths("GET") if "/resolve/" in path]
    assert not list(fetch.folder.parent.rglob("*evil*"))


def test_code_of_a_model_must_be_allowed_and_the_download_is_kept(hub, fetch):
    config = json.dumps({"auto_map": {"AutoModel": "modeling.Tiny"}}).encode()
    hub.add("model", "org/tiny", model(**{"config.json": config, "modeling.py": b"pass"}))
    result = fetch.model()
    assert_fails(
        result, "org/tiny: the model brings its own Python code (modeling.Tiny)", "read that code, then allow it"
    )
    assert fetch.model(settings={"trust_remote_code": True}).returncode == 0
    assert downloads(hub, "model.safetensors") == 1


def test_local_folder_is_looked_at_in_place(tmp_path, hub, fetch):
    (tmp_path / "base").mkdir()
    for name, data in model().items():
        (tmp_path / "base" / name).write_bytes(data)
    inspect = ("--name", "base", "--folder", "base", "--manifest", "results/base.json")
    assert fetch.run(fetch.command("inspect_model", *inspect)).returncode == 0
    assert fetch.json("base.json")["folder"] == "base"
    assert fetch.json("base.json")["commit"] is None
    assert hub.requests == []


# --- cut off and taken up again ---------------------------------------------------------------------------------------


def downloads(hub: FakeHub, file: str) -> int:
    return len([path for path in hub.paths("GET") if path.endswith(f"/{file}")])


def test_file_of_wrong_length_fails_and_the_next_run_goes_on(hub, fetch):
    hub.add("model", "org/tiny", model())
    hub.wrong["model.safetensors"] = weights()[:500]
    assert_fails(fetch.model(), "a downloaded file has the wrong length", "run again: finished files are kept")
    assert "tiny/config.json" not in fetch.files("results")
    assert not (fetch.folder / "results/tiny.json").exists()
    hub.wrong.clear()
    assert fetch.model().returncode == 0
    assert downloads(hub, "config.json") == 1
    assert fetch.files("results/tiny") == {"config.json", "tokenizer.json", "model.safetensors"}


def test_damaged_weights_are_noticed(hub, fetch):
    hub.add("model", "org/tiny", model())
    hub.wrong["model.safetensors"] = weights(fill=b"\2")
    assert_fails(fetch.model(), "the download of model.safetensors is damaged", "run again: the other files are kept")
    hub.wrong.clear()
    assert fetch.model().returncode == 0
    assert (fetch.folder / "results/tiny/model.safetensors").read_bytes() == weights()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_download_stops_at_once_and_goes_on(hub, fetch, number):
    commit = hub.add("model", "org/tiny", model(**{"model.safetensors": weights(40_000_000)}))
    hub.slow["model.safetensors"] = 6
    how = {"cwd": fetch.folder, "env": fetch.environment, "stderr": subprocess.DEVNULL, "preexec_fn": hear_sigint}
    process = subprocess.Popen(fetch.model_command(), **how)
    while not downloads(hub, "model.safetensors"):
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait() == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    partial = fetch.folder / "results/tiny.partial"
    assert (partial / commit / "config.json").exists()
    assert not (partial / commit / "model.safetensors").exists(), "it has waited for the end of the file"
    hub.slow.clear()
    assert fetch.model().returncode == 0
    assert downloads(hub, "config.json") == 1
    assert not partial.exists()
    assert fetch.files("results/tiny") == {"config.json", "tokenizer.json", "model.safetensors"}


def test_partial_download_of_another_commit_is_not_mixed_in(hub, fetch):
    hub.add("model", "org/tiny", model(**{"old.txt": b"old"}))
    hub.wrong["model.safetensors"] = b""
    assert fetch.model().returncode == 1
    hub.wrong.clear()
    hub.repositories.clear()
    hub.add("model", "org/tiny", model(**{"tokenizer.json": b'{"new": 1}'}))
    assert fetch.model().returncode == 0
    assert fetch.files("results/tiny") == {"config.json", "tokenizer.json", "model.safetensors"}
    assert fetch.json("tiny/tokenizer.json") == {"new": 1}


def test_disk_that_is_too_small_for_the_model(hub, fetch):
    hub.add("model", "org/tiny", model(**{"model.safetensors": weights(3_000_000)}))
    command = fetch.model_command()
    code = (
        "import shutil, sys, fetch_model; shutil.disk_usage = lambda path: shutil._ntuple_diskusage(9, 9, 1_000_000);"
    )
    command[1:2] = ["-c", f"{code} fetch_model.main()"]
    result = fetch.run(command, PYTHONPATH=str(ROOT / "scripts"))
    assert_fails(result, "org/tiny needs 0.0 GB more, but results has 0.0 GB free", "free space, or set paths.results")
    assert downloads(hub, "model.safetensors") == 0


def test_disk_that_fills_up():
    with pytest.raises(MoultError, match="the disk is full"), hub_errors("model.name", "org/tiny"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_other_errors_are_left_as_they_are():
    with pytest.raises(ZeroDivisionError), hub_errors("model.name", "org/tiny"):
        _ = 1 / 0


# --- what the hub refuses ---------------------------------------------------------------------------------------------


def test_unknown_name_without_a_token(hub, fetch):
    assert_fails(
        fetch.model("org/missing"),
        "the hub has no model org/missing, or does not show it without a token",
        "check model.name; if it is private, set HF_TOKEN; if you meant a local folder: ./org/missing does not exist",
    )


def test_unknown_name_with_a_token(hub, fetch):
    result = fetch.model("org/missing", HF_TOKEN=TOKEN)
    assert_fails(result, "the hub has no model org/missing, or does not show it to the account of your token")


def test_token_that_is_not_valid(hub, fetch):
    hub.add("model", "org/tiny", model())
    result = fetch.model(HF_TOKEN="hf_expired")
    assert_fails(
        result,
        "the hub does not accept the token from HF_TOKEN: it is wrong, expired or revoked",
        f"create a new one on {hub.url}/settings/tokens; public repositories do not need a token",
    )


@pytest.mark.parametrize("variables", [{}, {"HF_TOKEN": TOKEN}])
def test_gated_model(hub, fetch, variables):
    hub.add("model", "org/tiny", model(), gated=True)
    assert_fails(
        fetch.model(**variables),
        "org/tiny is gated: its owners decide who may download it",
        f"accept its terms on {hub.url}/org/tiny, and set HF_TOKEN to a token of that account",
    )


def test_unknown_revision_names_those_there_are(hub, fetch):
    hub.add("model", "org/tiny", model())
    hub.add("model", "org/tiny", model(), revision="v2")
    result = fetch.model(settings={"revision": "v3"})
    assert_fails(
        result,
        "org/tiny has no revision v3; it has: main, v2",
        "set model.revision to one of its branches, tags or commits",
    )


def test_name_that_no_hub_could_have(hub, fetch):
    result = fetch.model("org/tiny--two")
    assert_fails(
        result,
        "model.name: org/tiny--two is neither a path on this machine nor a valid name on the hub",
        "check",
    )


def test_hub_out_of_order(hub, fetch):
    hub.status = 503
    assert_fails(fetch.model(), "the hub answers with status 503 for org/tiny", "try again later")


def test_login_page_instead_of_the_hub(hub, fetch):
    hub.page = b"<html>Welcome to our hotel</html>"
    assert_fails(
        fetch.model(), f"the server at 127.0.0.1:{hub.port} is not the hub", "check HF_ENDPOINT; is it the login page"
    )
