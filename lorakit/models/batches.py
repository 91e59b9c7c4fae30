"""Cutting batches into micro-batches and laying them out as tensors.

Rows are aligned on the right: every completion ends in the last column, so that a model asked for
its last few logits (`logits_to_keep`) computes the output head only where a loss is due.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from lorakit.models.tokens import Example

IGNORED = -100


class MicroBatch(NamedTuple):
    """Rows that go through the model together.

    input_ids (rows, length) int64; mask (rows, length) bool, None where no row is padded;
    labels (rows, kept) int64 for the last `kept` positions, IGNORED where no loss is due.
    """

    input_ids: torch.Tensor
    mask: torch.Tensor | None
    labels: torch.Tensor


def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """Return 0 … count-1 in the order of an epoch; the same on every machine."""
    order = list(range(count))
    random.Random(f"order:{seed}:{epoch}").shuffle(order)
    return order


def micro_batches(examples: Sequence[Example], tokens: int) -> list[list[Example]]:
    """Cut examples, sorted by length, into runs of at most `tokens` tokens, padding counted.

    An example that is longer goes alone. Every position of a run is computed, so sorting keeps the
    padding small; the sum of their losses does not depend on the cut.
    """
    runs: list[list[Example]] = []
    for example in sorted(examples, key=lambda example: -len(example.ids)):
        if runs and (len(runs[-1]) + 1) * len(runs[-1][0].ids) <= tokens:
            runs[-1].append(example)
        else:
            runs.append([example])
    return runs


def epoch_batches(
    examples: Sequence[Example], batch_size: int, seed: int, epoch: int
) -> Iterator[list[Example]]:
    """Yield the batches of one optimiser step each, in the shuffled order of the epoch."""
    order = shuffled(len(examples), seed, epoch)
    for first in range(0, len(order), batch_size):
        yield [examples[place] for place in order[first : first + batch_size]]


def lay_out(rows: Sequence[Example], device: torch.device) -> MicroBatch:
    """Return the tensors of a micro-batch; a row's last token is only a label, never an input."""
    length = max(len(row.ids) for row in rows) - 1
    kept = max(row.targets for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    labels = torch.full((len(rows), kept), IGNORED, dtype=torch.int64)
    for place, row in enumerate(rows):
        tokens = torch.tensor(row.ids)
        ids[place, length - len(tokens) + 1 :] = tokens[:-1]
        mask[place, length - len(tokens) + 1 :] = True
        labels[place, kept - row.targets :] = tokens[row.start :]
    padding = None if bool(mask.all()) else mask.to(device)
    return MicroBatch(ids.to(device), padding, labels.to(device))
