"""A base that cannot be had is refused within seconds, in one line, before torch is imported."""

from __future__ import annotations

import functools
import os
import pty
import shutil
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lorakit.cli import load_command
from lorakit.reach import cached_models
from tests.support.adapters import ROOT
from tests.support.program import PROGRAM

SECONDS = 5  # for an answer, besides what a busy machine needs to start the program
CLOSED = "http://127.0.0.1:1"
TINY = ROOT / "lorakit" / "tiny"
COMMIT = "a" * 40
BARS_OFF = "HF_HUB_DISABLE_PROGRESS_BARS"
ROW = '{"prompt": "p", "completion": "c", "prediction": "c"}\n'


@pytest.fixture
def hanging() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def hub() -> Iterator[str]:
    """A hub that has `owner/tiny`, `a/gated` and, with the token `t`, `a/private`."""

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            repo, name = "/".join(self.path.split("/")[1:3]), self.path.split("/")[-1]
            is_open = repo == "owner/tiny"
            is_open |= repo == "a/private" and self.headers["Authorization"] == "Bearer t"
            path = TINY / name
            if repo == "api/models":
                self.refuse(404, "EntryNotFound")
            elif not is_open:
                self.refuse(401, "GatedRepo" if repo == "a/gated" else "RepoNotFound")
            elif not path.is_file():
                self.refuse(404, "EntryNotFound")
            else:
                self.send_response(200)
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", f'"{name}"')
                self.send_header("Content-Length", str(path.stat().st_size))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(path.read_bytes())

        do_GET = do_HEAD  # noqa: N815

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def environment(endpoint: str, home: Path, **variables: str) -> dict[str, str]:
    return {
        # A command that ran with -q in the tests' own process has left the last of these there.
        **{k: v for k, v in os.environ.items() if k not in ("LORAKIT_MODEL", BARS_OFF)},
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "PYTHONWARNINGS": "error",
        "HF_HUB_DISABLE_XET": "1",
        **variables,
    }


PROBE = """
import sys
from lorakit.cli import main
try:
    main()
finally:
    assert not {"torch", "transformers"} & set(sys.modules), "something heavy was imported"
"""


@functools.cache
def startup() -> float:
    """Return the seconds that importing what the program needs takes on this machine, now."""
    begun = time.monotonic()
    code = "import lorakit.cli, lorakit.commands.generate, huggingface_hub.file_download"
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.monotonic() - begun


def refusal(name: str, cwd: Path, variables: dict[str, str]) -> str:
    """Return what `generate --model NAME` says, having checked that it is one quick line."""
    (cwd / "r.jsonl").write_text(ROW)
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", PROBE, "generate", "--model", name, "--data", "r.jsonl"],
        capture_output=True,
        encoding="utf-8",
        cwd=cwd,
        env=variables,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert time.monotonic() - begun < SECONDS + startup()
    return done.stderr


def test_a_hub_that_is_not_there_is_one_quick_line(tmp_path: Path) -> None:
    line = refusal("my-modle", tmp_path, environment(CLOSED, tmp_path))
    assert line.startswith(
        "Error: cannot load the model my-modle: there is no such folder here, and "
        f"{CLOSED} cannot be reached (ConnectError); give a folder"
    )


def test_a_hub_that_hangs_is_one_quick_line(hanging: str, tmp_path: Path) -> None:
    line = refusal("my/modle", tmp_path, environment(hanging, tmp_path))
    assert f"and {hanging} " in line


def test_offline_the_hub_is_not_asked(hanging: str, tmp_path: Path) -> None:
    variables = environment(hanging, tmp_path, HF_HUB_OFFLINE="1")
    assert "it is not in the cache (HF_HUB_OFFLINE is set); " in refusal("m", tmp_path, variables)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("owner/none", "has none of this name, or a private one"),
        ("a/private", "has none of this name, or a private one"),
        ("a/gated", "it is gated: ask for access on its page"),
    ],
)
def test_what_the_hub_refuses_is_one_quick_line(
    name: str, reason: str, hub: str, tmp_path: Path
) -> None:
    assert reason in refusal(name, tmp_path, environment(hub, tmp_path))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("x.gguf", "lorakit reads no GGUF; give the folder or hub id of the model that it was"),
        ("none/x.Q4.gguf", "lorakit reads no GGUF; "),
        ("r.jsonl", "it is a file; give a folder with config.json"),
        ("./none", "there is no such folder; "),
        ("a/b/c", "there is no such folder; "),
        ("./my-modle", "there is no such folder (did you mean ./my-model?); "),
        ("my-modle", "(did you mean my-model?); "),
        ("tinny", "(did you mean tiny?); "),
    ],
)
def test_a_name_that_is_no_model_is_told_what_to_do(name: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-model" / "config.json").write_text("{}")
    assert reason in refusal(name, tmp_path, environment(CLOSED, tmp_path))


COMMANDS = {
    "train-adapter": ("--data", "r.jsonl"),
    "merge": ("a.safetensors", "--data", "r.jsonl"),
    "find-boundary": ("a.safetensors", "--data", "r.jsonl"),
    "inspect": ("a.safetensors", "--importance", "--data", "r.jsonl"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_with_a_base_asks_first(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from lorakit.errors import LorakitError

    monkeypatch.chdir(tmp_path)
    with pytest.raises(LorakitError, match="no-such-model"):
        CliRunner().invoke(
            load_command(command),
            [*COMMANDS[command], "--model", "no-such-model"],
            catch_exceptions=False,
        )


def generate(cwd: Path, variables: dict[str, str], *options: str) -> tuple[int, str]:
    """Run `generate --model owner/tiny` in a terminal; return its code and what it showed."""
    (cwd / "r.jsonl").write_text(ROW)
    process, screen = pty.fork()
    if process == 0:
        termios.tcsetwinsize(0, (24, 120))
        os.chdir(cwd)
        words = ["generate", "--model", "owner/tiny", "--data", "r.jsonl", "-o", "out.jsonl"]
        os.execve(PROGRAM, [PROGRAM, *words, "--max-new-tokens", "1", *options], variables)
    shown = b""
    try:
        while data := os.read(screen, 65536):
            shown += data
    except OSError:  # the terminal's other end is closed
        pass
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), shown.decode()


def test_downloads_show_bars_on_a_terminal_unless_quiet(hub: str, tmp_path: Path) -> None:
    homes = {options: tmp_path / f"home{len(options)}" for options in ((), ("-q",))}
    codes = {o: generate(tmp_path, environment(hub, home), *o) for o, home in homes.items()}
    assert codes["-q",] == (0, "")
    code, shown = codes[()]
    assert code == 0, shown
    assert "model.safetensors" in shown
    assert "100%" in shown


def test_a_cached_model_is_used_where_the_hub_cannot_be_reached(hub: str, tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text(ROW)
    words = ["generate", "--model", "owner/tiny", "--data", "r.jsonl", "--max-new-tokens", "1"]
    outputs = []
    for endpoint in (hub, CLOSED):
        done = subprocess.run(
            [PROGRAM, *words],
            capture_output=True,
            encoding="utf-8",
            cwd=tmp_path,
            env=environment(endpoint, tmp_path / "home"),
            check=False,
        )
        assert done.stderr == "Note: no ADAPTER: the base model answers zero-shot\n"
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1] != ""


def test_a_token_opens_a_private_model(hub: str, tmp_path: Path) -> None:
    script = "from lorakit.reach import check_model; check_model('a/private'); print('there')"
    variables = environment(hub, tmp_path, HF_TOKEN="t")
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, env=variables, check=False
    )
    assert done.stdout == b"there\n", done.stderr


def test_cached_models_are_listed_as_the_hubs_library_finds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    snapshot = tmp_path / "hub" / "models--owner--a-b" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    shutil.copy(TINY / "config.json", snapshot)
    (tmp_path / "hub" / "models--owner--empty").mkdir()
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert cached_models() == ["owner/a-b"]
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert cached_models() == ["owner/a-b"]
