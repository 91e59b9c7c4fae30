"""Joint training: adapters stacked on their base as one, and everything that training them needs.

During training, each block's scale s_i multiplies A_i·x in a hook, so that A_i and B_i start from
the values they were loaded with and take steps of the size they have in PEFT; s_i is folded into
B_i at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import accelerate
import torch

from lorakit.adapters.adapter import Adapter, Factors, tensors_of
from lorakit.adapters.blocks import share_of_zeros
from lorakit.adapters.config import Config
from lorakit.adapters.history import HistoryEntry, new_entry
from lorakit.adapters.portable import make_portable
from lorakit.adapters.targets import peft_config
from lorakit.merging.pruner import pruning_hooks
from lorakit.merging.stack import Stack, fold, stack
from lorakit.models.base import Base
from lorakit.models.lora import (
    PeftLayer,
    check_fits,
    inject,
    is_transposed,
    projections,
    set_factors,
    set_rank_scales,
)
from lorakit.models.sharing import new_accelerator, team_of
from lorakit.models.tokens import Encoder
from lorakit.reporting import Reporter
from lorakit.settings import PruningSettings, SelectionSettings, TrainingSettings
from lorakit.training.selection import MetricMeasure, measure_of
from lorakit.training.train import Corpus, load_corpus, resolve_auto, trained_header, versions
from lorakit.training.trainer import Trainer


def attach_stack(base: Base, stacked: Stack, *, dropout: float) -> dict[str, PeftLayer]:
    """Put a stack on its base, with A and B as loaded; return PEFT's layers by module.

    The scale of each rank multiplies A·x.
    """
    layers = inject(base, stacked.ranks, dropout=dropout)
    for name, (a, b) in stacked.factors.items():
        set_factors(layers[name], a, b)
        set_rank_scales(layers[name], torch.tensor(stacked.scales(name), device=base.device))
    return layers


@dataclass(frozen=True)
class Merge:
    """Everything that the training runs of one merge share."""

    base: Base
    adapters: Sequence[Adapter]
    stacked: Stack
    layers: Mapping[str, PeftLayer]
    config: Config
    settings: TrainingSettings
    selection: SelectionSettings
    corpus: Corpus
    encoder: Encoder
    accelerator: accelerate.Accelerator
    portable: bool = False  # how the result is written

    def entry(self, pruning: PruningSettings) -> HistoryEntry:
        """Return the history entry of a run with these pruning settings."""
        return self.entry_of("adaptive", pruning.history_fields())

    def entry_of(self, method: str, fields: Mapping[str, object] | None = None) -> HistoryEntry:
        """Return the history entry of a run by a method, with the fields that are its own."""
        settings: dict[str, object] = {
            "method": method,
            **self.settings.history_fields(),
            **(fields or {}),
            **self.selection.history_fields(),
        }
        if self.portable:
            settings["portable"] = True
        return new_entry(
            "merge",
            versions=versions(),
            settings=settings,
            parents={block.name: block.sha256 for block in self.stacked.blocks},
            hashes=self.corpus.hashes,
        )

    def trainer(self, pruning: PruningSettings) -> Trainer:
        """Return a trainer with these pruning settings that starts from the model's weights."""
        hooks = pruning_hooks(self.stacked.blocks, self.layers, pruning, seed=self.settings.seed)
        return Trainer(
            self.base,
            self.layers,
            self.settings,
            accelerator=self.accelerator,
            hooks=hooks,
            measure=self.measure(self.selection.select_by),
        )

    def measure(self, metric: str) -> MetricMeasure | None:
        """Return the measure of the model by `metric`, or None if that is the validation loss."""
        team = team_of(self.accelerator)
        records, selection = self.corpus.records, self.selection
        return measure_of(metric, self.base, self.encoder, records, selection, team)

    def export(
        self, best: Factors, entry: HistoryEntry, reset: Mapping[str, float] | None = None
    ) -> Adapter:
        """Return the adapter of a run's best weights, each block's scale folded into its B.

        `reset` holds, by block, the share of parameters at the value that they are reset to.
        """
        blocks = [
            block.fields(share_of_zeros(block.pairs(best)), (reset or {}).get(block.name))
            for block in self.stacked.blocks
        ]
        header = trained_header(
            self.base, self.settings, entry, parents=self.adapters, blocks=blocks
        )
        merged = Adapter(tensors_of(fold(best, self.stacked)), self.config, header)
        return make_portable(merged) if self.portable else merged


def prepare(
    adapters: Sequence[Adapter],
    base: Base,
    data: str,
    val: str | None,
    *,
    settings: TrainingSettings,
    selection: SelectionSettings,
    reporter: Reporter,
    portable: bool = False,
) -> Merge:
    """Read the data, stack the adapters and put them on their base."""
    settings = resolve_auto(settings, adapters, base)
    encoder = base.encoder_for(settings)
    for adapter in adapters:
        check_fits(base, adapter)
    stacked = stack(adapters)
    corpus = load_corpus(data, val, encoder, seed=settings.seed, reporter=reporter)
    config = peft_config(
        stacked.ranks,
        base=base.name,
        dropout=settings.dropout,
        transposed=is_transposed(base, list(stacked.ranks)),
        projections=projections(base.model),
    )
    layers = attach_stack(base, stacked, dropout=settings.dropout)
    return Merge(
        base=base,
        adapters=adapters,
        stacked=stacked,
        layers=layers,
        config=config,
        settings=settings,
        selection=selection,
        corpus=corpus,
        encoder=encoder,
        accelerator=new_accelerator(base.device.type),
        portable=portable,
    )
