"""Micro-batches without padding: rows one after another in one sequence, each seeing itself alone.

Positions start at 0 in every row, and logits are computed only where a loss is due, so that nothing
is computed in vain.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lorakit.models.attention import BY_ROW, packed
from lorakit.models.tokens import Example

_NEEDED = {"position_ids", "logits_to_keep"}
_REFUSALS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class Pack(NamedTuple):
    """Rows in one sequence.

    input_ids and position_ids (1, tokens) int64; `lengths` of the rows; places (targets,) int64 of
    the tokens whose next one is learnt, row after row, and labels (targets,), those next ones.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    lengths: list[int]
    places: torch.Tensor
    labels: torch.Tensor


def packs(examples: Sequence[Example], tokens: int, *, at_least: int = 1) -> list[list[Example]]:
    """Share examples out into as few packs of at most `tokens` tokens as the longest-first rule.

    Each goes into the pack that is the smallest so far, so that packs are of about one size. An
    example that is longer goes alone; there are `at_least` packs where there are as many examples.
    """
    ordered = sorted(examples, key=lambda example: -len(example.ids))
    total = sum(len(example.ids) for example in ordered)
    count = max(at_least, -(-total // tokens), 1)
    while True:
        found: list[list[Example]] = [[] for _ in range(min(count, len(ordered)))]
        sizes = [0] * len(found)
        for example in ordered:
            smallest = sizes.index(min(sizes))
            found[smallest].append(example)
            sizes[smallest] += len(example.ids)
        if all(len(p) == 1 or size <= tokens for p, size in zip(found, sizes, strict=True)):
            return found
        count += 1


def pack(rows: Sequence[Example], device: torch.device) -> Pack:
    """Return the tensors of a pack; a row's last token is only a label, never an input."""
    ids: list[int] = []
    places: list[int] = []
    labels: list[int] = []
    for row in rows:
        places += range(len(ids) + row.start - 1, len(ids) + len(row.ids) - 1)
        labels += row.ids[row.start :]
        ids += row.ids[:-1]
    lengths = [len(row.ids) - 1 for row in rows]
    positions = torch.cat([torch.arange(length) for length in lengths])
    return Pack(
        torch.tensor([ids], device=device),
        positions[None].to(device),
        lengths,
        torch.tensor(places, device=device),
        torch.tensor(labels, device=device),
    )


def target_logits(model: Any, batch: Pack) -> torch.Tensor:
    """Return the logits (targets, vocabulary) at the places of a pack, by the model's own head."""
    with packed(batch.lengths):
        found: torch.Tensor = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            logits_to_keep=batch.places,
            use_cache=False,
        ).logits
    return found[0]


@torch.no_grad()
def can_pack(model: Any) -> bool:
    """Whether a model attends by row, by its word and by trial.

    In the trial a row's logits, packed behind another, are those of the row alone, and to the bit
    the same behind whatever other row: a state or a mixing of neighbours that does not stop at the
    row's start would change them.
    """
    if model.config.get_text_config()._attn_implementation != BY_ROW:
        return False
    if not set(inspect.signature(model.forward).parameters) >= _NEEDED:
        return False
    row = _trial_row(model, 5, 1)
    try:
        behind = [
            target_logits(model, pack([_trial_row(model, 4, first), row], model.device))[-4:]
            for first in (6, 11)
        ]
        alone = model(input_ids=torch.tensor([row.ids[:-1]], device=model.device)).logits[0]
    except _REFUSALS:
        return False
    near = (behind[0] - alone).abs().max() <= 0.05 * alone.abs().max()
    return bool(near) and torch.equal(*behind)


def _trial_row(model: Any, length: int, first: int) -> Example:
    size = model.config.get_text_config().vocab_size
    return Example(tuple((first + place) % size for place in range(length)), 1, "a trial")
