"""Completion as people meet it: keys pressed in a real shell, in a pseudo-terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from lorakit.adapters.storage import save_adapter
from lorakit.cli import COMMANDS, lorakit
from tests.support.adapters import tiny
from tests.support.program import ENVIRONMENT, PROGRAM

SHELLS = {
    "bash": ["bash", "--noprofile", "--norc", "-i"],
    "zsh": ["zsh", "-f", "-i"],
    "fish": ["fish", "--no-config", "-i"],
}
SETUPS = {
    "bash": "PS1='> '; bind 'set bell-style none'; eval \"$(lorakit completion bash)\"",
    "zsh": "PS1='> '; autoload -Uz compinit; compinit -u -d $PWD/.dump; "
    'eval "$(lorakit completion zsh)"',
    "fish": "lorakit completion fish | source",
}
SECONDS = 60


def answers(words: str, cwd: Path, **variables: str) -> list[str]:
    """Return what the program offers for the last of some words, as a line for bash each."""
    parts = words.split(" ")
    done = subprocess.run(
        [PROGRAM],
        env={
            **ENVIRONMENT,
            "_LORAKIT_COMPLETE": "bash_complete",
            "COMP_WORDS": "\n".join(parts),
            "COMP_CWORD": str(len(parts) - 1),
            **variables,
        },
        cwd=cwd,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


CASES = {
    "commands": ("lorakit st", ["plain,strip-layers"]),
    "options": ("lorakit convert --ou", ["plain,--output"]),
    "files of an option": ("lorakit generate --data te", ["file,te"]),
    "files of --val": ("lorakit train-adapter --val ", ["file,"]),
    "files of -o": ("lorakit convert a -o x", ["file,x"]),
    "adapters": ("lorakit merge a.safetensors x", ["file,x"]),
    "predictions": ("lorakit score p", ["file,p"]),
    "recipes": ("lorakit build-dataset sc", ["plain,scitldr"]),
    "sources": ("lorakit build-dataset csv a", ["file,a"]),
    "tasks of microworld": ("lorakit build-dataset microworld head", ["plain,headline"]),
    "metrics": ("lorakit score --metric rougeL", ["plain,rougeL", "plain,rougeLsum"]),
    "more metrics": ("lorakit score --metric rougeL,ch", ["plain,rougeL,chrf"]),
    "one metric": ("lorakit find-boundary --metric ch", ["plain,chrf"]),
    "loss": ("lorakit merge --select-by lo", ["plain,loss"]),
    "methods": ("lorakit merge --method dare", ["plain,dare-linear", "plain,dare-ties"]),
    "layers of the model": ("lorakit train-adapter --layers 4-", ["plain,4-5", "plain,4-6"]),
    "a choice, not layers": ("lorakit find-boundary a --keep r", ["plain,random"]),
    "layers of the adapter": ("lorakit strip-layers a.safetensors --keep 0,", ["plain,0,1"]),
    "boundaries": ("lorakit strip-layers a.safetensors --boundary 2", ["plain,2"]),
    "layers to scale from": ("lorakit scale-layers a.safetensors --from 1", ["plain,1"]),
    "ways to measure": ("lorakit strip-layers --by ", ["plain,importance", "plain,output"]),
    "boundary files": ("lorakit strip-layers a.safetensors --boundary f", ["file,f"]),
    "models": ("lorakit generate --model ti", ["plain,tiny"]),
    "a cached model": ("lorakit generate --model own", ["plain,owner/name"]),
    "folders of models": ("lorakit generate --model ./", ["file,./"]),
    "shells": ("lorakit completion f", ["plain,fish"]),
    "ratios": ("lorakit merge --prune-ratio a", ["plain,auto"]),
}


@pytest.mark.parametrize(("words", "expected"), CASES.values(), ids=CASES.keys())
def test_a_word_is_completed(words: str, expected: list[str], tmp_path: Path) -> None:
    save_adapter(tiny(layers=2), str(tmp_path / "a.safetensors"))
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    model = tmp_path / "base"
    model.mkdir()
    (model / "config.json").write_text('{"num_hidden_layers": 7}')
    assert answers(words, tmp_path, HF_HOME=str(tmp_path), LORAKIT_MODEL=str(model)) == expected


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_printed(shell: str) -> None:
    done = CliRunner().invoke(lorakit, ["completion", shell], catch_exceptions=False)
    assert "_LORAKIT_COMPLETE" in done.stdout
    assert done.exit_code == 0


class Terminal:
    """An interactive shell in a pseudo-terminal."""

    def __init__(self, shell: str, folder: Path) -> None:
        path = os.pathsep.join([str(Path(PROGRAM).parent), os.environ.get("PATH", "")])
        variables = {**ENVIRONMENT, "PATH": path, "TERM": "dumb", "HOME": str(folder)}
        variables["LORAKIT_MODEL"] = "tiny"
        self.process, self.screen = pty.fork()
        if self.process == 0:
            os.chdir(folder)
            os.execvpe(SHELLS[shell][0], SHELLS[shell], variables)
        self.seen = ""

    def type(self, keys: str) -> None:
        os.write(self.screen, keys.encode())

    def wait_for(self, pattern: str) -> None:
        """Read until the pattern appears in what came since the last call."""
        end = time.monotonic() + SECONDS
        while not (match := re.search(pattern, self.seen)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.seen!r}"
            if select.select([self.screen], [], [], 0.2)[0]:
                self.seen += os.read(self.screen, 65536).decode("utf-8", errors="replace")
        self.seen = self.seen[match.end() :]


@pytest.fixture(params=SHELLS)
def terminal(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Terminal]:
    """A shell that has sourced the script, in a folder with records and an adapter."""
    shell = request.param
    if shutil.which(SHELLS[shell][0]) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "test.jsonl").write_text("")
    save_adapter(tiny(), str(tmp_path / "xs.safetensors"))
    opened = Terminal(shell, tmp_path)
    opened.type(f"{SETUPS[shell]}; echo rea''dy\r")
    opened.wait_for(r"ready\r?\n")
    yield opened
    os.close(opened.screen)
    os.waitpid(opened.process, 0)


def test_a_real_shell_completes_commands_files_and_names(terminal: Terminal) -> None:
    for begun, completed in {
        "echo '['; lorakit bui": r"build-dataset",
        "lorakit generate --data te": r"test\.jsonl",
        "lorakit inspect x": r"xs\.safetensors",
        "lorakit score --metric rougeL,ble": r"rougeL,bleu",
        "lorakit build-dataset scit": r"scitldr",
        "lorakit merge --method lorah": r"lorahub",
        "lorakit strip-layers xs.safetensors --keep 0,": r"0,1",
    }.items():
        terminal.type(begun)
        terminal.wait_for(re.escape(begun[-3:]))
        terminal.type("\t")
        rest = completed.replace("\\", "")
        tail = next(rest[k:] for k in range(len(rest), -1, -1) if begun.endswith(rest[:k]))
        terminal.wait_for(re.escape(tail))
        terminal.type("\x15")


def test_commands_are_completed_without_importing_them(tmp_path: Path) -> None:
    assert answers("lorakit ", tmp_path) == [f"plain,{name}" for name in COMMANDS]
