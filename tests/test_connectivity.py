"""check_connectivity: each thing that can be wrong between here and the hub, and what it says of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fake_hub import TOKEN, FakeHub, FakeProxy, environment, make_certificate

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "check_connectivity.py"
FILES = {"config.json": b"{}", "model.safetensors": b"weights"}


@pytest.fixture
def hub():
    with FakeHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def check(tmp_path):
    """check(hub or address, ...) -> (exit code, the lines on the console without their times)."""

    def run(hub, models=(), datasets=(), tls: str = "verify", **variables: str) -> tuple[int, list[str]]:
        entries = {"models": models, "datasets": datasets}
        settings = {
            kind: [{"name": name, "revision": revision} for name, revision in entries[kind]] for kind in entries
        }
        address = hub if isinstance(hub, str) else hub.url
        result = subprocess.run(
            [sys.executable, str(SCRIPT), "--settings", json.dumps(settings), "--tls", tls],
            cwd=tmp_path,
            env=environment(tmp_path, HF_ENDPOINT=address, **variables),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert TOKEN not in result.stderr + (tmp_path / "logs/check_connectivity.log").read_text()
        return result.returncode, [line.split(maxsplit=2)[2] for line in result.stderr.splitlines()]

    return run


def assert_stops(outcome: tuple[int, list[str]], step: str, what: str, fix: str) -> None:
    """That `step` has failed with exactly this, all before it are OK, and none comes after it."""
    code, lines = outcome
    assert code == 1
    assert lines[-3] == f"FAIL  {step}: {what} -> {fix}"
    assert all(line.startswith("OK    ") for line in lines[:-3])
    assert lines[-2] == f"check_connectivity failed: failed: {step}"


# --- all is well ------------------------------------------------------------------------------------------------------


def test_all_ok(hub, check, tmp_path):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password wrong")  # requests would send this
    hub.add("model", "org/tiny", FILES)
    hub.add("dataset", "org/math", {"train.jsonl": b"{}"}, revision="v1", private=True)
    code, lines = check(hub, [("org/tiny", None)], [("org/math", "v1")], HF_TOKEN=TOKEN)
    here = f"127.0.0.1:{hub.port}"
    assert lines == [
        f"OK    endpoint: {hub.url} (HF_ENDPOINT)",
        "OK    proxy: none",
        "OK    DNS: 127.0.0.1 is 127.0.0.1",
        f"OK    TCP: {here} answers",
        "OK    TLS: not used: the address is http://",
        "OK    HTTP: the hub answers",
        "OK    token: the token from HF_TOKEN is valid and belongs to tester",
        f"OK    model org/tiny: can be downloaded from {here}",
        f"OK    dataset org/math: can be downloaded from {here}",
    ]
    assert code == 0
    assert [authorization for _, _, authorization in hub.requests] == [None] + [f"Bearer {TOKEN}"] * 5


def test_without_a_token(hub, check):
    code, lines = check(hub)
    assert code == 0
    assert lines[-1] == "OK    token: not set; gated and private repositories need one (HF_TOKEN)"


def test_token_from_the_hubs_own_file(hub, check, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/token").write_text(TOKEN)
    code, lines = check(hub)
    assert code == 0
    assert lines[-1] == f"OK    token: the token from {tmp_path}/hf/token is valid and belongs to tester"


def test_downloads_from_another_host_without_the_token(hub, check):
    hub.add("model", "org/tiny", FILES)
    hub.elsewhere = True
    code, lines = check(hub, [("org/tiny", None)], HF_TOKEN=TOKEN)
    assert code == 0
    assert lines[-1] == f"OK    model org/tiny: can be downloaded from localhost:{hub.port}"
    assert hub.requests[-1][1].startswith("/elsewhere/")
    assert hub.requests[-1][2] is None


# --- the way to the hub -----------------------------------------------------------------------------------------------


def test_endpoint_that_is_no_address(check):
    assert_stops(
        check("hub.example"),
        "endpoint",
        "HF_ENDPOINT is hub.example, which is not a URL",
        "set it to https://host, or unset it",
    )


def test_offline_switch(hub, check):
    outcome = check(hub, HF_HUB_OFFLINE="1")
    assert_stops(outcome, "endpoint", "HF_HUB_OFFLINE is set", "unset it for the fetch rules")


def test_dns_failure(check):
    assert_stops(
        check("https://hub.invalid"),
        "DNS",
        "hub.invalid cannot be resolved (Name or service not known)",
        "this machine has no network or no DNS: use another one, or set HTTPS_PROXY if there is a proxy",
    )


def test_refused_connection(check):
    assert_stops(
        check("http://127.0.0.1:1"),
        "TCP",
        "no connection to 127.0.0.1:1 (Connection refused)",
        "check the firewall; set HTTPS_PROXY if there is a proxy",
    )


def test_proxy_that_is_not_there(check):
    outcome = check("https://hub.invalid", HTTPS_PROXY="http://127.0.0.1:1")
    what = "no connection to 127.0.0.1:1 (Connection refused)"
    assert_stops(outcome, "TCP", what, "check that the proxy is running, and its port")


def test_socks_proxy(check):
    outcome = check("https://hub.invalid", HTTPS_PROXY="socks5://127.0.0.1:1")
    what = "socks5://127.0.0.1:1 is not an HTTP proxy"
    assert_stops(outcome, "proxy", what, "set HTTPS_PROXY=http://host:port; SOCKS is not supported")


@pytest.mark.parametrize(
    ("status", "what", "fix"),
    [
        (403, "the proxy refuses hub.invalid:443 (HTTP/1.0 403 Forbidden)", "ask its administrators to allow it"),
        (407, "the proxy requires a login (407)", "write user:password@ before the host in HTTPS_PROXY"),
    ],
)
def test_proxy_that_refuses(check, status, what, fix):
    with FakeProxy(status) as proxy:
        assert_stops(check("https://hub.invalid", HTTPS_PROXY=proxy.url), "TCP", what, fix)


def test_proxy_that_lets_through(check, certificate):
    with FakeProxy() as proxy, FakeHub(tls=certificate) as hub:
        hub.add("model", "org/tiny", FILES)
        address = proxy.url.replace("//", "//me:secret-word@")
        code, lines = check(hub, [("org/tiny", None)], tls=str(certificate.ca), HTTPS_PROXY=address)
    assert code == 0, lines
    assert lines[1] == f"OK    proxy: {proxy.url.replace('//', '//***@')} (from the environment: HTTPS_PROXY, NO_PROXY)"
    assert lines[3] == f"OK    TCP: {proxy.url.removeprefix('http://')} answers and connects to the hub"
    assert {login for _, login in proxy.asked} == {"Basic bWU6c2VjcmV0LXdvcmQ="}


def test_no_proxy_is_respected(hub, check):
    code, lines = check(hub, HTTP_PROXY="http://127.0.0.1:1", NO_PROXY="127.0.0.1")
    assert code == 0
    assert lines[1] == "OK    proxy: none"


# --- certificates -----------------------------------------------------------------------------------------------------


def test_tls_with_a_ca_file_and_off(check, certificate):
    with FakeHub(tls=certificate) as hub:
        code, lines = check(hub, tls=str(certificate.ca))
        assert code == 0
        assert lines[4] == f"OK    TLS: issued by Corp Proxy CA (Corp), trusted by {certificate.ca}"
        code, lines = check(hub, REQUESTS_CA_BUNDLE=str(certificate.ca))
        assert code == 0
        code, lines = check(hub, tls="off")
        assert code == 0
        assert lines[4].startswith(
            "OK    TLS: NOT CHECKED (network.tls: off): anyone on the network can read the token"
        )


def test_certificate_of_a_proxy_that_opens_tls(check, certificate):
    with FakeHub(tls=certificate) as hub:
        assert_stops(
            check(hub),
            "TLS",
            "the certificate's issuer, Corp Proxy CA (Corp), is not trusted by this system "
            "(unable to get local issuer certificate)",
            "if a proxy opens TLS, ask its administrators for the CA certificate and set network.tls: /path/to/ca.pem",
        )
        assert hub.requests == []


def test_certificate_for_another_host(check, tmp_path):
    certificate = make_certificate(tmp_path / "tls", host="DNS:portal.example")
    with FakeHub(tls=certificate) as hub:
        assert_stops(
            check(hub, tls=str(certificate.ca)),
            "TLS",
            "the certificate is for portal.example, not for 127.0.0.1",
            "check HF_ENDPOINT; is it the login page of a network?",
        )


def test_expired_certificate(check, tmp_path):
    certificate = make_certificate(tmp_path / "tls", days=-1)
    with FakeHub(tls=certificate) as hub:
        code, lines = check(hub, tls=str(certificate.ca))
    assert code == 1
    assert lines[4].startswith("FAIL  TLS: the certificate has expired (")
    assert lines[4].endswith(" GMT) -> check the clock of this machine")


def test_ca_file_that_does_not_exist(check, certificate):
    with FakeHub(tls=certificate) as hub:
        assert_stops(
            check(hub, tls="/nowhere/ca.pem"),
            "TLS",
            "network.tls: /nowhere/ca.pem does not exist",
            "set network.tls to a file with CA certificates (PEM)",
        )


def test_no_tls_at_that_address(hub, check):
    code, lines = check(hub.url.replace("http:", "https:"))
    assert code == 1
    assert lines[4].startswith("FAIL  TLS: TLS with 127.0.0.1 failed (")


# --- what the hub says ------------------------------------------------------------------------------------------------


def test_login_page_instead_of_the_hub(hub, check):
    hub.page = b"<html>Welcome to our hotel</html>"
    what, fix = "the server is not the hub", "check HF_ENDPOINT; is it the login page of a network?"
    assert_stops(check(hub), "HTTP", what, fix)


def test_hub_out_of_order(hub, check):
    hub.status = 503
    what = "the hub answers with status 503 for the list of models"
    assert_stops(check(hub), "HTTP", what, "try again later; see https://status.huggingface.co")


def test_token_that_is_not_valid(hub, check):
    code, lines = check(hub, HF_TOKEN="hf_expired")
    assert code == 1
    assert lines[6] == (
        "FAIL  token: the hub does not accept the token from HF_TOKEN: it is wrong, expired or revoked "
        f"-> create a new one on {hub.url}/settings/tokens; public repositories do not need a token"
    )


def test_every_repository_is_looked_at(hub, check):
    hub.add("model", "org/gated", FILES, gated=True)
    hub.add("model", "org/tiny", FILES)
    models = [("org/missing", None), ("org/gated", None), ("org/tiny", "v9"), ("org/tiny", None)]
    code, lines = check(hub, models, [("org/private", None)], HF_TOKEN=TOKEN)
    assert code == 1
    assert lines[7:-2] == [
        "FAIL  model org/missing: the hub has no model org/missing, or does not show it to the account of your token -> "
        "check model.name; if it is private, set HF_TOKEN; if you meant a local folder: ./org/missing does not exist",
        "FAIL  model org/gated: org/gated is gated: its owners decide who may download it -> accept its terms on "
        f"{hub.url}/org/gated, and set HF_TOKEN to a token of that account with access to gated repositories",
        "FAIL  model org/tiny: org/tiny has no revision v9 -> set model.revision to one of its branches, tags or commits",
        f"OK    model org/tiny: can be downloaded from 127.0.0.1:{hub.port}",
        "FAIL  dataset org/private: the hub has no dataset org/private, or does not show it to the account of your token -> "
        "check datasets.<name>.source; if it is private, set HF_TOKEN; if you meant a local folder: "
        "./org/private does not exist",
    ]
    assert lines[-2] == (
        "check_connectivity failed: failed: model org/missing, model org/gated, model org/tiny, dataset org/private"
    )


def test_download_server_that_is_blocked(hub, check):
    hub.add("model", "org/tiny", FILES)
    hub.elsewhere = "http://127.0.0.1:1"
    code, lines = check(hub, [("org/tiny", None)])
    assert code == 1
    assert lines[7] == (
        "FAIL  model org/tiny: no connection to 127.0.0.1:1 (ConnectionError) -> downloads come from other servers than "
        "the hub: the firewall or proxy must allow them too"
    )


@pytest.mark.slow
def test_rule(hub, tmp_path):
    hub.add("model", "org/tiny", FILES)
    config = {"model": {"name": "org/tiny"}, "datasets": {"math": {"source": "org/math"}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    where = ["--snakefile", str(ROOT / "Snakefile"), "--directory", str(tmp_path), "--configfile", "config.yaml"]
    command = [sys.executable, "-m", "snakemake", "check_connectivity", "--cores", "1", *where]
    how = {"cwd": tmp_path, "env": environment(tmp_path, HF_ENDPOINT=hub.url), "capture_output": True, "text": True}
    result = subprocess.run(command, **how)
    assert result.returncode == 1
    assert "OK    model org/tiny: can be downloaded" in result.stderr
    assert "FAIL  dataset org/math: the hub has no dataset org/math" in result.stderr
    hub.add("dataset", "org/math", {"train.jsonl": b"{}"})
    assert subprocess.run(command, **how).returncode == 0
