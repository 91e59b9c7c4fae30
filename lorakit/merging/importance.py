"""The importance of an adapter's modules on some data (adaptive LoRA merge, Figure 5).

It is the mean of |W_jk|·‖x_k‖₂ over the parameters of the A/B pair of a block at a projection,
times the scale of the block's adapter, over the root of the number of tokens: what
`--prune-threshold` is compared with.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TypedDict

import torch

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.blocks import read_blocks
from lorakit.adapters.names import last_part, layer_of
from lorakit.files import STDIO
from lorakit.merging.input_norms import InputNorms
from lorakit.merging.joint import attach_stack
from lorakit.merging.pair_scores import PairScores
from lorakit.merging.stack import Stack, stack
from lorakit.models.base import Base
from lorakit.models.batches import tokens_at_once
from lorakit.models.lora import check_fits
from lorakit.models.predictions import encoder_of
from lorakit.models.sharing import new_accelerator
from lorakit.models.tokens import Example, encode_all
from lorakit.records.jsonl import load_records
from lorakit.reporting import Reporter, Silent
from lorakit.runs.processes import LostProcessError, is_first_process
from lorakit.runs.signals import STOPPED, deferred
from lorakit.settings import TrainingSettings
from lorakit.training.checkpoint import Checkpoint, checkpoint_of
from lorakit.training.loss import BatchLoss

_SECONDS = 30  # between two checkpoints


class ModuleImportance(TypedDict):
    """The mean importance of one block's A/B pair at one projection.

    `layer` is None outside the decoder layers.
    """

    block: str
    module: str
    layer: int | None
    projection: str
    importance: float


def measure_importance(
    base: Base,
    adapter: Adapter,
    data: str,
    *,
    settings: TrainingSettings,
    output: str = STDIO,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> list[ModuleImportance]:
    """Return the mean importance of every block at every projection.

    What a run that is killed has summed up stays beside `output`, for `resume`; the share of the
    records that was cut is reported. Raises LorakitError for records that cannot be used, or if the
    adapter does not fit the base.
    """
    encoder = encoder_of(base, adapter, settings)
    records, _ = load_records(data, "prompt", "completion")
    examples = encode_all(records, encoder.example, (reporter or Silent()).note)
    tokens = tokens_at_once(settings.micro_batch_tokens, base.device)
    shaping = [list(example.ids) for example in examples], tokens
    checkpoint = checkpoint_of(output, "importance", base.record, adapter.sha256, *shaping)
    if not is_first_process():
        checkpoint = Checkpoint(None, checkpoint.key)
    if not resume:
        checkpoint.remove()
    return importance_on(base, adapter, examples, settings=settings, checkpoint=checkpoint)


def importance_on(
    base: Base,
    adapter: Adapter,
    examples: Sequence[Example],
    *,
    settings: TrainingSettings,
    checkpoint: Checkpoint | None = None,
) -> list[ModuleImportance]:
    """Return the mean importance of every block at every projection on some examples.

    With a checkpoint it goes on from what that holds. Raises LorakitError if the adapter does not
    fit the base.
    """
    check_fits(base, adapter)
    stacked = unstack(adapter)
    layers = attach_stack(base, stacked, dropout=0.0)
    norms = InputNorms(layers)
    losses = BatchLoss(
        base, [], tokens=settings.micro_batch_tokens, accelerator=new_accelerator(base.device.type)
    )
    with norms.around_validation(losses):
        _read_all(losses, examples, norms, checkpoint or Checkpoint(None, ""))
    means = PairScores(stacked.blocks, layers, "input", norms=norms).means()
    return [
        {
            "block": block,
            "module": module,
            "layer": layer_of(module),
            "projection": last_part(module),
            "importance": value,
        }
        for (block, module), value in means.items()
    ]


def _read_all(
    losses: BatchLoss, examples: Sequence[Example], norms: InputNorms, checkpoint: Checkpoint
) -> None:
    """Run all micro-batches through the model, in halved ones from the start if memory runs out.

    What is saved counts in whole ones, so halved ones are not saved.
    """
    try:
        _read_rest(losses, examples, norms, checkpoint)
    except torch.OutOfMemoryError as error:
        checkpoint.remove()
        losses.halve_(examples, error)
        _read_all(losses, examples, norms, Checkpoint(None, ""))


def _read_rest(
    losses: BatchLoss, examples: Sequence[Example], norms: InputNorms, checkpoint: Checkpoint
) -> None:
    """Run all micro-batches through the model, from the first that is not in the checkpoint on.

    One is saved every _SECONDS, and where Ctrl-C, SIGTERM, SIGHUP or the end of another process of
    the run ends it.
    """
    team = losses.team
    sums, done = team.from_first(checkpoint.saved_sums())
    if done:
        norms.restore_(sums)
    saved_at = time.monotonic()
    runs = losses.micro_batches(examples)
    try:
        while done < len(runs):
            with deferred():
                losses.read(runs[done : done + team.count])
                done = min(done + team.count, len(runs))
            if time.monotonic() > saved_at + _SECONDS:
                checkpoint.save_sums(norms.state(), done)
                saved_at = time.monotonic()
    except (*STOPPED, LostProcessError):
        checkpoint.save_sums(norms.state(), done)
        raise


def unstack(adapter: Adapter) -> Stack:
    """Return the stack that a merged adapter came from: each block's B without its scale.

    An adapter without blocks counts as a single block.
    """
    whole = stack([adapter])
    blocks = read_blocks(adapter.header.get("blocks"))
    if blocks is None:
        return whole
    factors = {name: (a, b.copy()) for name, (a, b) in whole.factors.items()}
    for block in blocks:
        for name, part in block.modules.items():
            factors[name][1][:, part.span] /= part.scale or 1.0
    return Stack(factors, tuple(blocks))
