"""Adaptive LoRA merge: several adapters trained jointly on the target data, pruned at every step.

The adapters run as one stacked adapter (merging.py); each block's scale multiplies A·x by a hook
while training, so that every A_i and B_i keeps the values, and the step size, it was loaded with,
and goes into B_i only at the end. Pruning itself is in pruning.py, the loop in training.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lorakit.adapter import Adapter
from lorakit.calibration import InputNorms
from lorakit.checkpoint import checkpoint_of
from lorakit.fitting import fit, header, load_corpus, settle, versions
from lorakit.lora import check_fits, factors, inject, is_transposed, projections, set_factors
from lorakit.merging import Factors, Stack, fold, peft_config, share_of_zeros, stack, tensors_of
from lorakit.model import ADAPTER, Base
from lorakit.portable import make_portable
from lorakit.pruning import CRITERIA, prune_, prune_count
from lorakit.settings import PruningSettings, TrainingSettings
from lorakit.training import Trainer, Watcher, new_accelerator


@dataclass(frozen=True)
class Group:
    """One matrix of one block at one projection; `count` of its parameters are zeroed."""

    module: str
    is_b: bool
    weight: torch.Tensor  # a view into the parameter: (rank, d_in) of A or (d_out, rank) of B
    span: slice  # the block's ranks
    count: int


class ParameterPruner:
    """Zeroes, after each step, the least important parameters of every group (Algorithm 1).

    Groups of one shape are chosen from together: one selection for all of them.
    """

    def __init__(
        self, stacked: Stack, layers: Mapping[str, Any], settings: PruningSettings
    ) -> None:
        self._criterion = CRITERIA[settings.importance]
        self._alike: dict[Any, list[Group]] = {}
        self._inputs: dict[Any, torch.Tensor] = {}
        self._version = -1
        for block in stacked.blocks:
            for name, part in block.modules.items():
                for group in _groups(name, layers[name], part.span, settings):
                    self._alike.setdefault((group.is_b, group.weight.shape), []).append(group)

    @torch.no_grad()
    def prune_(self, norms: InputNorms) -> None:
        """Zero the chosen parameters of every group, by the norms of the last calibration."""
        if norms.version != self._version:
            self._version = norms.version
            self._inputs = {
                key: torch.stack([_inputs_of(group, norms) for group in groups]).unsqueeze(1)
                for key, groups in self._alike.items()
            }
        for key, groups in self._alike.items():
            weights = torch.stack([group.weight for group in groups])
            prune_(weights, self._criterion(weights, self._inputs[key]), groups[0].count)
            for group, pruned in zip(groups, weights, strict=True):
                group.weight.copy_(pruned)


def _inputs_of(group: Group, norms: InputNorms) -> torch.Tensor:
    """Return the norms of what a group's matrix reads: x for A, A·x for B."""
    of_x, of_ax = norms.norms(group.module)
    return of_ax[group.span] if group.is_b else of_x


def _groups(name: str, layer: Any, span: slice, settings: PruningSettings) -> Iterator[Group]:
    a, b = (factor.detach() for factor in factors(layer))
    for is_b, weight in ((False, a[span]), (True, b[:, span])):
        count = prune_count(settings.prune_ratio, weight.numel())
        if count:
            yield Group(name, is_b, weight, span, count)


def attach_stack(base: Base, stacked: Stack, *, dropout: float) -> dict[str, Any]:
    """Put a stack on its base with A and B as they were loaded; return PEFT's layers by module.

    The scale of each rank multiplies A·x, float32 (rank,), in a forward hook on PEFT's lora_A.
    """
    layers = inject(base, stacked.ranks, dropout=dropout)
    for name, (a, b) in stacked.factors.items():
        set_factors(layers[name], a, b)
        scales = torch.tensor(stacked.scales(name), device=base.device)
        layers[name].lora_A[ADAPTER].register_forward_hook(_multiply_by(scales))
    return layers


def _multiply_by(scales: torch.Tensor) -> Any:
    def hook(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * scales

    return hook


def merge_adaptively(
    adapters: Sequence[Adapter],
    base: Base,
    data: str,
    val: str | None,
    *,
    settings: TrainingSettings,
    pruning: PruningSettings,
    output: str,
    watcher: Watcher,
    resume: bool = False,
    portable: bool = False,
) -> None:
    """Train the adapters jointly on the target data and write them to `output` as one adapter.

    Raises LorakitError for records, adapters or settings that cannot be used.
    """
    settings = settle(settings, adapters, base)
    encoder = base.encoder(
        chat=settings.chat, max_length=settings.max_length, truncate=settings.truncate
    )
    for adapter in adapters:
        check_fits(base, adapter)
    stacked = stack(adapters)
    corpus = load_corpus(data, val, encoder, seed=settings.seed, watcher=watcher)
    entry: dict[str, Any] = {
        "command": "merge",
        "versions": versions(),
        "settings": {"method": "adaptive", **settings.told(), **pruning.told()},
        "parents": {block.name: block.sha256 for block in stacked.blocks},
        **corpus.hashes,
    }
    if portable:
        entry["settings"] |= {"portable": True}
    config = peft_config(
        stacked.ranks,
        base=base.name,
        dropout=settings.dropout,
        transposed=is_transposed(base, list(stacked.ranks)),
        there=projections(base.model),
    )

    def export(best: Factors) -> Adapter:
        blocks = [block.header(share_of_zeros(block, best)) for block in stacked.blocks]
        told = header(base, settings, entry, parents=adapters, blocks=blocks)
        merged = Adapter(tensors_of(fold(best, stacked)), config, told)
        return make_portable(merged) if portable else merged

    layers = attach_stack(base, stacked, dropout=settings.dropout)
    trainer = Trainer(
        base,
        layers,
        settings,
        accelerator=new_accelerator(base.device.type),
        pruner=ParameterPruner(stacked, layers, pruning) if pruning.prune_ratio else None,
        calibrate_every=pruning.calibrate_every,
    )
    fit(
        trainer,
        corpus,
        watcher,
        checkpoint=checkpoint_of(output, entry, base.record),
        resume=resume,
        export=export,
        output=output,
    )
