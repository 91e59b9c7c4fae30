"""find-boundary --metric loss against the plain way: a forward pass for every boundary.

A random adapter on a model of SmolLM2-135M's shape (random weights, 30 layers), or on the model
that is given; the records are random tokens, or those of --data. Both sides read the same batches
in float32, boundary 0 too, in turns; each side's fastest turn counts. The losses must agree, and
the ratio of the times must not be above --at-most, or the run ends with an error.

    python tests/benchmarks/boundary_loss.py [--model FOLDER] [--data FILE] [--records 8]
        [--prompt 160] [--completion 40] [--rounds 3] [--at-most 0.6]
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

from lorakit.boundary.cuts import Cut, bottom
from lorakit.boundary.gates import Gates
from lorakit.boundary.layerwise import Losses, layerwise_for, read_alone
from lorakit.boundary.loss import TOKENS_PER_ROW
from lorakit.models.base import Base
from lorakit.models.batches import micro_batches
from lorakit.models.loading import load_base
from lorakit.models.lora import attach
from lorakit.models.tokens import Example
from lorakit.records.jsonl import load_records
from tests.benchmarks.find_boundary import random_adapter


def smollm2_shape(folder: Path) -> str:
    """Write a random Llama of SmolLM2-135M's shape beside tiny's tokenizer."""
    tiny = load_base("tiny", device=torch.device("cpu"), dtype=torch.float32)
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        initializer_range=0.05,  # so that its losses depend on the boundary
        bos_token_id=tiny.tokenizer.bos_token_id,
        eos_token_id=tiny.tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    return str(folder)


def random_examples(count: int, prompt: int, completion: int) -> list[Example]:
    """Return rows of random tokens whose parts differ by up to a quarter from these lengths."""
    draw = random.Random(0)

    def about(length: int) -> int:
        return draw.randint(length - length // 4, length + length // 4)

    examples = []
    for number in range(count):
        start, targets = about(prompt), about(completion)
        ids = tuple(draw.randrange(3, 4000) for _ in range(start + targets))
        examples.append(Example(ids, start, f"random:{number}"))
    return examples


class Timed(NamedTuple):
    """The losses by boundary, summed over the records, and the processor time they took, in
    seconds: that hangs less on what else runs on the machine than the time by the clock."""

    losses: dict[Cut, float]
    seconds: float


def timed(work: Callable[[], list[Losses]]) -> Timed:
    started = time.process_time()
    sums: dict[Cut, float] = {}
    for cut, part in work():
        sums[cut] = sums.get(cut, 0.0) + float(part.sum())
    return Timed(sums, time.process_time() - started)


def compare(base: Base, examples: Sequence[Example], rounds: int) -> tuple[Timed, Timed]:
    """Return each side's fastest turn, ours first; ours includes its trial of the model."""
    cuts = [bottom(k, base.layers) for k in range(base.layers, -1, -1)]
    batches = micro_batches(examples, TOKENS_PER_ROW * 16)
    with Gates(attach(base, random_adapter(base))).standing() as gates:

        def together() -> list[Losses]:
            reader = layerwise_for(base, gates, examples, cuts)
            assert reader is not None, "the model cannot be read layer by layer"
            return [losses for rows in batches for losses in reader.read(rows, cuts)]

        def apart() -> list[Losses]:
            return [losses for rows in batches for losses in read_alone(base, gates, rows, cuts)]

        turns = [(timed(together), timed(apart)) for _ in range(rounds)]
    ours, theirs = zip(*turns, strict=True)
    return min(ours, key=lambda turn: turn.seconds), min(theirs, key=lambda turn: turn.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder; without it a random model of SmolLM2's shape")
    parser.add_argument("--data", help="records; without it rows of random tokens")
    parser.add_argument("--records", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=160, help="tokens of a random prompt")
    parser.add_argument("--completion", type=int, default=40, help="tokens of a random completion")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--at-most", type=float, default=0.6, help="the largest ratio that passes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        name = options.model or smollm2_shape(Path(folder))
        base = load_base(name, device=torch.device("cpu"), dtype=torch.float32)
    examples = random_examples(options.records, options.prompt, options.completion)
    if options.data:
        encoder = base.encoder(chat="auto")
        records, _ = load_records(options.data, "prompt", "completion")
        examples = [encoder.example(record) for record in records[: options.records]]
    ours, theirs = compare(base, examples, options.rounds)
    farthest = max(abs(ours.losses[cut] - loss) / loss for cut, loss in theirs.losses.items())
    ratio = ours.seconds / theirs.seconds
    print(f"{len(theirs.losses)} boundaries, {len(examples)} records")
    print(f"a pass for each boundary {theirs.seconds:8.2f} s")
    print(f"layers below shared      {ours.seconds:8.2f} s, ratio {ratio:.3f}")
    print(f"largest relative difference of a loss: {farthest:.1e}")
    if len({f"{loss:.4e}" for loss in theirs.losses.values()}) == 1:
        sys.exit("the boundaries do not differ")
    if farthest > 1e-5 or ratio > options.at_most:
        sys.exit(f"the losses differ, or the ratio is above {options.at_most}")


if __name__ == "__main__":
    main()
