"""fetch_model and fetch_dataset against a hub of our own on the loopback interface."""

import errno
import json
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from fake_hub import TOKEN, FakeHub, FakeProxy, environment, make_certificate

from moult.errors import MoultError
from moult.files import sha256_file
from moult.network import hub_errors

ROOT = Path(__file__).parent.parent
ROWS = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(20)]
README = b"""---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train.jsonl}
  - {split: test, path: main/test.jsonl}
- config_name: socratic
  data_files:
  - {split: train, path: socratic/train.jsonl}
---
"""


def weights(size: int = 1000, name: str = "w", fill: bytes = b"\1") -> bytes:
    header = json.dumps({name: {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + fill * size


def model(**files: bytes) -> dict[str, bytes]:
    return {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}", "model.safetensors": weights(), **files}


def jsonl(rows: list[dict]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def dataset() -> dict[str, bytes]:
    train, test = jsonl(ROWS), jsonl(ROWS[:3])
    return {"README.md": README, "main/train.jsonl": train, "main/test.jsonl": test, "socratic/train.jsonl": train}


@pytest.fixture
def hub():
    with FakeHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    return make_certificate(tmp_path_factory.mktemp("tls"))


class Fetch:
    """Runs a stage as its rule does: a command line in an empty folder, with an environment of its own."""

    def __init__(self, folder: Path, hub: FakeHub):
        self.folder = folder
        self.environment = environment(folder / "home", HF_ENDPOINT=hub.url)

    def command(self, stage: str, *arguments: str) -> list[str]:
        return [sys.executable, str(ROOT / "scripts" / f"{stage}.py"), *arguments, "--log-file", "logs/fetch.log"]

    def run(self, command: list[str], **variables: str) -> subprocess.CompletedProcess:
        how = {"cwd": self.folder, "env": {**self.environment, **variables}, "capture_output": True, "text": True}
        return subprocess.run(command, **how, timeout=60)

    def model_command(self, name: str = "org/tiny", tls: str = "verify", **settings) -> list[str]:
        out = ("--out", "results/tiny", "--manifest", "results/tiny.json")
        return self.command("fetch_model", "--name", name, "--settings", json.dumps(settings), "--tls", tls, *out)

    def model(self, name: str = "org/tiny", tls: str = "verify", settings: dict | None = None, **variables: str):
        return self.run(self.model_command(name, tls, **(settings or {})), **variables)

    def dataset(self, name: str = "org/math", tls: str = "verify", settings: dict | None = None, **variables: str):
        settings = json.dumps({"id": name, "subset": "main", **(settings or {})})
        out = ("--out", "results/math.parquet", "--metadata", "results/math.json")
        return self.run(self.command("fetch_dataset", "--settings", settings, "--tls", tls, *out), **variables)

    def json(self, name: str) -> dict:
        return json.loads((self.folder / "results" / name).read_text())

    def files(self, folder: str) -> set[str]:
        root = self.folder / folder
        return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def fetch(tmp_path, hub):
    return Fetch(tmp_path, hub)


def assert_fails(result, what: str, fix: str = "") -> None:
    assert result.returncode == 1, result.stderr
    assert f"failed: {what}\n" in result.stderr
    assert f"what to do: {fix}" in result.stderr


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


def assert_written_nowhere(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert [path for path in files if "log" in path.name]
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []


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
            "org/tiny is an adapter, no model",
            "set model.name to the base model that it was made for",
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
    assert_fails(fetch.model(), f"org/tiny holds files that lead out of its folder: {name!r}", "do not use it")
    hub.add("dataset", "org/math", {"main/train.jsonl": b'{"a": 1}\n', name: b"{}"})
    assert_fails(fetch.dataset(), f"org/math holds files that lead out of its folder: {name!r}", "do not use it")
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
    assert_fails(fetch.model(), "a file arrived with the wrong length", "run again: whole files are kept")
    assert "tiny/config.json" not in fetch.files("results")
    assert not (fetch.folder / "results/tiny.json").exists()
    hub.wrong.clear()
    assert fetch.model().returncode == 0
    assert downloads(hub, "config.json") == 1
    assert fetch.files("results/tiny") == {"config.json", "tokenizer.json", "model.safetensors"}


def test_damaged_weights_are_noticed(hub, fetch):
    hub.add("model", "org/tiny", model())
    hub.wrong["model.safetensors"] = weights(fill=b"\2")
    assert_fails(fetch.model(), "model.safetensors has arrived damaged", "run again: the other files are kept")
    hub.wrong.clear()
    assert fetch.model().returncode == 0
    assert (fetch.folder / "results/tiny/model.safetensors").read_bytes() == weights()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_download_stops_at_once_and_goes_on(hub, fetch, number):
    commit = hub.add("model", "org/tiny", model(**{"model.safetensors": weights(40_000_000)}))
    hub.slow["model.safetensors"] = 6
    process = subprocess.Popen(
        fetch.model_command(), cwd=fetch.folder, env=fetch.environment, stderr=subprocess.DEVNULL
    )
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
    assert_fails(
        result, "org/tiny needs 0.0 GB more, and the disk of results has 0.0 GB", "make room, or set paths.results"
    )
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
        "check model.name; for a private one set HF_TOKEN; if a local copy was meant, there is none at ./org/missing",
    )


def test_unknown_name_with_a_token(hub, fetch):
    result = fetch.model("org/missing", HF_TOKEN=TOKEN)
    assert_fails(result, "the hub has no model org/missing, or does not show it to the account of your token")


def test_token_that_is_not_valid(hub, fetch):
    hub.add("model", "org/tiny", model())
    result = fetch.model(HF_TOKEN="hf_expired")
    assert_fails(
        result,
        "the hub does not accept the token from HF_TOKEN: it is mistyped, expired or revoked",
        f"make a new one on {hub.url}/settings/tokens; what is public needs none",
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
    assert_fails(result, "org/tiny has no revision v3; there are: main, v2", "set model.revision to one that it has")


def test_name_that_no_hub_could_have(hub, fetch):
    result = fetch.model("org/tiny--two")
    assert_fails(
        result,
        "model.name: org/tiny--two is neither a path on this machine nor a name that the hub could have",
        "check",
    )


def test_hub_out_of_order(hub, fetch):
    hub.status = 503
    assert_fails(fetch.model(), "the hub answers 503 for org/tiny", "if that stays, look at")


def test_login_page_instead_of_the_hub(hub, fetch):
    hub.page = b"<html>Welcome to our hotel</html>"
    assert_fails(
        fetch.model(), f"what answers at 127.0.0.1:{hub.port} is not the hub", "is it a login page of the network?"
    )


# --- the way to the hub -----------------------------------------------------------------------------------------------

ELSEWHERE = "run this step on a machine with network, or put a copy into the folder paths.models"


def test_no_name_resolution(fetch):
    result = fetch.model(HF_ENDPOINT="http://hub.invalid")
    assert_fails(result, "no network: the name of hub.invalid cannot be resolved", ELSEWHERE)


def test_nothing_listens(fetch):
    result = fetch.model(HF_ENDPOINT="http://127.0.0.1:1")
    assert_fails(result, "no connection to 127.0.0.1:1: [Errno 111] Connection refused", ELSEWHERE)


def test_hub_that_never_answers(hub, fetch):
    hub.mute = 30
    started = time.monotonic()
    result = fetch.model(HF_HUB_ETAG_TIMEOUT="1")
    assert_fails(result, f"no answer from 127.0.0.1:{hub.port} in time", f"try again; {ELSEWHERE}")
    assert time.monotonic() - started < 10


def test_no_call_of_the_hubs_client_waits_without_end(hub, fetch):
    hub.mute = 30
    code = "import moult.network as network; network.READ_TIMEOUT = 0.5; network.set_up_hub('verify')\n"
    code += f"from huggingface_hub import get_session; get_session().get('{hub.url}', timeout=None)"
    result = fetch.run([sys.executable, "-c", code], PYTHONPATH=str(ROOT / "scripts"))
    assert "ReadTimeout" in result.stderr


def test_offline_switch_is_named(hub, fetch):
    result = fetch.model(HF_HUB_OFFLINE="1")
    what = "org/tiny would have to come from the hub, and HF_HUB_OFFLINE forbids that"
    assert_fails(result, what, "unset HF_HUB_OFFLINE for this step, or put a copy into the folder paths.models")
    assert hub.requests == []


def test_proxy_that_refuses(fetch):
    with FakeProxy(403) as proxy:
        result = fetch.model(HF_ENDPOINT="https://hub.invalid", HTTPS_PROXY=proxy.url)
        assert_fails(result, f"the proxy {proxy.url} refuses: 403 Forbidden", "check HTTPS_PROXY and NO_PROXY")
    assert proxy.asked == [("hub.invalid:443", None)]


def test_proxy_that_lets_through(fetch, certificate):
    with FakeProxy() as proxy, FakeHub(tls=certificate) as hub:
        hub.add("model", "org/tiny", model())
        url = proxy.url.replace("//", "//me:secret-word@")
        result = fetch.model(tls=str(certificate.ca), HF_ENDPOINT=hub.url, HTTPS_PROXY=url)
    assert result.returncode == 0, result.stderr
    assert set(proxy.asked) == {(f"127.0.0.1:{hub.port}", "Basic bWU6c2VjcmV0LXdvcmQ=")}


def test_password_of_the_proxy_is_not_shown(fetch):
    with FakeProxy(403) as proxy:
        url = proxy.url.replace("//", "//me:secret-word@")
        result = fetch.model(HF_ENDPOINT="https://hub.invalid", HTTPS_PROXY=url)
    assert "the proxy http://***@127.0.0.1" in result.stderr
    assert "secret-word" not in (fetch.folder / "logs/fetch.log").read_text()


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_tls(fetch, certificate, kind):
    with FakeHub(tls=certificate) as hub:
        hub.add("model", "org/tiny", model())
        hub.add("dataset", "org/math", dataset())
        run = getattr(fetch, kind)
        result = run(HF_ENDPOINT=hub.url)
        what = f"the certificate that 127.0.0.1:{hub.port} shows is not trusted: unable to get local issuer certificate"
        assert_fails(result, what, "a proxy that opens TLS? Give its CA certificate: network.tls: /path/to/ca.pem")
        assert hub.requests == []

        assert run(tls=str(certificate.ca), HF_ENDPOINT=hub.url).returncode == 0
        assert run(SSL_CERT_FILE=str(certificate.ca), HF_ENDPOINT=hub.url).returncode == 0
        assert run(REQUESTS_CA_BUNDLE=str(certificate.ca), HF_ENDPOINT=hub.url).returncode == 0

        result = run(tls="off", HF_ENDPOINT=hub.url)
        assert result.returncode == 0, result.stderr
        assert "network.tls is off: NO CERTIFICATE IS CHECKED" in result.stderr


def test_wrong_ca_file_is_not_enough(fetch, certificate, tmp_path):
    other = make_certificate(tmp_path / "other")
    with FakeHub(tls=certificate) as hub:
        result = fetch.model(tls=str(other.ca), HF_ENDPOINT=hub.url)
        assert_fails(
            result,
            f"the certificate that 127.0.0.1:{hub.port} shows is not trusted: unable to get local issuer certificate",
        )


def test_ca_file_that_is_none(fetch, tmp_path):
    result = fetch.model(tls="/nowhere/ca.pem")
    assert_fails(
        result, "network.tls: /nowhere/ca.pem does not exist", "network.tls may name a file of CA certificates (PEM)"
    )
    (tmp_path / "ca.pem").write_text("no certificate")
    result = fetch.model(tls="ca.pem")
    assert_fails(
        result, "network.tls: ca.pem cannot be used: it holds no certificate in PEM format", "a CA file has lines"
    )
    result = fetch.model(SSL_CERT_FILE="/nowhere/ca.pem")
    assert_fails(result, "SSL_CERT_FILE: /nowhere/ca.pem does not exist")


# --- datasets ---------------------------------------------------------------------------------------------------------


def test_dataset_becomes_parquet(hub, fetch):
    import pyarrow.parquet

    commit = hub.add("dataset", "org/math", dataset())
    result = fetch.dataset(settings={"split": "train"})
    assert result.returncode == 0, result.stderr
    out = fetch.folder / "results/math.parquet"
    assert pyarrow.parquet.read_table(out).to_pylist() == ROWS
    assert fetch.files("results") == {"math.parquet", "math.json"}
    assert fetch.json("math.json") == {
        "schema_version": 1,
        "id": "org/math",
        "subset": "main",
        "split": "train",
        "revision": None,
        "commit": commit,
        "rows": 20,
        "columns": ["question", "answer"],
        "sha256": sha256_file(out),
    }


def test_dataset_split_and_slice(hub, fetch):
    hub.add("dataset", "org/math", dataset())
    assert fetch.dataset(settings={"split": "train[:5]+test"}).returncode == 0
    assert fetch.json("math.json")["rows"] == 8


def test_dataset_fills_no_cache_in_the_home_unless_hf_home_says_so(hub, fetch):
    hub.add("dataset", "org/math", dataset())
    assert fetch.dataset(HF_TOKEN=TOKEN).returncode == 0
    assert any(file.endswith("main/train.jsonl") for file in fetch.files("home/hf/hub"))
    assert not any(file.endswith(".arrow") for file in fetch.files("home"))
    assert_written_nowhere(fetch.folder)
    del fetch.environment["HF_HOME"]
    assert fetch.dataset(XDG_CACHE_HOME=str(fetch.folder / "xdg")).returncode == 0
    assert fetch.files("xdg") == set()


@pytest.mark.parametrize(
    ("settings", "what", "fix"),
    [
        ({"subset": "mian"}, "org/math has no subset mian; there are: main, socratic", "set datasets.<name>.subset"),
        (
            {"subset": None},
            "org/math consists of subsets, and none is named; there are: main, socratic",
            "set datasets.<name>.subset",
        ),
        ({"split": "val"}, "org/math has no split val; there are: train, test", "set datasets.<name>.split"),
        ({"revision": "v9"}, "org/math has no revision v9; there are: main", "set datasets.<name>.revision to one"),
    ],
)
def test_dataset_settings_that_are_not_there(hub, fetch, settings, what, fix):
    hub.add("dataset", "org/math", dataset())
    assert_fails(fetch.dataset(settings=settings), what, fix)
    assert not [path for path in hub.paths("GET") if path.endswith(".jsonl")], "nothing is downloaded first"


def test_dataset_that_is_a_script(hub, fetch):
    hub.add("dataset", "org/math", {"math.py": b"import datasets", "README.md": b""})
    result = fetch.dataset()
    assert_fails(
        result, "org/math is a Python script (math.py), which datasets no longer runs", "take a copy in Parquet"
    )


def test_dataset_without_data(hub, fetch):
    hub.add("dataset", "org/math", {"README.md": b""})
    result = fetch.dataset(settings={"subset": None})
    assert_fails(result, "org/math holds no data files that can be read", "look at its page on the hub")


def test_dataset_of_files_with_different_columns(hub, fetch):
    hub.add("dataset", "org/math", {"a.jsonl": jsonl([{"a": 1}]), "b.jsonl": jsonl([{"b": 1}])})
    result = fetch.dataset(settings={"subset": None})
    assert result.returncode == 1
    assert "org/math: its files do not make one table: Couldn't cast" in result.stderr
    assert "because column names don't match" in result.stderr


def test_gated_and_missing_datasets(hub, fetch):
    hub.add("dataset", "org/math", dataset(), gated=True)
    result = fetch.dataset()
    what = "org/math is gated: its owners decide who may download it"
    assert_fails(result, what, f"accept its terms on {hub.url}/datasets/org/math, and set HF_TOKEN")
    result = fetch.dataset("org/missing")
    what = "the hub has no dataset org/missing, or does not show it without a token"
    assert_fails(result, what, "check datasets.<name>.source; for a private one set HF_TOKEN")


# --- the rules --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rules_fetch_once(hub, fetch):
    hub.add("model", "org/tiny", model(), private=True)
    hub.add("dataset", "org/math", dataset())
    math = {"source": "org/math", "subset": "main", "columns": {"prompt": "question", "completion": "answer"}}
    again = {"source": ["org/math"], "subset": "main"}
    config = {"model": {"name": "org/tiny"}, "datasets": {"math": math, "again": again}}
    targets = ["results/models/org--tiny.json", f"results/datasets/{dataset_slug()}.parquet"]

    def snakemake(*arguments: str) -> str:
        (fetch.folder / "config.yaml").write_text(yaml.safe_dump(config))
        where = ["--snakefile", str(ROOT / "Snakefile"), "--directory", str(fetch.folder), "--cores", "1"]
        command = [sys.executable, "-m", "snakemake", *targets, *arguments, *where, "--configfile", "config.yaml"]
        result = fetch.run(command, HF_TOKEN=TOKEN)
        assert result.returncode == 0, result.stderr
        return result.stdout + result.stderr

    snakemake("results/prepared/math/metadata.json")
    assert fetch.json("models/org--tiny.json")["commit"]
    assert fetch.json(f"datasets/{dataset_slug()}.json")["rows"] == 20
    assert fetch.json("prepared/math/metadata.json")["ledger"]["read"] == 20
    assert_written_nowhere(fetch.folder)
    seen = len(hub.requests)
    config["network"] = {"tls": "off"}
    config["model"]["trust_remote_code"] = True
    assert "Nothing to be done" in snakemake()
    assert len(hub.requests) == seen
    config["model"]["revision"] = "main"
    targets[0] = "results/models/org--tiny@main.json"
    assert "fetch_model" in snakemake("--dry-run")


def dataset_slug() -> str:
    from moult.workflow.config import dataset_slug

    return dataset_slug({"subset": "main", "split": "train", "revision": None}, "org/math")
