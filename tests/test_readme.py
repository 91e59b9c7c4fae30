"""The README is held to the program: every command is named, every shell example runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lorakit.cli import COMMANDS
from tests.support.program import shell

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
OWN_MODEL = "Your own model and data"


def examples(section: str) -> str:
    """Return the shell lines of a section, as one script."""
    body = re.split(rf"^## {re.escape(section)}$", README, flags=re.M)[1].split("\n## ")[0]
    blocks = re.findall(r"^```sh\n(.*?)^```$", body, flags=re.M | re.S)
    assert blocks, f"the section {section!r} has no shell example"
    return "".join(blocks)


def sections_with_examples() -> list[str]:
    return [part.split("\n")[0] for part in README.split("\n## ")[1:] if "```" in part]


def test_every_command_is_documented() -> None:
    table = README.split("## Commands")[1]
    for name in COMMANDS:
        assert re.search(rf"^\| `{name}[ `]", table, flags=re.M), name


def test_every_shell_example_is_run_by_a_test() -> None:
    assert sections_with_examples() == ["A tour", OWN_MODEL]
    assert README.count("```") == 2 * README.count("```sh\n"), "only shell examples are fenced"


def test_the_tour_runs_on_the_shipped_model(tmp_path: Path) -> None:
    done = shell("set -e\n" + examples("A tour"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert '"rougeL"' in done.stdout
    assert (tmp_path / "folder" / "adapter_config.json").is_file()


@pytest.mark.slow
def test_the_commands_run_on_a_real_model_and_real_data(shared: Path, tmp_path: Path) -> None:
    """From SciTLDR's raw file (1992 training records) to scores, on a pretrained Llama."""
    (tmp_path / "SciTLDR").symlink_to(shared / "data" / "scitldr")
    (tmp_path / "my-model").symlink_to(shared / "models" / "stories260K")
    done = shell("set -e\n" + examples(OWN_MODEL), tmp_path)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "scitldr.train.jsonl").read_text().splitlines()) == 1992
    assert "--truncate cut" in done.stderr
    assert '"rouge1"' in done.stdout
