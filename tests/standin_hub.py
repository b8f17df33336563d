"""A small stand-in for the Hugging Face Hub: serves folders as repositories, takes uploads, and refuses as the Hub refuses.

    repos = [Repo("org/model", x), Repo("org/gated", x, gated=True), Repo("org/rows", rows, kind="dataset")]
    with StandinHub(repos, accounts={"hf_ada": Account("ada", {"org/gated": "accepted"})}) as hub:
        subprocess.run([...], env=hub.environment(home, token="hf_ada"))

huggingface_hub reads HF_ENDPOINT when it is imported: whatever talks to the stand-in runs in a process of its
own, with `environment`. Statuses, headers and sentences are the Hub's, as far as its answers are public: the
listing of a gated repository is open and its files are not; for a name that is missing or private a stranger
gets 401 and no X-Error-Code, an account 404 and RepoNotFound.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

SENTENCES = {
    "stranger": "Access to {kind} {id} is restricted. You must have access to it and be authenticated to"
    " access it. Please log in.",
    "unasked": "Access to {kind} {id} is restricted and you are not in the authorized list."
    " Visit {endpoint}/{id} to ask for access.",
    "pending": "Your request to access {kind} {id} is awaiting a review from the repo authors.",
    "rejected": "Your request to access {kind} {id} has been rejected by the repo's authors.",
    "narrow": "Please enable access to public gated repositories in your fine-grained token settings to view"
    " this repository.",
}
STRANGE = "Invalid username or password."
API = re.compile(r"/api/(?P<kind>model|dataset)s/(?P<id>[^/]+/[^/]+)(?P<rest>/.*)?$")
FILE = re.compile(r"/(?P<kind>datasets/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)$")


@dataclass
class Repo:
    """A folder served as a repository; `revisions` adds branches and tags with folders of their own."""

    id: str
    folder: Path
    kind: str = "model"
    gated: bool = False
    private: bool = False
    revisions: dict[str, Path] = field(default_factory=dict)

    def at(self, revision: str) -> Path | None:
        folders = {"main": self.folder, **self.revisions}
        folders |= {commit_of(folder): folder for folder in folders.values()}
        return folders.get(revision)


@dataclass
class Account:
    """Whom a token belongs to; `standing` per gated or private repository: accepted, pending or rejected."""

    name: str
    standing: dict[str, str] = field(default_factory=dict)
    reads_gated: bool = True
    writes: bool = False


def commit_of(folder: Path) -> str:
    """A commit hash that changes with the folder's content."""
    whole = hashlib.sha1()
    for name, data in sorted(files_of(folder).items()):
        whole.update(name.encode() + b"\0" + data)
    return whole.hexdigest()


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class StandinHub:
    """Runs from `with` to its end; `down` makes every answer that status, `cut_off` breaks a file's way."""

    def __init__(self, repos: list[Repo], accounts: dict[str, Account] | None = None) -> None:
        self.repos = {(repo.kind, repo.id): repo for repo in repos}
        self.accounts = accounts or {}
        self.down: int | None = None
        self.cut_off: str | None = None
        self.requests: list[str] = []
        self.uploads: Path | None = None  # where repositories that are made here lie
        self.opens = False  # whatever is asked, what is made is public
        self._blobs: dict[str, bytes] = {}
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Become unreachable: the port refuses connections from now on."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, home: Path, token: str | None = None, **more: str) -> dict[str, str]:
        """The environment of a process whose Hub is this one and whose caches lie in `home`."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
        kept |= {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        kept |= {
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        return kept | ({"HF_TOKEN": token} if token else {}) | more


class _Handler(BaseHTTPRequestHandler):
    hub: StandinHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def do_PUT(self) -> None:
        self._route()

    def _route(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        body = self._body()
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.down:
            self._refuse(self.hub.down, None, "The Hub is having a bad day")
        elif path == "/api/whoami-v2":
            self._whoami()
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._validate(json.loads(body)["content"])
        elif path.startswith("/blobs/"):
            self.hub._blobs[path.removeprefix("/blobs/")] = body
            self._send(b"", "text/plain")
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif match := API.match(path):
            self._api(match["kind"], match["id"], match["rest"] or "", body.decode())
        elif match := FILE.match(path):
            kind = "dataset" if match["kind"] else "model"
            self._file(kind, match["id"], match["revision"], match["path"])
        else:
            self._refuse(404, None, "Sorry, we can't find the page you are looking for.")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _account(self) -> Account | None:
        return self.hub.accounts.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def _whoami(self) -> None:
        account = self._account()
        if account is None:
            self._refuse(401, None, "Invalid credentials in Authorization header")
        else:
            self._json({"type": "user", "name": account.name, "auth": {"type": "access_token"}})

    def _create(self, asked: dict[str, Any]) -> None:
        account = self._account()
        name = f"{asked.get('organization') or (account.name if account else '')}/{asked['name']}"
        if account is None or not account.writes:
            self._refuse(403, None, f"You don't have the rights to create a model under the namespace {name}")
        elif ("model", name) in self.hub.repos:
            taken = {"error": "You already created this model repo", "url": f"{self.hub.endpoint}/{name}"}
            self._send(json.dumps(taken).encode(), "application/json", 409)
        else:
            folder = self.hub.uploads / name
            folder.mkdir(parents=True)
            account.standing[name] = "accepted"
            private = asked.get("visibility") == "private" or asked.get("private", False)
            self.hub.repos["model", name] = Repo(name, folder, private=private and not self.hub.opens)
            self._json({"name": name, "id": name, "url": f"{self.hub.endpoint}/{name}"})

    def _validate(self, card: str) -> None:
        """The Hub refuses a base_model that is no name on it."""
        base = (yaml.safe_load(card.split("---")[1]) if card.startswith("---") else {}).get("base_model")
        wrong = base is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", base)
        said = f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
        answer = {"warnings": [], "errors": [{"message": said}] * wrong}
        self._send(json.dumps(answer).encode(), "application/json", 400 if wrong else 200)

    def _batch(self, asked: dict[str, Any]) -> None:
        """Where each large file is to be put."""
        to = [{**o, "actions": {"upload": {"href": f"{self.hub.endpoint}/blobs/{o['oid']}"}}} for o in asked["objects"]]
        self._json({"transfer": "basic", "objects": to})

    def _commit(self, repo: Repo, body: str) -> None:
        """Files in the commit itself, and files that were put before."""
        for line in map(json.loads, body.splitlines()):
            value, file = line["value"], repo.folder / line["value"].get("path", "")
            file.parent.mkdir(parents=True, exist_ok=True)
            if line["key"] == "file":
                file.write_bytes(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                file.write_bytes(self.hub._blobs[value["oid"]])
        commit = commit_of(repo.folder)
        self._json(
            {"commitUrl": f"{self.hub.endpoint}/{repo.id}/commit/{commit}", "commitOid": commit, "success": True}
        )

    def _api(self, kind: str, id: str, rest: str, body: str) -> None:
        repo = self._visible(kind, id)
        if repo is None:
            return
        action, _, tail = rest.strip("/").partition("/")
        if action == "preupload":
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = ["lfs" if name.endswith((".safetensors", ".gguf")) else "regular" for name in files]
            self._json({"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": None}
                                  for name, mode in zip(files, modes, strict=True)]})  # fmt: skip
            return
        if action == "commit":
            self._commit(repo, body)
            return
        if action == "auth-check":
            if self._may_read(repo):
                self._send(b"OK", "text/plain")
            return
        revision, _, under = tail.partition("/")
        folder = repo.at(revision or "main")
        if folder is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif action == "tree":
            self._tree(folder, under)
        elif action == "paths-info":
            wanted = parse_qs(body).get("paths", [])
            self._json([entry for entry in _entries(folder) if entry["path"] in wanted])
        elif action in ("", "revision"):
            self._json(_info(repo, folder))
        else:
            self._refuse(404, None, "Not found")

    def _tree(self, folder: Path, under: str) -> None:
        deep = parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() in ("true", "1")
        inside = [e for e in _entries(folder) if e["path"].startswith(f"{under}/" if under else "")]
        if under and not inside:
            self._refuse(404, "EntryNotFound", f"{under} does not exist")
        else:
            depth = under.count("/") + 2 if under else 1
            self._json([e for e in inside if deep or e["path"].count("/") < depth])

    def _file(self, kind: str, id: str, revision: str, path: str) -> None:
        repo = self._visible(kind, id)
        if repo is None or not self._may_read(repo):
            return
        folder = repo.at(revision)
        if folder is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        commit = {"X-Repo-Commit": commit_of(folder)}
        data = files_of(folder).get(path)
        if data is None:
            self._refuse(404, "EntryNotFound", "Entry not found", commit)
        else:
            self._send(data, "application/octet-stream", headers=commit | {"ETag": f'"{_blob(data)}"'})

    def _visible(self, kind: str, id: str) -> Repo | None:
        """The repository, unless this caller may not know of it."""
        repo, account = self.hub.repos.get((kind, id)), self._account()
        hidden = repo is not None and repo.private and not (account and account.standing.get(id) == "accepted")
        if repo is not None and not hidden:
            return repo
        if account is None:
            sent = "Authorization" in self.headers
            self._refuse(401, None, "Invalid credentials in Authorization header" if sent else STRANGE)
        else:
            self._refuse(404, "RepoNotFound", "Repository not found")
        return None

    def _may_read(self, repo: Repo) -> bool:
        if not repo.gated:
            return True
        account = self._account()
        standing = "stranger" if account is None else account.standing.get(repo.id, "unasked")
        if account is not None and not account.reads_gated:
            standing = "narrow"
        if standing == "accepted":
            return True
        sentence = SENTENCES[standing].format(kind=repo.kind, id=repo.id, endpoint=self.hub.endpoint)
        self._refuse(401 if account is None else 403, None if standing == "narrow" else "GatedRepo", sentence)
        return False

    def _refuse(self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | (headers or {})
        self._send(json.dumps({"error": message}).encode(), "application/json", status, headers)

    def _json(self, answer: Any) -> None:
        self._send(json.dumps(answer).encode(), "application/json")

    def _send(self, data: bytes, kind: str, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.hub.cut_off and self.path.endswith(self.hub.cut_off) and self.command == "GET":
            self.wfile.write(data[:1])
            self.close_connection = True
        elif self.command != "HEAD":
            self.wfile.write(data)


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entries(folder: Path) -> list[dict[str, Any]]:
    folders = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_dir()]
    entries = [{"type": "directory", "path": name, "size": 0, "oid": _blob(name.encode())} for name in folders]
    for name, data in files_of(folder).items():
        entries.append({"type": "file", "path": name, "size": len(data), "oid": _blob(data)})
    return entries


def _info(repo: Repo, folder: Path) -> dict[str, Any]:
    files = [entry for entry in _entries(folder) if entry["type"] == "file"]
    siblings = [{"rfilename": file["path"], "size": file["size"], "blobId": file["oid"]} for file in files]
    return {
        "_id": "0" * 24,
        "id": repo.id,
        "sha": commit_of(folder),
        "private": repo.private,
        "gated": "manual" if repo.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "createdAt": "2026-01-01T00:00:00.000Z",
        "lastModified": "2026-01-01T00:00:00.000Z",
        "siblings": siblings,
    }
