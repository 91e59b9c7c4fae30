"""Adapters of the hub: from a cache made by hand, and from a server that answers as it does."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lorakit.adapters.storage import load_adapter, save_adapter
from lorakit.errors import LorakitError
from tests.support.adapters import run_python, tiny

LOAD = """
    import sys
    from lorakit.adapters.storage import load_adapter
    from lorakit.errors import LorakitError
    try:
        print(load_adapter(sys.argv[1]).sha256)
    except LorakitError as error:
        print("Error:", error)
"""


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """Return a HF_HOME whose cache holds owner/name, at main and at a tag."""
    repository = tmp_path / "hub" / "models--owner--name"
    for revision, commit, adapter in (("main", "a" * 40, tiny()), ("v1", "b" * 40, tiny(rank=3))):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        snapshot, blobs = repository / "snapshots" / commit, repository / "blobs"
        blobs.mkdir(exist_ok=True)
        save_adapter(adapter, f"{snapshot}/")
        for file in list(snapshot.iterdir()):
            blob = blobs / f"{commit}-{file.name}"
            file.rename(blob)
            file.symlink_to(os.path.relpath(blob, snapshot))
    return tmp_path


@pytest.mark.parametrize(
    ("address", "rank"), [("hf://owner/name", 2), ("hf://owner/name@v1", 3)], ids=["main", "tag"]
)
def test_an_adapter_of_the_hub_is_read_from_its_cache(address: str, rank: int, hub: Path) -> None:
    done = run_python(LOAD, address, HF_HOME=str(hub), HF_HUB_OFFLINE="1")
    assert done.stdout.decode().strip() == tiny(rank=rank).sha256
    assert done.stderr == b""


def test_what_is_not_in_the_cache_is_refused_offline(hub: Path) -> None:
    done = run_python(LOAD, "hf://owner/other", HF_HOME=str(hub), HF_HUB_OFFLINE="1")
    assert re.fullmatch(rb"Error: cannot fetch hf://owner/other: .*; .*\n", done.stdout)
    assert done.stderr == b""


@pytest.mark.parametrize(
    "address", ["hf://", "hf://name", "hf://a/b/c", "hf://a/b@", "hf://a/b@c d"]
)
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(LorakitError, match="is no hub address"):
        load_adapter(address)


ANSWERS = {
    "missing/repo": (401, "RepoNotFound", b"there is no such repository"),
    "gated/repo": (403, "GatedRepo", b"it is gated"),
    "no/revision": (404, "RevisionNotFound", b"it has no revision v9"),
    "only/pickle": (404, "EntryNotFound", b"it has no adapter_config.json"),
    "broken/server": (501, "", b"cannot fetch"),
}


@pytest.fixture
def endpoint() -> Iterator[str]:
    """Serve ANSWERS, as the hub would give them, on this machine."""

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            status, code, _ = ANSWERS["/".join(self.path.split("/")[1:3])]
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Repo-Commit", "a" * 40)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("repo", ANSWERS)
def test_what_the_hub_refuses_becomes_one_line(repo: str, endpoint: str, tmp_path: Path) -> None:
    done = run_python(
        LOAD, f"hf://{repo}@v9", HF_HOME=str(tmp_path), HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0"
    )
    assert ANSWERS[repo][2] in done.stdout
    assert re.fullmatch(rb"Error: cannot fetch hf://[^\n]*: [^\n]*; [^\n]*\n", done.stdout)
    assert done.stderr == b""
