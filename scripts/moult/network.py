"""Access to the hub: TLS, tokens, and error messages.

Only the fetch stages, check_connectivity and publish use it. huggingface_hub reads its environment variables when it is
imported, so it is not imported at the top: call `set_up_hub` first.
"""

import contextlib
import errno
import json
import logging
import os
import re
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from moult.errors import MoultError, some

log = logging.getLogger("moult")

# Seconds. By default the hub's client waits forever, for example behind a firewall that drops packets.
CONNECT_TIMEOUT = 10
READ_TIMEOUT = 30

PROXY_LOGIN = "write user:password@ before the host in HTTPS_PROXY"

_CA_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


def endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def proxy_of(url: str) -> str | None:
    """The proxy that the environment names for `url`."""
    parts = urlsplit(url)
    if proxy_bypass(parts.netloc):
        return None
    proxy = getproxies().get(parts.scheme) or getproxies().get("all")
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy


def token() -> tuple[str | None, str]:
    """(token, its source). Looks in the same places as huggingface_hub, and in HUGGINGFACE_HUB_TOKEN."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN"):
        if os.environ.get(name, "").strip():
            return os.environ[name].strip(), name
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME", f"{cache}/huggingface")
    path = Path(os.path.expandvars(os.environ.get("HF_TOKEN_PATH", f"{home}/token"))).expanduser()
    try:
        return path.read_text(encoding="utf-8").strip() or None, str(path)
    except OSError:
        return None, ""


def ca_file(tls: str) -> str | None:
    """The file with CA certificates, or None for those of the system. Raises MoultError if the file cannot be used.

    With `verify`, SSL_CERT_FILE is used, otherwise REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE, which some people set for other tools.
    """
    if tls == "off":
        return None
    source, path = "network.tls", tls
    if tls == "verify":
        named = {name: os.environ[name] for name in _CA_VARIABLES if os.environ.get(name)}
        files = [(name, path) for name, path in named.items() if not Path(path).is_dir()]
        if not files:
            return None
        source, path = files[0]
    try:
        ssl.create_default_context(cafile=Path(path).expanduser())
    except FileNotFoundError:
        raise MoultError(
            f"{source}: {path} does not exist", f"set {source} to a file with CA certificates (PEM)"
        ) from None
    except (OSError, ssl.SSLError) as error:
        reason = (
            error.strerror if isinstance(error, PermissionError) else "it does not contain a certificate in PEM format"
        )
        raise MoultError(
            f"{source}: {path} cannot be used: {reason}", "a CA file contains lines like -----BEGIN CERTIFICATE-----"
        ) from None
    return str(Path(path).expanduser())


def set_up_hub(tls: str) -> None:
    """Set up huggingface_hub (and datasets, which uses it): certificates as `tls` says, and a timeout for every request.

    `tls` is network.tls of the config: verify, off, or a CA file. Call this before huggingface_hub is imported.
    """
    secret, source = token()
    if secret and source == "HUGGINGFACE_HUB_TOKEN":  # the one name that huggingface_hub does not know
        os.environ["HF_TOKEN"] = secret
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if tls != "verify":
        os.environ["HF_HUB_DISABLE_XET"] = "1"  # hf_xet has its own TLS code, which ignores these settings
    if tls == "off":
        log.warning(
            "network.tls is off: certificates are NOT CHECKED. Anyone on the network can read the token and change the downloads"
        )
    if ca := ca_file(tls):
        os.environ["SSL_CERT_FILE"] = ca  # the client's variable, and OpenSSL's

    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import httpx

    def client():
        return httpx.Client(verify=tls != "off", follow_redirects=True, event_hooks={"request": [_wait_at_most]})

    set_client_factory(client)


def check_names(name: str, files: list[str]) -> None:
    """Raises MoultError if a file of the repository would be written outside its folder."""
    outside = [
        file for file in files if file.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", file) or "\0" in file
    ]
    if outside:
        raise MoultError(
            f"{name} has files that would be written outside its folder: {some(map(repr, outside))}", "do not use it"
        )


def _wait_at_most(request) -> None:
    # In a hook, because some calls of huggingface_hub pass `timeout=None`, which overrides the client's own.
    timeout = request.extensions.setdefault("timeout", {})
    timeout["connect"] = min(timeout.get("connect") or CONNECT_TIMEOUT, CONNECT_TIMEOUT)
    for action in ("read", "write"):
        timeout[action] = timeout.get(action) or READ_TIMEOUT


# --- errors -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def hub_errors(key: str, name: str, revision: str | None = None, repo_type: str = "model") -> Iterator[None]:
    """Turn errors of huggingface_hub, of its HTTP client and of the system into a MoultError.

    `key` is the config key that named `name`, a repository of `repo_type`.
    """
    from huggingface_hub import is_offline_mode

    if is_offline_mode():
        raise MoultError(*_offline(key, name, repo_type))
    try:
        yield
    except MoultError:
        raise
    except Exception as error:
        explained = _explain(list(_chain(error)), key, name, revision, repo_type)
        if explained is None:
            raise
        raise MoultError(*explained) from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """`error` and its causes. The first cause says most, but libraries wrap it, and the client hides it (`from None`)."""
    seen = []
    while error is not None and error not in seen:
        yield error
        seen.append(error)
        error = error.__cause__ or error.__context__


def _explain(chain: list[BaseException], key: str, name: str, revision: str | None, repo_type: str):
    """(what, fix), or None if the error has nothing to do with the hub."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RevisionNotFoundError

    if _first(chain, HFValidationError):
        return f"{key}: {name} is neither a path on this machine nor a valid name on the hub", f"check {key}"
    if _first(chain, OfflineModeIsEnabled):
        return _offline(key, name, repo_type)
    error = _first(chain, HfHubHTTPError)
    if error is None:
        return _explain_connection(chain, key, repo_type)
    what, fix = refusal(error.response.status_code, error.response.headers, key, name, revision, repo_type)
    if isinstance(error, RevisionNotFoundError):
        what += f"; it has: {_revisions(name, repo_type)}"
    return what, fix


def _offline(key: str, name: str, repo_type: str) -> tuple[str, str]:
    return (
        f"{name} must be downloaded from the hub, but HF_HUB_OFFLINE is set",
        f"unset HF_HUB_OFFLINE for this step, or {_local_copy(key, repo_type)}",
    )


def refusal(status: int, headers, key: str, name: str, revision: str | None, repo_type: str) -> tuple[str, str]:
    """(what, fix) for an HTTP status that means failure. `key` is the config key of the repository."""
    page = f"{endpoint()}/{'datasets/' if repo_type == 'dataset' else ''}{name}"
    code, message = headers.get("X-Error-Code", ""), headers.get("X-Error-Message", "")
    if code == "RevisionNotFound":
        return (
            f"{name} has no revision {revision}",
            f"set {key.rsplit('.', 1)[0]}.revision to one of its branches, tags or commits",
        )
    if code == "EntryNotFound":
        return (
            f"{name}: a file in the list of the repository is missing",
            "try again; if the error stays, use another revision",
        )
    if code == "GatedRepo":
        return (
            f"{name} is gated: its owners decide who may download it",
            f"accept its terms on {page}, and set HF_TOKEN to a token of that account with access to gated repositories",
        )
    if status == 401 and message.startswith("Invalid credentials"):
        return (
            f"the hub does not accept the token from {token()[1]}: it is wrong, expired or revoked",
            f"create a new one on {endpoint()}/settings/tokens; public repositories do not need a token",
        )
    if status in (401, 404):
        return (
            f"the hub has no {repo_type} {name}, or does not show it "
            + ("to the account of your token" if token()[0] else "without a token"),
            f"check {key}; if it is private, set HF_TOKEN; if you meant a local folder: ./{name} does not exist",
        )
    if status == 403:
        return f"the hub refuses access to {name} (403)", f"open {page} with the account of your token"
    if status == 407:
        return f"the proxy {proxy_of(endpoint())} requires a login (407)", PROXY_LOGIN
    if status == 429:
        return "too many requests to the hub (429)", "wait a few minutes, or set HF_TOKEN"
    return f"the hub answers with status {status} for {name}", "try again later; see https://status.huggingface.co"


def _explain_connection(chain, key: str, repo_type: str) -> tuple[str, str] | None:
    """(what, fix) for errors of the connection or of this machine."""
    from huggingface_hub.errors import FileMetadataError
    from huggingface_hub.utils import httpx

    host, proxy = urlsplit(endpoint()).netloc, proxy_of(endpoint())
    way = f"{host} through the proxy {proxy}" if proxy else host
    elsewhere = f"run this step on a machine with network, or {_local_copy(key, repo_type)}"
    check = "`snakemake check_connectivity --cores 1` tests every step"
    text = " ".join(map(str, chain))
    if any(getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for error in chain) or "os error 28" in text:
        return "the disk is full", "free space in the results folder (and in HF_HOME, if it is set), then run again"
    if _first(chain, httpx.ProxyError):
        return (
            f"the proxy {proxy} refuses the connection: {_first(chain, httpx.ProxyError)}",
            f"check HTTPS_PROXY and NO_PROXY; {check}",
        )
    if error := _first(chain, ssl.SSLCertVerificationError):
        return (
            f"the certificate of {host} is not trusted: {error.verify_message}",
            "if a proxy opens TLS, set network.tls to its CA certificate: /path/to/ca.pem; " + check,
        )
    if error := _first(chain, ssl.SSLError):
        return f"TLS with {way} failed: {error.reason or error}", check
    if _first(chain, socket.gaierror):
        return f"no network: the name of {way} cannot be resolved", elsewhere
    if _first(chain, (httpx.TimeoutException, TimeoutError)):
        return f"no answer from {way} in time", f"try again; {elsewhere}; {check}"
    if _first(chain, httpx.RemoteProtocolError):
        return f"{way} closed the connection several times", "run again: finished files are kept"
    if error := _first(chain, (httpx.NetworkError, ConnectionError)):
        return f"no connection to {way}: {error}", f"{elsewhere}; {check}"
    if _first(chain, (FileMetadataError, json.JSONDecodeError)):
        return f"the server at {way} is not the hub", f"check HF_ENDPOINT; is it the login page of a network? {check}"
    if "Consistency check failed" in text:
        return "a downloaded file has the wrong length", "run again: finished files are kept"
    if error := _first(chain, PermissionError):
        return (
            f"{error.filename}: permission denied",
            "check the owner of that folder (HF_HOME is the folder of the hub)",
        )
    return None


def _first(chain: list[BaseException], kind: type | tuple[type, ...]):
    return next((error for error in chain if isinstance(error, kind)), None)


def _local_copy(key: str, repo_type: str) -> str:
    return "put a copy into the folder paths.models" if repo_type == "model" else f"set {key} to the path of a copy"


def _revisions(name: str, repo_type: str) -> str:
    from huggingface_hub import HfApi

    try:
        refs = HfApi().list_repo_refs(name, repo_type=repo_type)
    except Exception as error:  # the error that is being explained counts
        log.debug("no list of revisions: %s", error)
        return "unknown"
    return some([ref.name for ref in (*refs.branches, *refs.tags)])
