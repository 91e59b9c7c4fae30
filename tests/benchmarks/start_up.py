"""What the program takes to start: its help, `inspect`, and a first step of `train-adapter`.

Three comparisons of whole processes, each in turns: `lorakit --help` against a program of click
with one command; `inspect` of an adapter of 100 MB against reading and hashing that file in Python;
and `train-adapter` on two records of the model that ships with lorakit, a single step, against the
same written by hand with transformers and PEFT. The ratio of each is the peer's time by ours.

    python -m tests.benchmarks.start_up [--rounds 5] [--megabytes 100]
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorakit.adapters.adapter import Adapter, tensors_of
from lorakit.adapters.storage import save_adapter
from lorakit.adapters.targets import peft_config
from tests.benchmarks.commands import LORAKIT, compared, costs_in_turns, install
from tests.benchmarks.program import main, option
from tests.benchmarks.result import Result

RANK, WIDTH = 64, 4096  # of the adapter
BARE = """
import click

@click.group()
def program() -> None:
    "Do one thing."

@program.command()
def do() -> None:
    "Do it."

program()
"""
HASH = "import hashlib, sys; hashlib.sha256(open(sys.argv[1], 'rb').read()).hexdigest()"
BY_HAND = """
import sys
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
optimiser = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
ids = tokenizer("the cat sat on the mat", return_tensors="pt").input_ids
model(input_ids=ids, labels=ids).loss.backward()
optimiser.step()
model.save_pretrained(sys.argv[2])
"""


@dataclass(frozen=True)
class Options:
    rounds: int = option(5, "turns of each side")
    megabytes: int = option(100, "the size of the adapter that is inspected")


SMOKE = Options(rounds=1, megabytes=5)


def measure(options: Options) -> list[Result]:
    """Return the three comparisons."""
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, options.megabytes)
        environment = install(folder)
        for what, (ours, peer) in sides(folder).items():
            lines = {"ours": ours, "peer": peer}
            costs = costs_in_turns(lines, environment, folder, options.rounds)
            results.append(compared(f"start_up: {what}", costs["ours"], costs["peer"], {}))
    return results


def prepare(folder: Path, megabytes: int) -> None:
    """Write an adapter of this size and two records."""
    draw, modules = np.random.default_rng(0), megabytes * 10**6 // (2 * RANK * WIDTH * 4)
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(modules)]
    shapes = ((RANK, WIDTH), (WIDTH, RANK))
    pairs = [[draw.standard_normal(shape, np.float32) for shape in shapes] for _ in names]
    factors = {name: (a, b) for name, (a, b) in zip(names, pairs, strict=True)}
    config = {
        **peft_config(dict.fromkeys(names, RANK), base=None, alpha=16),
        "target_modules": ["q_proj"],
    }
    save_adapter(Adapter(tensors_of(factors), config), str(folder / "big.safetensors"))
    record = {"prompt": "the cat sat on", "completion": " the mat"}
    (folder / "data.jsonl").write_text(2 * (json.dumps(record) + "\n"), encoding="utf-8")


def sides(folder: Path) -> dict[str, tuple[Sequence[str], Sequence[str]]]:
    """Return both command lines of every comparison, ours first."""
    python = (sys.executable, "-c")
    tiny = str(folder / "lorakit" / "tiny")
    train = ("train-adapter", "-q", "--data", "data.jsonl", "--epochs", "1", "-o", "a.safetensors")
    return {
        "help": ((*LORAKIT, "--help"), (*python, BARE, "--help")),
        "inspect": (
            (*LORAKIT, "inspect", "big.safetensors", "-o", "big.json"),
            (*python, HASH, "big.safetensors"),
        ),
        "first step": ((*LORAKIT, *train), (*python, BY_HAND, tiny, "by-hand")),
    }


if __name__ == "__main__":
    main(__doc__, measure, Options(), SMOKE)
