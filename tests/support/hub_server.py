"""A Hugging Face hub on this machine, as far as huggingface_hub's client calls it for an upload.

Repositories are made, files come as git blobs in the commit or as LFS objects before it, metadata
of pages is checked. It is written after the requests that huggingface_hub 2.4 makes without xet.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_secret"
OWNER = "owner"
LICENSES = ("mit", "apache-2.0")
Answer = tuple[int, Any]


@dataclass
class Repository:
    """One repository: whether it is private, the files of each branch, and the commits' titles."""

    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    titles: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """What a hub holds; `faults` answer in its place, by a pattern for method and path."""

    url: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    faults: dict[str, Callable[[], Answer]] = field(default_factory=dict)

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> Answer:
        """Return the status and what is sent back, JSON or bytes."""
        self.requests.append(f"{method} {path}")
        for pattern, fault in self.faults.items():
            if re.match(pattern, f"{method} {path}"):
                return fault()
        for pattern, handler in _ROUTES.items():
            if match := re.fullmatch(pattern, f"{method} {path}"):
                if token != TOKEN and handler not in (_validate, _store):
                    return 401, {"error": "Invalid username or password."}
                return handler(self, body, *match.groups())
        return 404, {"error": f"no {method} {path}"}


def _validate(hub: Hub, body: bytes) -> Answer:
    """Check a page's metadata as the hub does, for what the tests look at."""
    content = json.loads(body)["content"]
    match = re.match(r"---\n(.*?)^---$", content, re.MULTILINE | re.DOTALL)
    if match is None:
        return 200, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]}
    metadata = yaml.safe_load(match[1]) or {}
    results = [each for model in metadata.get("model-index", ()) for each in model["results"]]
    found = [] if metadata.get("license", "mit") in LICENSES else ['"license" must be one of mit']
    if not all(each["task"]["type"] and each["dataset"]["name"] for each in results):
        found.append('"model-index" is malformed')
    errors = [{"message": message} for message in found]
    return (400 if found else 200), {"errors": errors, "warnings": []}


def _create(hub: Hub, body: bytes) -> Answer:
    request = json.loads(body)
    name = f"{request['organization']}/{request['name']}"
    if request["organization"] != OWNER:
        return 403, {"error": f"You don't have the rights to create a model under {name}"}
    url = {"url": f"{hub.url}/{name}", "name": name}
    if name in hub.repositories:
        return 409, {"error": "You already created this model repo", **url}
    hub.repositories[name] = Repository(request.get("visibility") == "private")
    return 200, url


def _info(hub: Hub, body: bytes, name: str) -> Answer:
    repository = hub.repositories.get(name)
    if repository is None:
        return 404, {"error": "Repository not found"}
    return 200, {"id": name, "private": repository.private, "sha": "a" * 40, "siblings": []}


def _branch(hub: Hub, body: bytes, name: str, branch: str) -> Answer:
    branches = hub.repositories[name].branches
    if branch in branches:
        return 409, {"error": f"Reference already exists: {branch}"}
    branches[branch] = dict(branches["main"])
    return 200, {}


def _preupload(hub: Hub, body: bytes, name: str, branch: str) -> Answer:
    """Say which files go to LFS: weights; a file that is there already has its id told."""
    held = hub.repositories[name].branches[branch]

    def said(file: dict[str, Any]) -> dict[str, Any]:
        path = file["path"]
        is_large = path.endswith((".safetensors", ".gguf"))
        fields = {"path": path, "uploadMode": "lfs" if is_large else "regular"}
        fields["shouldIgnore"] = False
        if path in held:
            fields["oid"] = _lfs_id(held[path]) if is_large else _git_id(held[path])
        return fields

    return 200, {"files": [said(file) for file in json.loads(body)["files"]]}


def _lfs_id(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _batch(hub: Hub, body: bytes, name: str) -> Answer:
    def place(wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in hub.objects:
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"{hub.url}/lfs/{wanted['oid']}"}}}

    return 200, {"transfer": "basic", "objects": list(map(place, json.loads(body)["objects"]))}


def _store(hub: Hub, body: bytes, oid: str) -> Answer:
    if _lfs_id(body) != oid:
        return 400, {"error": "the content has another hash"}
    hub.objects[oid] = body
    return 200, {}


def _commit(hub: Hub, body: bytes, name: str, branch: str) -> Answer:
    """Put the files of a commit into the branch, all or none."""
    lines = [json.loads(line) for line in body.splitlines()]
    repository, files = hub.repositories[name], {}
    for line in lines:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            if value["oid"] not in hub.objects:
                return 400, {"error": f"no LFS object {value['oid']}"}
            files[value["path"]] = hub.objects[value["oid"]]
        else:
            repository.titles.append(value["summary"])
    repository.branches[branch] |= files
    url = f"{hub.url}/{name}/commit/{'b' * 40}"
    return 200, {"commitUrl": url, "commitOid": "b" * 40, "success": True}


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES: dict[str, Callable[..., Answer]] = {
    "POST /api/validate-yaml": _validate,
    "POST /api/repos/create": _create,
    f"GET /api/models/{_NAME}(?:/revision/[^/]+)?": _info,
    f"POST /api/models/{_NAME}/branch/([^/]+)": _branch,
    f"POST /api/models/{_NAME}/preupload/([^/]+)": _preupload,
    f"POST /{_NAME}\\.git/info/lfs/objects/batch": _batch,
    r"PUT /lfs/(\w+)": _store,
    f"POST /api/models/{_NAME}/commit/([^/]+)": _commit,
}


@contextlib.contextmanager
def serving_hub() -> Iterator[Hub]:
    """Yield a hub that answers on 127.0.0.1 while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
            path = self.path.partition("?")[0]
            status, content = hub.answer(self.command, path, body, token)
            data = json.dumps(content).encode()
            with contextlib.suppress(OSError):  # the client may be gone
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = _serve  # noqa: N815

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
