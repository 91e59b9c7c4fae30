"""The Snakemake workflow: its command lines are lorakit's, and a killed run goes on."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorakit.cli import load_command
from tests.support.program import ENVIRONMENT, PROGRAM, wait_for

WORKFLOW = Path(__file__).parents[1] / "examples" / "workflow"
SYSTEMS = ["tgt", "xs+wl", "xs+wl+tgt.pruned"]


def snakemake(folder: Path, *options: str) -> list[str]:
    """Return the command line that runs the workflow in a folder."""
    profile = ["--workflow-profile", str(WORKFLOW / "profiles" / "local"), "--cores", "2"]
    place = ["--snakefile", str(WORKFLOW / "Snakefile"), "--directory", str(folder)]
    return [sys.executable, "-m", "snakemake", *place, *profile, *options]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(PROGRAM).parent), os.environ.get("PATH", "")])
    return {**ENVIRONMENT, "PATH": path, "PYTHONWARNINGS": "default"}


def finished(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment(), capture_output=True, encoding="utf-8", check=False
    )


def lines_of(printed: str) -> list[list[str]]:
    """Return the words of each lorakit command that a dry run prints, without redirections."""
    lines = re.findall(r"\blorakit .*", printed)
    commands = [command for line in lines for command in line.split(";") if "lorakit" in command]
    return [shlex.split(re.sub(r" 2>>? .*", "", command)) for command in commands]


CONFIGS = {"config": [], "paper1": ["--configfile", str(WORKFLOW / "paper1.yaml")]}


@pytest.mark.parametrize("config", CONFIGS)
def test_every_line_of_a_config_is_a_command_that_lorakit_takes(
    config: str, tmp_path: Path
) -> None:
    done = finished(snakemake(tmp_path, *CONFIGS[config], "--config", "data=/raw", "--dry-run"))
    assert done.returncode == 0, done.stdout + done.stderr
    commands = lines_of(done.stdout + done.stderr)
    assert {words[1] for words in commands} == {
        *("build-dataset", "train-adapter", "merge", "generate", "score"),
    }
    for words in commands:
        context = load_command(words[1]).make_context(words[1], words[2:])
        assert context.params["output"], words


def test_the_systems_of_the_papers_script_are_those_of_the_config() -> None:
    """Tables 2 and 4 of examples/real/paper1.sh, whose `chosen` search is a grid here."""
    import yaml

    script = (WORKFLOW.parent / "real" / "paper1.sh").read_text("utf-8")
    config: dict[str, Any] = yaml.safe_load((WORKFLOW / "paper1.yaml").read_text("utf-8"))
    for table, content in config["tables"].items():
        (call,) = re.findall(rf"compare {table} (.*?[^\\])\n", script, flags=re.S)
        baseline, *names = call.replace("\\\n", " ").split()
        assert content["baseline"] == baseline
        assert content["systems"] == [name.removesuffix(".jsonl") for name in names]


def small_config(path: Path) -> Path:
    """Write the config of two tasks, three systems and two seeds on a few records."""
    related = "--lr 6e-3 --batch-size 2 --epochs 8 --patience 8"
    config = {
        "model": "tiny",
        "seeds": [0, 1],
        "common": "--dtype float32",
        "training": "--lr 3e-3 --batch-size 4 --epochs 2",
        "generation": "--max-new-tokens 8",
        "scoring": "--metric rougeL",
        "related": {
            name: {
                "pool": f"microworld {name} --sample 14",
                "train": 10,
                "val": 4,
                "options": related,
            }
            for name in ("headline", "howto")
        },
        "tasks": {
            task: {
                "train": f"microworld {task} --sample 8",
                "val": f"microworld {task} --split validation --sample 4",
                "test": f"microworld {task} --split test --sample 4",
                "related": {"xs": "headline", "wl": "howto"},
            }
            for task in ("title", "impression")
        },
        "systems": {
            "tgt": {"train": "--rank 4"},
            "xs+wl": {"merge": ["xs", "wl"], "options": "--prune-ratio 0"},
            "xs+wl+tgt.pruned": {
                "merge": ["xs", "wl", "tgt"],
                "options": "--prune-ratio 0,0.1",
            },
        },
        "tables": {"table2": {"baseline": "tgt", "systems": SYSTEMS}},
    }
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


@pytest.mark.slow
def test_a_killed_experiment_goes_on_to_its_tables_and_then_has_nothing_to_do(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "work"
    options = ["--configfile", str(small_config(tmp_path / "small.json"))]
    command = snakemake(folder, *options)
    running = subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    checkpoint = folder / "related" / "headline" / "adapter.safetensors.resume"
    wait_for(checkpoint.exists, seconds=1200)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert checkpoint.exists(), "the job was to be killed before its end"
    assert not (folder / "related" / "headline" / "adapter.safetensors").exists()

    assert finished([*command, "--unlock"]).returncode == 0
    done = finished(command)
    assert done.returncode == 0, done.stdout + done.stderr
    log = (folder / "related" / "headline" / "adapter.log").read_text("utf-8")
    assert "going on after" in log
    for task in ("title", "impression"):
        table = (folder / task / "table2.txt").read_text("utf-8")
        assert [name for name in SYSTEMS if name not in table] == []
        lines = (folder / task / "table2.scores.jsonl").read_text("utf-8").splitlines()
        scores = [json.loads(line) for line in lines]
        assert [score["system"] for score in scores] == SYSTEMS
        assert [len(score["runs"]["rougeL"]) for score in scores] == [2, 2, 2]

    results = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*") if path.is_file()}
    results = {path: at for path, at in results.items() if ".snakemake" not in path.parts}
    again = finished(command)
    assert "Nothing to be done" in again.stdout + again.stderr
    assert {path: path.stat().st_mtime_ns for path in results} == results
