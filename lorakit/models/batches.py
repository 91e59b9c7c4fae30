"""Which rows go through the model together, and how they lie in its tensors: padded or packed.

Logits are needed only where a token is learnt. So a row's last token is only a label, never an
input, and rows are laid out so that the output head computes little else. Take the rows
1 5 6 | 7 2 and 1 | 8 2, learnt from the bar on:

    padded (any model)              packed (models that keep rows apart, see row_masks.py)
    input_ids  1 5 6 7              input_ids     1 5 6 7 1 8
               0 0 1 8              position_ids  0 1 2 3 0 1      lengths  4 2
    labels     7 2                  places        2 3 4 5
               8 2                  labels        7 2 8 2

Padded rows are aligned on the right, so that every completion ends in the last column and the last
few logits of a model (`logits_to_keep`) are all that are needed. Packed rows have no padding: each
counts its positions from 0 and sees only itself, and `places` are the tokens whose next token is
learnt.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from lorakit.models.architecture import Model, forward_parameters, text_config
from lorakit.models.attention import BY_ROW
from lorakit.models.last_layer import last_layer_at
from lorakit.models.row_masks import packed
from lorakit.models.tokens import Example
from lorakit.runs.processes import process_count

IGNORED = -100
NEEDED_TO_PACK = {"position_ids", "logits_to_keep"}
# What a model raises whose code cannot read packed rows.
_REFUSALS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class MicroBatch(NamedTuple):
    """Padded rows that go through the model together.

    input_ids (rows, length) int64; mask (rows, length) bool, None if no row is padded;
    labels (rows, width) int64 for the last `width` positions, IGNORED where there is no loss.
    """

    input_ids: torch.Tensor
    mask: torch.Tensor | None
    labels: torch.Tensor


class Pack(NamedTuple):
    """Rows one after another in one sequence.

    input_ids and position_ids (1, tokens) int64; `lengths` of the rows; places (targets,) int64 of
    the tokens whose next token is learnt, row after row; labels (targets,), those next tokens.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    lengths: list[int]
    places: torch.Tensor
    labels: torch.Tensor


# — which rows go together —


def tokens_at_once(asked: int | None, device: torch.device) -> int:
    """Return the most tokens of a micro-batch: those asked for, else what suits the device.

    More of them fill a GPU. Several processes share micro-batches out, and need more of them.
    """
    return asked or (8192 if device.type == "cuda" and process_count() == 1 else 2048)


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """Return 0 … count-1 in the seeded order of an epoch, the same on every machine."""
    order = list(range(count))
    random.Random(f"order:{seed}:{epoch}").shuffle(order)
    return order


def epoch_batches(
    examples: Sequence[Example], batch_size: int, seed: int, epoch: int
) -> Iterator[list[Example]]:
    """Yield the batches of one optimiser step each, in the shuffled order of the epoch."""
    order = epoch_order(len(examples), seed, epoch)
    for first in range(0, len(order), batch_size):
        yield [examples[index] for index in order[first : first + batch_size]]


def cut_into_runs(examples: Sequence[Example], tokens: int, *, packed: bool) -> list[list[Example]]:
    """Return runs of at most `tokens` tokens that go through a model, packed or padded."""
    return fill_packs(examples, tokens) if packed else micro_batches(examples, tokens)


def micro_batches(examples: Sequence[Example], tokens: int) -> list[list[Example]]:
    """Sort examples by length and cut them into runs of at most `tokens` tokens with padding.

    A longer example goes alone. Every position of a run is computed, and sorting keeps the padding
    small; the sum of the losses does not depend on how the examples are cut.
    """
    runs: list[list[Example]] = []
    for example in sorted(examples, key=lambda example: -len(example.ids)):
        if runs and (len(runs[-1]) + 1) * len(runs[-1][0].ids) <= tokens:
            runs[-1].append(example)
        else:
            runs.append([example])
    return runs


def fill_packs(
    examples: Sequence[Example], tokens: int, *, at_least: int = 1
) -> list[list[Example]]:
    """Distribute examples over as few packs of at most `tokens` tokens as the greedy rule allows.

    Going from the longest example to the shortest, each joins the smallest pack so far, so that
    packs are of similar size. An example longer than `tokens` goes alone. There are at least
    `at_least` packs, if there are that many examples.
    """
    ordered = sorted(examples, key=lambda example: -len(example.ids))
    total = sum(len(example.ids) for example in ordered)
    count = max(at_least, -(-total // tokens), 1)
    while (rows := _distributed(ordered, min(count, len(ordered)), tokens)) is None:
        count += 1
    return rows


def _distributed(ordered: Sequence[Example], count: int, tokens: int) -> list[list[Example]] | None:
    """Distribute examples, longest first, over `count` packs; None where they are too few."""
    rows: list[list[Example]] = [[] for _ in range(count)]
    sizes = [(0, place) for place in range(count)]  # a heap: the smallest, of equals the first
    for example in ordered:
        size, place = sizes[0]
        if size and size + len(example.ids) > tokens:
            return None
        rows[place].append(example)
        heapq.heapreplace(sizes, (size + len(example.ids), place))
    return rows


# — padded rows —


def lay_out(rows: Sequence[Example], device: torch.device) -> MicroBatch:
    """Return the tensors of padded rows, aligned on the right."""
    length = max(len(row.ids) for row in rows) - 1
    width = max(row.targets for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    labels = torch.full((len(rows), width), IGNORED, dtype=torch.int64)
    for index, row in enumerate(rows):
        tokens = torch.tensor(row.ids)
        ids[index, length - len(tokens) + 1 :] = tokens[:-1]
        mask[index, length - len(tokens) + 1 :] = True
        labels[index, width - row.targets :] = tokens[row.start :]
    padding = None if bool(mask.all()) else mask.to(device)
    return MicroBatch(ids.to(device), padding, labels.to(device))


def completion_logits(model: Model, batch: MicroBatch) -> torch.Tensor:
    """Return the logits (rows, width, vocabulary) where a micro-batch has labels.

    They come from the model's own forward, with soft-capping, head bias and so on; positions do not
    count the padding on the left.
    """
    inputs: dict[str, object] = {"input_ids": batch.input_ids, "use_cache": False}
    width = batch.labels.shape[1]
    parameters = forward_parameters(model)
    if batch.mask is not None:
        inputs["attention_mask"] = batch.mask.long()
        if "position_ids" in parameters:
            inputs["position_ids"] = (batch.mask.long().cumsum(-1) - 1).clamp_min(0)
    if "logits_to_keep" in parameters:
        inputs["logits_to_keep"] = width
    logits: torch.Tensor = model(**inputs).logits
    return logits[:, -width:]


# — packed rows —


def pack(rows: Sequence[Example], device: torch.device) -> Pack:
    """Return the tensors of packed rows."""
    ids: list[int] = []
    places: list[int] = []
    labels: list[int] = []
    for row in rows:
        places += range(len(ids) + row.start - 1, len(ids) + len(row.ids) - 1)
        labels += row.ids[row.start :]
        ids += row.ids[:-1]
    lengths = [len(row.ids) - 1 for row in rows]
    positions = [position for length in lengths for position in range(length)]
    parts = (ids, positions, places, labels)
    together = torch.tensor(list(itertools.chain(*parts))).to(device)  # one copy to a GPU
    all_ids, all_positions, all_places, all_labels = together.split([len(part) for part in parts])
    return Pack(all_ids[None], all_positions[None], lengths, all_places, all_labels)


def target_logits(model: Model, batch: Pack) -> torch.Tensor:
    """Return the logits (targets, vocabulary) at the places of a pack, by the model's own head."""
    with packed(batch.lengths), last_layer_at(model, batch.places, batch.input_ids.shape[1]):
        logits: torch.Tensor = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            logits_to_keep=batch.places,
            use_cache=False,
        ).logits
    return logits[0]


@torch.no_grad()
def can_pack(model: Model) -> bool:
    """Return whether a model keeps packed rows apart, by its config and by a trial.

    In the trial, a row packed behind another must give the logits of the row alone, and bit for bit
    the same ones behind any other row. A recurrent state, or a convolution, that crosses the start
    of the row would change them.
    """
    if text_config(model)._attn_implementation not in (BY_ROW, "sdpa"):
        return False
    if not set(forward_parameters(model)) >= NEEDED_TO_PACK:
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


def _trial_row(model: Model, length: int, first: int) -> Example:
    """Return a row of `length` consecutive token ids from `first` on."""
    size = text_config(model).vocab_size
    return Example(tuple(token % size for token in range(first, first + length)), 1, "a trial")
