"""Which layers keep their LoRA by how important they were measured to be (LoRA-drop).

LoRA-drop (Zhou et al., 2024) normalises the importance of a projection's LoRA over the layers and
keeps layers, the most important first, until their shares add up to a threshold. It does so for
each projection by itself; here layers are kept or stripped whole, as a boundary does, so a layer's
share is the mean of its projections'. What is measured is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from itertools import accumulate

from lorakit.adapters.names import layer_of
from lorakit.errors import LorakitError
from lorakit.settings import LayerChoiceSettings

_ROUNDING = 1e-9  # shares add up to 1 but for so much


@dataclass(frozen=True)
class LayerChoice:
    """The layers that keep their LoRA, and what the history records of how they were chosen.

    `shares` has the share of the importance of every layer with LoRA; `settings` what it was
    measured with, `data` the SHA-256 of the records, `versions` those of the packages.
    """

    layers: tuple[int, ...]
    shares: Mapping[int, float]
    settings: Mapping[str, object]
    data: str
    versions: Mapping[str, str]

    def history_fields(self) -> dict[str, object]:
        """Return the settings that an adapter's history records."""
        scores = {str(layer): share for layer, share in sorted(self.shares.items())}
        return {**self.settings, "keep": list(self.layers), "scores": scores}


def layer_shares(importances: Mapping[str, float]) -> dict[int, float]:
    """Return each layer's share of the importance; all shares add up to 1.

    `importances` are by module, none below 0. Those of a projection (`self_attn.q_proj`) are
    divided by their sum over the layers, and a layer's share is the mean over the projections, so
    that one with a large output counts no more than another. Modules outside the layers, and
    projections whose importances are all 0, count for nothing.

    Raises LorakitError if all importances are 0.
    """
    by_projection: dict[str, dict[int, float]] = {}
    for name, importance in importances.items():
        layer = layer_of(name)
        if layer is not None:
            projection = name.partition(f".{layer}.")[2]
            by_projection.setdefault(projection, {})[layer] = importance
    shares = dict.fromkeys(sorted({n for layers in by_projection.values() for n in layers}), 0.0)
    counted = [layers for layers in by_projection.values() if sum(layers.values()) > 0]
    if not counted:
        raise LorakitError(
            "no layer's LoRA changes anything on the data; use the base model without an adapter"
        )
    for layers in counted:
        total = sum(layers.values())
        for layer, importance in layers.items():
            shares[layer] += importance / total / len(counted)
    return shares


def choose_layers(shares: Mapping[int, float], settings: LayerChoiceSettings) -> tuple[int, ...]:
    """Return the layers that keep their LoRA, sorted; of equally important ones the lower first.

    With `share`, that share of the layers, rounded to the nearest whole number, but at least one:
    as many as at boundary share·L. With `threshold`, as few as have that share of the importance.
    """
    ranked = sorted(shares, key=lambda layer: (-shares[layer], layer))
    if settings.share is not None:
        count = int((settings.share * len(ranked)).to_integral_value(ROUND_HALF_UP))
    else:
        needed = float(settings.threshold or Decimal(1)) - _ROUNDING
        sums = accumulate(shares[layer] for layer in ranked)
        count = 1 + sum(total < needed for total in sums)
    return tuple(sorted(ranked[: max(1, count)]))
