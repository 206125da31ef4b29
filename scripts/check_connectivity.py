"""Test the connection to the hub step by step, and say what to do if a step fails.

    snakemake --cores 1 check_connectivity
    python scripts/check_connectivity.py --settings '{"models": [{"name": "Qwen/Qwen3-0.6B", "revision": null}]}' --tls off

The steps are those of the fetch stages: endpoint, proxy, DNS, TCP, TLS, HTTP, the token, and each model and dataset of the
config. For these it downloads the first byte of a file, because downloads come from other servers than the hub, and a firewall
may block them. It prints one line for each step: OK, or FAIL with what to do. Exit code 1 if a step failed.
"""

import os
import socket
import ssl
from base64 import b64encode
from urllib.parse import quote, unquote, urljoin, urlsplit

from moult.errors import MoultError
from moult.network import CONNECT_TIMEOUT, PROXY_LOGIN, READ_TIMEOUT, ca_file, endpoint, proxy_of, refusal, token
from moult.run.cli import stage_parser
from moult.run.stage import stage

NO_CHECK_TIME = 0x200000  # OpenSSL's X509_V_FLAG_NO_CHECK_TIME, which Python has no name for


def main() -> None:
    parser = stage_parser(
        __doc__, "check_connectivity", reads="models and datasets, lists of {name, revision}", optional=True
    )
    parser.add_argument("--tls", default="verify", help="how to check the hub's certificate: verify, off, or a CA file")
    args = parser.parse_args()

    settings = {"models": [], "datasets": []} | args.settings
    with stage("check_connectivity", args.log_file, settings, online=True) as log:
        failed = check(settings, args.tls, log)
        if failed:
            raise MoultError(f"failed: {', '.join(failed)}", "see the lines with FAIL")


def check(settings: dict, tls: str, log) -> list[str]:
    """Report on every step. Returns the names of the steps that failed."""
    failed = []

    def attempt(name: str, step, *arguments) -> bool:
        try:
            log.info("OK    %s: %s", name, step(*arguments))
        except MoultError as error:
            failed.append(name)
            log.error("FAIL  %s: %s -> %s", name, error.what, error.fix)
        return name not in failed

    # Each of these needs the one before it.
    way = [
        ("endpoint", check_endpoint),
        ("proxy", check_proxy),
        ("DNS", check_dns),
        ("TCP", check_tcp),
        ("TLS", check_tls, tls),
        ("HTTP", check_http, tls),
    ]
    for step in way:
        if not attempt(*step):
            return failed
    attempt("token", check_token, tls)
    for repo_type in ("model", "dataset"):
        for entry in settings[f"{repo_type}s"]:
            attempt(f"{repo_type} {entry['name']}", check_repository, repo_type, entry["name"], entry["revision"], tls)
    return failed


# --- the way to the hub -----------------------------------------------------------------------------------------------


def check_endpoint() -> str:
    url = urlsplit(endpoint())
    if url.scheme not in ("http", "https") or not url.hostname:
        raise MoultError(f"HF_ENDPOINT is {endpoint()}, which is not a URL", "set it to https://host, or unset it")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise MoultError("HF_HUB_OFFLINE is set", "unset it for the fetch rules")
    return f"{endpoint()}{' (HF_ENDPOINT)' if 'HF_ENDPOINT' in os.environ else ''}"


def check_proxy() -> str:
    proxy = proxy_of(endpoint())
    if proxy is None:
        return "none"
    if urlsplit(proxy).scheme not in ("http", "https") or not urlsplit(proxy).hostname:
        raise MoultError(f"{proxy} is not an HTTP proxy", "set HTTPS_PROXY=http://host:port; SOCKS is not supported")
    return f"{proxy} (from the environment: HTTPS_PROXY, NO_PROXY)"


def first_hop() -> tuple[str, int]:
    """Host and port to connect to: the proxy's, or the hub's."""
    url = urlsplit(proxy_of(endpoint()) or endpoint())
    return url.hostname, url.port or (443 if url.scheme == "https" else 80)


def check_dns() -> str:
    host, port = first_hop()
    try:
        addresses = {entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except OSError as error:
        raise MoultError(
            f"{host} cannot be resolved ({error.strerror})",
            "this machine has no network or no DNS: use another one, or set HTTPS_PROXY if there is a proxy",
        ) from None
    return f"{host} is {', '.join(sorted(addresses))}"


def check_tcp() -> str:
    with connect():
        pass
    host, port = first_hop()
    return f"{host}:{port} answers" + (" and connects to the hub" if proxy_of(endpoint()) else "")


def connect() -> socket.socket:
    """A TCP connection to the hub, through the proxy if there is one and the hub is to be reached by TLS."""
    host, port = first_hop()
    proxy = proxy_of(endpoint())
    try:
        connection = socket.create_connection((host, port), timeout=CONNECT_TIMEOUT)
        if proxy and urlsplit(proxy).scheme == "https":
            connection = ssl.create_default_context().wrap_socket(connection, server_hostname=host)
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        fix = (
            "check that the proxy is running, and its port"
            if proxy
            else "check the firewall; set HTTPS_PROXY if there is a proxy"
        )
        raise MoultError(f"no connection to {host}:{port} ({reason})", fix) from None
    if proxy and urlsplit(endpoint()).scheme == "https":
        ask_proxy(connection, proxy)
    return connection


def ask_proxy(connection: socket.socket, proxy: str) -> None:
    """HTTP CONNECT, as httpx and requests do it."""
    url, target = urlsplit(proxy), urlsplit(endpoint())
    where = f"{target.hostname}:{target.port or 443}"
    login = ""
    if url.username:
        secret = b64encode(f"{unquote(url.username)}:{unquote(url.password or '')}".encode()).decode()
        login = f"Proxy-Authorization: Basic {secret}\r\n"
    connection.sendall(f"CONNECT {where} HTTP/1.1\r\nHost: {where}\r\n{login}\r\n".encode())
    answer = connection.recv(65536).decode("latin-1").split("\r\n")[0]
    status = answer.split(" ", 2)[1:2]
    if status == ["407"]:
        raise MoultError("the proxy requires a login (407)", PROXY_LOGIN)
    if status != ["200"]:
        raise MoultError(
            f"the proxy refuses {where} ({answer or 'it closes the connection'})", "ask its administrators to allow it"
        )


def check_tls(tls: str) -> str:
    if urlsplit(endpoint()).scheme == "http":
        return "not used: the address is http://"
    host = urlsplit(endpoint()).hostname
    ca = ca_file(tls)
    try:
        with connect() as connection, context(tls).wrap_socket(connection, server_hostname=host) as secured:
            issuer = name_of(secured.getpeercert().get("issuer", ())) if tls != "off" else None
    except ssl.SSLCertVerificationError as error:
        raise MoultError(*explain_certificate(error, host, ca)) from None
    except OSError as error:
        raise MoultError(
            f"TLS with {host} failed ({error.strerror or error})", "check HF_ENDPOINT: is it an http:// address?"
        ) from None
    if tls == "off":
        return "NOT CHECKED (network.tls: off): anyone on the network can read the token and change the downloads"
    return f"issued by {issuer}, trusted by {ca or 'the system'}"


def context(tls: str) -> ssl.SSLContext:
    if tls != "off":
        return ssl.create_default_context(cafile=ca_file(tls))
    unchecked = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    unchecked.check_hostname = False
    unchecked.verify_mode = ssl.CERT_NONE
    return unchecked


def explain_certificate(error: ssl.SSLCertVerificationError, host: str, ca: str | None) -> tuple[str, str]:
    certificate = presented_certificate(host)
    why = error.verify_message
    if why == "certificate has expired":
        return (
            f"the certificate has expired ({certificate.get('notAfter', 'date unknown')})",
            "check the clock of this machine",
        )
    if why == "certificate is not yet valid":
        return "the certificate is not valid yet", "check the clock of this machine"
    if "mismatch" in why or "not valid for" in why:
        names = ", ".join(value for _, value in certificate.get("subjectAltName", ())) or "another host"
        return (
            f"the certificate is for {names}, not for {host}",
            "check HF_ENDPOINT; is it the login page of a network?",
        )
    return (
        f"the certificate's issuer, {name_of(certificate.get('issuer', ()))}, is not trusted by {ca or 'this system'} ({why})",
        "if a proxy opens TLS, ask its administrators for the CA certificate and set network.tls: /path/to/ca.pem",
    )


def presented_certificate(host: str) -> dict:
    """The certificate of the server, decoded. Python decodes only trusted certificates, so this one is trusted for the moment."""
    try:
        with connect() as connection, context("off").wrap_socket(connection, server_hostname=host) as secured:
            der = secured.getpeercert(binary_form=True)
        only = ssl.create_default_context(cadata=der)
        only.check_hostname = False
        only.verify_flags = ssl.VERIFY_X509_PARTIAL_CHAIN | NO_CHECK_TIME
        with connect() as connection, only.wrap_socket(connection, server_hostname=host) as secured:
            return secured.getpeercert()
    except OSError:
        return {}


def name_of(issuer: tuple) -> str:
    """'Corp Proxy CA (Corp)' of (((\"organizationName\", \"Corp\"),), ((\"commonName\", \"Corp Proxy CA\"),))."""
    fields = dict(pair for part in issuer for pair in part)
    common, organization = fields.get("commonName"), fields.get("organizationName")
    return f"{common} ({organization})" if common and organization else common or organization or "an unknown issuer"


# --- what the hub says ------------------------------------------------------------------------------------------------


def check_http(tls: str) -> str:
    answer = get(f"{endpoint()}/api/models?limit=1", tls, secret=None)  # the next step checks the token
    if answer.status_code not in (200, 401):
        raise refused(answer, "HF_ENDPOINT", "the list of models")
    try:
        answer.json()
    except ValueError:
        fix = "check HF_ENDPOINT; is it the login page of a network?"
        raise MoultError("the server is not the hub", fix) from None
    return "the hub answers"


def refused(answer, key: str, name: str, revision: str | None = None, repo_type: str = "model") -> MoultError:
    return MoultError(*refusal(answer.status_code, answer.headers, key, name, revision, repo_type))


def get(url: str, tls: str, secret: str | None, **headers: str):
    """The answer after all redirects. The token is sent only to the hub."""
    import requests

    paths = ssl.get_default_verify_paths()
    verify = tls != "off" and (ca_file(tls) or paths.cafile or paths.capath or True)
    how = {"verify": verify, "timeout": (CONNECT_TIMEOUT, READ_TIMEOUT), "allow_redirects": False, "stream": True}
    with requests.Session() as session:
        session.auth = lambda request: request  # or requests would take a password from ~/.netrc
        for _ in range(10):
            at_hub = urlsplit(url).netloc == urlsplit(endpoint()).netloc
            login = {"Authorization": f"Bearer {secret}"} if secret and at_hub else {}
            try:
                answer = session.get(url, headers={**headers, **login}, **how)
            except requests.RequestException as error:
                what = f"no connection to {urlsplit(url).netloc} ({type(error).__name__})"
                other = "downloads come from other servers than the hub: the firewall or proxy must allow them too"
                raise MoultError(what, "try again" if at_hub else other) from error
            if not answer.is_redirect:
                return answer
            url = urljoin(url, answer.headers["Location"])
    raise MoultError(f"{urlsplit(url).netloc} redirects in a circle", "check HF_ENDPOINT")


def check_token(tls: str) -> str:
    secret, source = token()
    if secret is None:
        return "not set; gated and private repositories need one (HF_TOKEN)"
    answer = get(f"{endpoint()}/api/whoami-v2", tls, secret)
    if answer.status_code != 200:
        raise refused(answer, "HF_TOKEN", "whoami")
    return f"the token from {source} is valid and belongs to {answer.json().get('name')}"


def check_repository(repo_type: str, name: str, revision: str | None, tls: str) -> str:
    """Get the list of files, then the first byte of one of them: weights or rows, if there are any."""
    key = "model.name" if repo_type == "model" else "datasets.<name>.source"
    at = f"/revision/{quote(revision, safe='')}" if revision else ""
    answer = get(f"{endpoint()}/api/{repo_type}s/{name}{at}", tls, token()[0])
    if answer.status_code == 200:
        info = answer.json()
        files = sorted((file["rfilename"] for file in info["siblings"]), key=importance)
        if not files:
            return "the repository is empty"
        folder = f"{endpoint()}/{'datasets/' if repo_type == 'dataset' else ''}{name}/resolve/{info['sha']}"
        answer = get(f"{folder}/{quote(files[0])}", tls, token()[0], Range="bytes=0-0")
    if answer.status_code not in (200, 206):
        raise refused(answer, key, name, revision, repo_type)
    return f"can be downloaded from {urlsplit(answer.url).netloc}"


def importance(file: str) -> int:
    kinds = (".safetensors", ".parquet", ".jsonl", ".json", ".csv")
    return next((place for place, kind in enumerate(kinds) if file.endswith(kind)), len(kinds))


if __name__ == "__main__":
    main()
