"""A real server, `transformers serve`, with the tiny model and a chat template."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorakit


def save_tiny(folder: Path, template: str) -> str:
    """Write a copy of tiny with a chat template into a folder; return its path."""
    for path in (Path(lorakit.__file__).parent / "tiny").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "chat_template.jinja").write_text(template)
    return str(folder)


@contextlib.contextmanager
def serving_tiny(folder: Path, template: str) -> Iterator[tuple[str, str]]:
    """Yield the URL of a server and the name of its model, a copy of tiny in `folder`."""
    with serving_model(save_tiny(folder, template), folder / "log") as server:
        yield server


@contextlib.contextmanager
def serving_model(model: str, log: Path) -> Iterator[tuple[str, str]]:
    """Yield the URL of a server of the model in a folder, and the model's name."""
    for package in ("fastapi", "uvicorn", "openai"):
        if importlib.util.find_spec(package) is None:
            pytest.skip("transformers' extra `serving` is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "from transformers.cli.transformers import main; main()"
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with open(log, "wb") as stream:
        server = subprocess.Popen(
            [sys.executable, "-c", code, "serve", model, *options],
            stdout=stream,
            stderr=stream,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    try:
        _wait_until_healthy(port, server, log)
        yield f"http://127.0.0.1:{port}/v1", model
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait_until_healthy(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + 300
    while True:
        try:
            with opener.open(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
