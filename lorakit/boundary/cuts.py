"""Cuts: how much of each layer's LoRA is left, and the points of the search that they stand for.

A point is a boundary k and a factor; in its cut k layers keep their LoRA whole, and the change of
the other layers is multiplied by the factor, 0 for a plain boundary. A model of four layers:

    keep     point          factors, bottom layer first
    bottom   Point(3, 0)    1    1    1    0
    bottom   Point(2, .5)   1    1    0.5  0.5
    top      Point(3, 0)    0    1    1    1

Boundary 0 is the base model. How cuts are computed is in gates.py, how well they do elsewhere.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lorakit.errors import LorakitError
from lorakit.settings import BoundarySettings


class Point(NamedTuple):
    """A boundary, and what the LoRA of the layers that lose it is multiplied by."""

    boundary: int
    factor: float = 0.0


BASE = Point(0)


@dataclass(frozen=True, order=True)
class Cut:
    """What is left of a LoRA: 1 is all, 0 nothing, 0.5 half of its change.

    `factors` are by decoder layer, bottom first; `outside` is for modules outside the layers, such
    as the head. In descending order, each cut shares at least as many bottom layers with the next
    as with any later one.
    """

    outside: float
    factors: tuple[float, ...]

    def left_in(self, layer: int | None) -> float:
        """Return the factor of a layer, None: of what is outside the layers."""
        return self.outside if layer is None else self.factors[layer]

    def on(self, layers: Collection[int | None]) -> Cut:
        """Return the cut with factor 0 wherever no LoRA is; equal ones mean equal models."""
        factors = (f if n in layers else 0.0 for n, f in enumerate(self.factors))
        return Cut(self.outside if None in layers else 0.0, tuple(factors))

    def split_from(self, other: Cut) -> int:
        """Return the first layer to differ from another cut; 0 if what is outside differs."""
        if self.outside != other.outside:
            return 0
        pairs = zip(self.factors, other.factors, strict=True)
        return next((n for n, (f, g) in enumerate(pairs) if f != g), len(self.factors))


def cut_at(point: Point, order: Sequence[int]) -> Cut:
    """Return the cut of a point; `order` is the order of layers, of which the first keep LoRA.

    Modules outside the layers keep theirs but in the base model, as strip-layers leaves them.
    """
    whole = set(order[: point.boundary])
    factors = (1.0 if layer in whole else point.factor for layer in range(len(order)))
    return Cut(float(point.boundary > 0), tuple(factors))


def bottom(boundary: int, layers: int) -> Cut:
    """Return the cut above the bottom `boundary` of `layers` layers."""
    return cut_at(Point(boundary), range(layers))


def layer_order(keep: str, layers: int, seed: int) -> list[int]:
    """Return the layers in the order in which they keep their LoRA: boundary k is the first k.

    `keep` is bottom, top or random. The random layers of a boundary are among those of the next.
    """
    if keep == "random":
        return random.Random(f"keep:{seed}").sample(range(layers), layers)
    return list(range(layers)) if keep == "bottom" else list(reversed(range(layers)))


def pick_boundaries(requested: Sequence[int] | None, layers: int) -> list[int]:
    """Return the requested boundaries, sorted, or 1 … `layers` if there are none.

    Raises LorakitError for a boundary that the model does not have.
    """
    chosen = sorted(requested or range(1, layers + 1))
    if chosen[0] < 1 or chosen[-1] > layers:
        raise LorakitError(
            f"the model has no boundary {chosen[-1]}; give boundaries within 1-{layers}"
        )
    return chosen


def search_points(settings: BoundarySettings, layers: int) -> list[Point]:
    """Return the points of a search, sorted, the base model first.

    Raises LorakitError for a boundary that the model does not have.
    """
    boundaries = pick_boundaries(settings.boundaries, layers)
    factors = sorted(set(settings.factors or (0.0,)))
    return [BASE, *(Point(k, factor) for k in boundaries for factor in factors)]
