"""The importance of an adapter's layers on some data, and the choice of those that keep LoRA.

Each way of measuring (MEASURES) gives a number to every module; what becomes of the numbers is in
boundary/layer_choice.py. To add one: a function and a line here, and its name in `--by` of
strip-layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from lorakit.adapters.adapter import Adapter
from lorakit.boundary.layer_choice import LayerChoice, choose_layers, layer_shares
from lorakit.merging.importance import importance_on
from lorakit.merging.output_norms import mean_outputs
from lorakit.models.base import Base
from lorakit.models.predictions import encoder_of
from lorakit.models.tokens import Example, encode_all
from lorakit.records.jsonl import load_records
from lorakit.reporting import Reporter
from lorakit.settings import LayerChoiceSettings, TrainingSettings
from lorakit.training.train import resolve_auto, versions

_RECORDED = ("chat", "dtype", "max_length", "truncate")  # of the settings, in the history


def _mean_importances(
    base: Base, adapter: Adapter, examples: Sequence[Example], *, settings: TrainingSettings
) -> dict[str, float]:
    """Return the mean input importance |W|·‖x‖ of every module (adaptive LoRA merge).

    Blocks count as one, so that each counts with the scale it has in the merge.
    """
    whole = replace(adapter, header={**adapter.header, "blocks": []})
    rows = importance_on(base, whole, examples, settings=settings)
    return {row["module"]: row["importance"] for row in rows}


MEASURES: Mapping[str, Callable[..., dict[str, float]]] = {
    "importance": _mean_importances,
    "output": mean_outputs,
}


def choose_by_importance(
    base: Base,
    adapter: Adapter,
    data: str,
    *,
    choice: LayerChoiceSettings,
    settings: TrainingSettings,
    reporter: Reporter,
) -> LayerChoice:
    """Measure the layers on the records of `data`, and choose those that keep their LoRA.

    Raises LorakitError for records that cannot be used, and if the adapter does not fit the base or
    changes nothing on them.
    """
    settings = resolve_auto(settings, [adapter], base)
    encoder = encoder_of(base, adapter, settings)
    records, sha256 = load_records(data, "prompt", "completion")
    examples = encode_all(records, encoder.example, reporter.note)
    measure = MEASURES[choice.by]
    shares = layer_shares(measure(base, adapter, examples, settings=settings))
    recorded = {name: getattr(settings, name) for name in _RECORDED if getattr(settings, name)}
    return LayerChoice(
        layers=choose_layers(shares, choice),
        shares=shares,
        settings={**choice.history_fields(), **recorded},
        data=sha256,
        versions=versions(),
    )
