"""What the program takes to start: its help, `inspect`, and a first step of `train-adapter`.

Three comparisons in processor time, each in turns: `lorakit --help` against a program of click with
one command; `inspect` of an adapter of 100 MB against reading and hashing that file in Python; and
`train-adapter` on two records of the model that ships with lorakit, a single step, against the same
written by hand with transformers and PEFT. The ratio of each is the peer's time by ours.

    python -m tests.benchmarks.start_up [--rounds 5] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lorakit.adapters.adapter import Adapter, tensors_of
from lorakit.adapters.storage import save_adapter
from lorakit.adapters.targets import peft_config
from tests.benchmarks.commands import LORAKIT, as_text, comparison, in_turns, install

RANK, WIDTH, MODULES = 64, 4096, 48  # of the adapter: 100 MB
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


def prepare(folder: Path) -> None:
    """Write an adapter of 100 MB and two records."""
    draw = np.random.default_rng(0)
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(MODULES)]
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


def measure(folder: Path, environment: Mapping[str, str], rounds: int) -> list[dict[str, object]]:
    """Return the three comparisons."""
    results = []
    for name, (ours, peer) in sides(folder).items():
        costs = in_turns({"ours": ours, "peer": peer}, environment, folder, rounds)
        own, others = ([cost.processor for cost in costs[side]] for side in ("ours", "peer"))
        seconds = statistics.median(cost.seconds for cost in costs["ours"])
        results.append(comparison(f"start_up: {name}", "s", own, others, by_the_clock=seconds))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for result in measure(Path(folder), install(Path(folder)), options.rounds):
            print(json.dumps(result) if options.json else as_text(result), flush=True)


if __name__ == "__main__":
    main()
