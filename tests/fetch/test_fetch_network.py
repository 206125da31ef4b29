"""The way to the hub: name resolution, proxies, certificates, silence."""

import sys
import time

import pytest
from fake_hub import FakeHub, FakeProxy, make_certificate
from fetching import assert_fails, dataset, model
from workflow import ROOT

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
    what = "org/tiny must be downloaded from the hub, but HF_HUB_OFFLINE is set"
    assert_fails(result, what, "unset HF_HUB_OFFLINE for this step, or put a copy into the folder paths.models")
    assert hub.requests == []


def test_proxy_that_refuses(fetch):
    with FakeProxy(403) as proxy:
        result = fetch.model(HF_ENDPOINT="https://hub.invalid", HTTPS_PROXY=proxy.url)
        assert_fails(
            result, f"the proxy {proxy.url} refuses the connection: 403 Forbidden", "check HTTPS_PROXY and NO_PROXY"
        )
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


@pytest.mark.parametrize("kind", ["model", pytest.param("dataset", marks=pytest.mark.slow)])
def test_tls(fetch, certificate, kind):
    with FakeHub(tls=certificate) as hub:
        hub.add("model", "org/tiny", model())
        hub.add("dataset", "org/math", dataset())
        run = getattr(fetch, kind)
        result = run(HF_ENDPOINT=hub.url)
        what = f"the certificate of 127.0.0.1:{hub.port} is not trusted: unable to get local issuer certificate"
        assert_fails(result, what, "if a proxy opens TLS, set network.tls to its CA certificate: /path/to/ca.pem")
        assert hub.requests == []

        assert run(tls=str(certificate.ca), HF_ENDPOINT=hub.url).returncode == 0
        assert run(SSL_CERT_FILE=str(certificate.ca), HF_ENDPOINT=hub.url).returncode == 0
        assert run(REQUESTS_CA_BUNDLE=str(certificate.ca), HF_ENDPOINT=hub.url).returncode == 0

        result = run(tls="off", HF_ENDPOINT=hub.url)
        assert result.returncode == 0, result.stderr
        assert "network.tls is off: certificates are NOT CHECKED" in result.stderr


def test_wrong_ca_file_is_not_enough(fetch, certificate, tmp_path):
    other = make_certificate(tmp_path / "other")
    with FakeHub(tls=certificate) as hub:
        result = fetch.model(tls=str(other.ca), HF_ENDPOINT=hub.url)
        assert_fails(
            result,
            f"the certificate of 127.0.0.1:{hub.port} is not trusted: unable to get local issuer certificate",
        )


def test_ca_file_that_is_none(fetch, tmp_path):
    result = fetch.model(tls="/nowhere/ca.pem")
    assert_fails(
        result, "network.tls: /nowhere/ca.pem does not exist", "set network.tls to a file with CA certificates (PEM)"
    )
    (tmp_path / "ca.pem").write_text("no certificate")
    result = fetch.model(tls="ca.pem")
    assert_fails(
        result,
        "network.tls: ca.pem cannot be used: it does not contain a certificate in PEM format",
        "a CA file contains lines",
    )
    result = fetch.model(SSL_CERT_FILE="/nowhere/ca.pem")
    assert_fails(result, "SSL_CERT_FILE: /nowhere/ca.pem does not exist")
