"""A hub on the loopback interface, for the tests of what goes through the network: enough of its API to download from, and
to upload to without Xet (HF_HUB_DISABLE_XET=1).

    with FakeHub() as hub:
        hub.add("model", "org/tiny", {"config.json": b"{}", "model.safetensors": weights})
        subprocess.run([...], env={**os.environ, "HF_ENDPOINT": hub.url})
        assert hub.paths("GET") == [...]

Statuses, headers and error codes are those of huggingface.co: a repository that one may not see is 401 without a token
and 404 with one, a gated one shows its description and refuses its files.
"""

import base64
import contextlib
import hashlib
import json
import os
import socket
import ssl
import subprocess
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "abcdefghijklmnopqrstuvwxyz01234567"  # in two parts, or a scanner takes it for a real one


@dataclass
class Repository:
    """`commits` holds the files of each commit, `refs` says which commit a branch or tag stands for."""

    kind: str
    name: str
    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    gated: bool = False
    private: bool = False

    def commit(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


@dataclass
class FakeHub:
    """The server, and what can go wrong with it."""

    tls: "Certificate | None" = None
    tokens: tuple[str, ...] = (TOKEN,)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Authorization
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    cut_after: dict[str, int] = field(default_factory=dict)  # file: bytes that are sent before the connection breaks
    objects: dict[str, bytes] = field(default_factory=dict)  # hash: what was uploaded with git LFS
    wrong: dict[str, bytes] = field(default_factory=dict)  # file: what is sent instead
    status: int | None = None  # answer everything with this
    slow: dict[str, float] = field(default_factory=dict)  # file: seconds that it takes to send
    mute: float = 0.0  # seconds before each answer
    elsewhere: bool | str = False  # send the files from another host, as the real hub does, or from this one
    page: bytes = b""  # answer everything with this, as a network's login page does

    def __enter__(self) -> "FakeHub":
        self.server = Server(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        if self.tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.tls.chain, self.tls.key)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def port(self) -> int:
        return self.server.server_address[1]

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    def add(self, kind: str, name: str, files: dict[str, bytes], revision: str = "main", **how) -> str:
        """A commit with `files` on the branch `revision`; returns its hash."""
        repository = self.repositories.setdefault((kind, name), Repository(kind, name, {}, {}, **how))
        commit = hashlib.sha1(repr((name, sorted(files.items()))).encode()).hexdigest()
        repository.commits[commit] = files
        repository.refs.setdefault("main", commit)
        repository.refs[revision] = commit
        return commit

    def paths(self, method: str) -> list[str]:
        return [path for seen, path, _ in self.requests if seen == method]


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        """A client that hangs up is no news here."""


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def do_PUT(self) -> None:
        """What git LFS uploads: the file, under its hash."""
        size, data = self.headers.get("Content-Length"), b""
        if size is None:
            while length := int(self.rfile.readline(), 16):
                data += self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
        else:
            data = self.rfile.read(int(size))
        self.hub.requests.append((self.command, self.path, None))
        oid = self.path.removeprefix("/lfs/")
        if hashlib.sha256(data).hexdigest() != oid:
            return self.refuse(400, "", "the hash is another")
        self.hub.objects[oid] = data
        self.answer({})

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path).strip("/")
        authorization = self.headers.get("Authorization")
        hub.requests.append((self.command, self.path, authorization))
        self.token = authorization.removeprefix("Bearer ") if authorization else None
        time.sleep(hub.mute)
        if hub.page:
            return self.send(hub.page, "text/html")
        if hub.status:
            return self.refuse(hub.status, "", "the fake hub is told to say so")
        if self.token is not None and self.token not in hub.tokens:
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        if path == "api/whoami-v2":
            if self.token is None:
                return self.refuse(401, "", "Invalid username or password.")
            return self.answer({"name": "tester", "type": "user"})
        if path in ("api/repos/create", "api/validate-yaml") or path.endswith(".git/info/lfs/objects/batch"):
            return self.take(path)
        if path == "api/models":
            return self.answer([{"id": name} for kind, name in hub.repositories if kind == "model"])
        on_other_host = path.startswith("elsewhere/")
        path = path.removeprefix("elsewhere/")
        for repository in hub.repositories.values():
            api, files = f"api/{repository.kind}s/{repository.name}", repository.name
            if repository.kind == "dataset":
                files = f"datasets/{files}"
            if path == api or path.startswith(f"{api}/"):
                return self.serve_api(repository, path.removeprefix(api).strip("/"))
            if path.startswith(f"{files}/resolve/"):
                return self.serve_file(repository, path.removeprefix(f"{files}/resolve/"), on_other_host)
        return self.refuse_unseen()

    def refuse_unseen(self) -> None:
        if self.token is None:
            return self.refuse(401, "RepoNotFound", "Invalid username or password.")
        return self.refuse(404, "RepoNotFound", "Repository not found")

    def take(self, path: str) -> None:
        """What comes before an upload."""
        if self.token is None:
            return self.refuse(401, "", "Invalid username or password.")
        asked = json.loads(self.body)
        if path == "api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "api/repos/create":
            name = f"{asked['organization']}/{asked['name']}"
            url = {"url": f"{self.hub.url}/{name}"}
            if ("model", name) in self.hub.repositories:
                return self.answer(url, 409)
            self.hub.add("model", name, {}, private=asked.get("visibility") == "private")
            return self.answer(url)
        place = f"{self.hub.url}/lfs"
        objects = [{**each, "actions": {"upload": {"href": f"{place}/{each['oid']}"}}} for each in asked["objects"]]
        return self.answer({"transfer": "basic", "objects": objects})

    def take_commit(self, repository: Repository, branch: str) -> None:
        files = dict(repository.commits[repository.refs[branch]])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            if line["key"] == "deletedFile":
                del files[value["path"]]
        commit = self.hub.add(repository.kind, repository.name, files, branch)
        self.answer(
            {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{repository.name}/commit/{commit}"}
        )

    def serve_api(self, repository: Repository, rest: str) -> None:
        if repository.private and self.token is None:
            return self.refuse_unseen()
        what, _, revision = rest.partition("/")
        if what == "preupload":
            asked = json.loads(self.body)["files"]
            modes = [
                {"path": file["path"], "uploadMode": "lfs" if large(file["path"]) else "regular"} for file in asked
            ]
            return self.answer({"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        if what == "commit":
            return self.take_commit(repository, revision)
        if what == "refs":
            branches = [
                {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": at} for ref, at in repository.refs.items()
            ]
            return self.answer({"branches": branches, "tags": [], "converts": []})
        if what in ("tree", "paths-info"):
            revision, _, folder = revision.partition("/")
        commit = repository.commit(revision or "main")
        if commit is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repository.commits[commit]
        if what == "tree":
            if folder and not any(file.startswith(f"{folder}/") for file in files):
                return self.refuse(404, "EntryNotFound", f"{folder} does not exist on {revision}")
            return self.answer([entry(file, data) for file, data in files.items() if file.startswith(folder)])
        if what == "paths-info":
            wanted = json.loads(self.body)["paths"]
            return self.answer([entry(file, files[file]) for file in wanted if file in files])
        siblings = [sibling(file, data) for file, data in files.items()]
        facts = {"id": repository.name, "sha": commit, "siblings": siblings, "gated": repository.gated}
        return self.answer({**facts, "private": repository.private})

    def serve_file(self, repository: Repository, rest: str, on_other_host: bool) -> None:
        revision, _, file = rest.partition("/")
        if repository.private and self.token is None and not on_other_host:
            return self.refuse_unseen()
        if repository.gated:
            return self.refuse(403 if self.token else 401, "GatedRepo", f"Access to {repository.name} is restricted")
        commit = repository.commit(revision)
        if commit is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if file not in repository.commits[commit]:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        data = repository.commits[commit][file]
        headers = {"ETag": f'"{etag(file, data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if self.hub.elsewhere and not on_other_host:
            linked = {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(data))}
            other = f"http://localhost:{self.hub.port}" if self.hub.elsewhere is True else self.hub.elsewhere
            location = f"{other}/elsewhere{self.path}?Signature=valid-for-an-hour"
            return self.answer({}, 302, {**headers, **linked, "Location": location})
        if self.command == "GET":
            data = self.hub.wrong.get(file, data)
        start = 0
        if self.headers.get("Range"):
            start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.send_response(206 if start else 200)
        for name, value in {**headers, "Content-Length": str(len(data) - start)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            end = self.hub.cut_after.get(file, len(data))
            step = len(data) // 100 + 1 if file in self.hub.slow else len(data) + 1
            for offset in range(start, max(start, end), step):
                self.wfile.write(data[offset : min(offset + step, end)])
                time.sleep(self.hub.slow.get(file, 0) / 100)
            if end < len(data):
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True

    def answer(self, value, status: int = 200, headers: dict | None = None) -> None:
        self.send(json.dumps(value).encode(), "application/json", status, headers)

    def send(self, body: bytes, kind: str, status: int = 200, headers: dict | None = None) -> None:
        self.send_response(status)
        for name, text in {**(headers or {}), "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer({"error": message}, status, headers)


def large(file: str) -> bool:
    return file.endswith((".safetensors", ".gguf", ".parquet", ".bin"))


def etag(file: str, data: bytes) -> str:
    """The hub's: SHA-256 of a large file, git's object id of a small one."""
    if large(file):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sibling(file: str, data: bytes) -> dict:
    lfs = {"sha256": etag(file, data), "size": len(data), "pointerSize": 134}
    return {"rfilename": file, "size": len(data), "blobId": "0" * 40} | ({"lfs": lfs} if large(file) else {})


def entry(file: str, data: bytes) -> dict:
    lfs = {"oid": etag(file, data), "size": len(data), "pointerSize": 134}
    return {"type": "file", "path": file, "size": len(data), "oid": "0" * 40} | ({"lfs": lfs} if large(file) else {})


# --- what is between ---------------------------------------------------------------------------------------------------


class FakeProxy:
    """An HTTP proxy for CONNECT, which answers `status`; with 200 it lets through to wherever is asked for."""

    def __init__(self, status: int = 200):
        self.status = status
        self.asked: list[tuple[str, str | None]] = []  # address, Proxy-Authorization

    def __enter__(self) -> "FakeProxy":
        self.server = Server(("127.0.0.1", 0), type("Handler", (ProxyHandler,), {"proxy": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()


class ProxyHandler(BaseHTTPRequestHandler):
    proxy: FakeProxy

    def log_message(self, *args) -> None:
        pass

    def do_CONNECT(self) -> None:
        self.proxy.asked.append((self.path, self.headers.get("Proxy-Authorization")))
        if self.proxy.status != 200:
            return self.send_error(self.proxy.status)
        host, _, port = self.path.partition(":")
        with socket.create_connection((host, int(port))) as there:
            self.send_response(200)
            self.end_headers()
            self.wfile.flush()
            back = threading.Thread(target=pump, args=(there, self.connection), daemon=True)
            back.start()
            pump(self.connection, there)
            back.join()


def pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


def environment(home: Path, **variables: str) -> dict[str, str]:
    """The environment of a stage under test: nothing of the machine's own hub, proxy and certificates."""
    foreign = ("HF_", "HUGGING", "SSL_", "REQUESTS_", "CURL_", "HTTP", "NO_PROXY", "ALL_PROXY", "TRANSFORMERS_")
    inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith(foreign)}
    return {**inherited, "HOME": str(home), "HF_HOME": str(home / "hf"), **variables}


# --- certificates -----------------------------------------------------------------------------------------------------


@dataclass
class Certificate:
    """A server's certificate, and the CA that has signed it."""

    ca: Path
    chain: Path
    key: Path


def make_certificate(
    folder: Path, issuer: str = "Corp Proxy CA", host: str = "IP:127.0.0.1", days: int = 2
) -> Certificate:
    """Sign a certificate for `host` with a new CA of the name `issuer`. With days < 0 it has expired."""
    folder.mkdir(parents=True, exist_ok=True)

    def openssl(*command: str) -> None:
        subprocess.run(["openssl", *command], cwd=folder, check=True, capture_output=True)

    def new_key(name: str) -> tuple[str, ...]:
        return ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", name)

    usage = ("-addext", "keyUsage=critical,keyCertSign")
    openssl(*new_key("ca.key"), "-x509", "-days", "9", "-subj", f"/O=Corp/CN={issuer}", "-out", "ca.pem", *usage)
    openssl(*new_key("server.key"), "-subj", "/CN=hub", "-addext", f"subjectAltName={host}", "-out", "server.csr")
    ca = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial")
    openssl(
        "x509", "-req", "-in", "server.csr", *ca, "-days", str(days), "-copy_extensions", "copy", "-out", "server.pem"
    )
    return Certificate(folder / "ca.pem", folder / "server.pem", folder / "server.key")
