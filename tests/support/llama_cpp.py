"""A real llama.cpp: the binaries that the npm package node-llama-cpp carries."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

VERSION = "3.22.1"
SCRIPT = Path(__file__).with_suffix(".mjs")
# The packages with binaries for the CPU alone, by system and machine.
BINARIES = {
    ("Linux", "x86_64"): "linux-x64",
    ("Linux", "aarch64"): "linux-arm64",
    ("Darwin", "x86_64"): "mac-x64",
    ("Darwin", "arm64"): "mac-arm64-metal",
}


@dataclass(frozen=True)
class Answer:
    """What llama.cpp makes of a prompt.

    `tokenized` is its text cut by llama.cpp; `generated` what follows greedily, `top` the log
    probabilities of the 50 likeliest first tokens.
    """

    tokenized: list[int]
    generated: list[int]
    top: Mapping[int, float]


def set_up() -> Path:
    """Return a folder, in the user's cache, in which node finds node-llama-cpp.

    Nothing that the packages would run or fetch once installed is run. Without npm, and where there
    are no binaries for this machine, the test is skipped.
    """
    binaries = BINARIES.get((platform.system(), platform.machine()))
    if shutil.which("npm") is None or binaries is None:
        pytest.skip("llama.cpp comes by npm, as node-llama-cpp, which is not here")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "lorakit" / f"node-llama-cpp-{VERSION}"
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text('{"private": true}')
        packages = [f"node-llama-cpp@{VERSION}", f"@node-llama-cpp/{binaries}@{VERSION}"]
        options = ["--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund"]
        subprocess.run(["npm", "install", *options, *packages], cwd=folder, check=True)
        (folder / "done").touch()
    return folder


def ask(
    folder: Path,
    model: Path,
    prompts: Mapping[str, Sequence[int]],
    *,
    lora: Path | None = None,
    length: int = 12,
) -> list[Answer]:
    """Return llama.cpp's answers to prompts, given as texts and as the tokens to go on from."""
    request = {
        "model": str(model),
        "lora": lora and str(lora),
        "length": length,
        "prompts": [{"text": text, "ids": list(ids)} for text, ids in prompts.items()],
    }
    done = subprocess.run(
        ["node", str(SCRIPT)],
        input=json.dumps(request),
        capture_output=True,
        encoding="utf-8",
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(prompts), done.stderr
    return [Answer(**{**answer, "top": dict(answer["top"])}) for answer in answers]
