"""Learned weights: adapters stay as they are, and a weight for each at each module is learned.

LoRA Soups (Prabhakar et al., 2025) calls it CAT, learnable concatenation: ΔW = Σ α_i·ΔW_i at every
module, with all α_i learned by gradient descent on the target data and everything else frozen. The
published code learns logits of a softmax over the adapters, drawn from a normal distribution. Here
the weights are learned as they are, and may leave 0 to 1; they begin at 1/N of N adapters, as equal
logits do. An adapter without a module has no weight there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.blocks import Block
from lorakit.adapters.history import HistoryEntry, weight_line
from lorakit.merging.joint import Merge, prepare
from lorakit.merging.stack import Stack
from lorakit.models.base import Base
from lorakit.models.lora import learn_block_weights, trained
from lorakit.reporting import Reporter
from lorakit.settings import SelectionSettings, TrainingSettings
from lorakit.training.checkpoint import checkpoint_of
from lorakit.training.loss import BatchLoss
from lorakit.training.step_hook import StepHook
from lorakit.training.train import train_and_save
from lorakit.training.trainer import Trainer, Weights

METHOD = "learned-weights"
BlockWeights = Mapping[str, Mapping[str, float]]  # by block and module


def merge_with_learned_weights(
    adapters: Sequence[Adapter],
    base: Base,
    data: str,
    val: str | None,
    *,
    settings: TrainingSettings,
    output: str,
    reporter: Reporter,
    resume: bool = False,
    checkpoint_every: int | None = None,
    selection: SelectionSettings | None = None,
    portable: bool = False,
) -> None:
    """Learn the weights on the target data and write Σ w_i·ΔW_i to `output`, blocks side by side.

    The best epoch on the validation set is written, with its weights folded into B. Raises
    LorakitError for records, adapters or settings that cannot be used.
    """
    merge = prepare(
        adapters,
        base,
        data,
        val,
        settings=settings,
        selection=selection or SelectionSettings(),
        portable=portable,
        reporter=reporter,
    )
    trainer = weight_trainer(merge, reporter)
    entry = merge.entry_of(METHOD)
    reporter.describe(entry)
    train_and_save(
        trainer,
        merge.corpus,
        reporter,
        checkpoint=checkpoint_of(output, entry, base.record),
        resume=resume,
        checkpoint_every=checkpoint_every,
        export=lambda best: export_weighted(merge, by_block(merge.stacked, best), entry),
        output=output,
    )
    best = by_block(merge.stacked, trainer.best)
    reporter.event({"best_weights": best}, f"best {weight_line(best)}")


def weight_trainer(merge: Merge, reporter: Reporter) -> Trainer:
    """Return a trainer of the weights alone, of which all are 1/N to begin with."""
    blocks = merge.stacked.blocks
    for name, layer in merge.layers.items():
        spans = [block.modules[name].span for block in blocks if name in block.modules]
        learn_block_weights(layer, spans, 1 / len(blocks))
    return Trainer(
        merge.base,
        merge.layers,
        merge.settings,
        accelerator=merge.accelerator,
        hooks=(WeightLog(merge, reporter),),
        measure=merge.measure(merge.selection.select_by),
    )


class WeightLog(StepHook):
    """Reports the weights whenever the validation set is about to be run through the model."""

    name = "weights"

    def __init__(self, merge: Merge, reporter: Reporter) -> None:
        self._merge, self._reporter = merge, reporter
        self._step = 0

    def after_step(self, step: int) -> None:
        self._step = step

    @contextlib.contextmanager
    def around_validation(self, losses: BatchLoss) -> Iterator[None]:
        layers = self._merge.layers.items()
        weights = by_block(
            self._merge.stacked, {name: tuple(trained(layer).values()) for name, layer in layers}
        )
        self._reporter.event({"step": self._step, "weights": weights}, weight_line(weights))
        yield


def by_block(stacked: Stack, weights: Weights) -> BlockWeights:
    """Return each block's weight at each of its modules, in the order of the blocks."""
    learned: dict[str, dict[str, float]] = {block.name: {} for block in stacked.blocks}
    for name, (values,) in weights.items():
        names = [block.name for block in stacked.blocks if name in block.modules]
        for block, value in zip(names, values.tolist(), strict=True):
            learned[block][name] = value
    return learned


def export_weighted(merge: Merge, weights: BlockWeights, entry: HistoryEntry) -> Adapter:
    """Return the adapter of these weights, which its history and the scales of its blocks hold."""
    blocks = tuple(_weighted(block, weights[block.name]) for block in merge.stacked.blocks)
    weighted = replace(merge, stacked=replace(merge.stacked, blocks=blocks))
    named = {name: dict(by_module) for name, by_module in weights.items()}
    return weighted.export(merge.stacked.factors, {**entry, "weights": named})


def _weighted(block: Block, weights: Mapping[str, float]) -> Block:
    """Return a block whose scale in each module is multiplied by the weight there."""
    modules = {
        name: replace(part, scale=weights[name] * part.scale)
        for name, part in block.modules.items()
    }
    return replace(block, modules=modules)
