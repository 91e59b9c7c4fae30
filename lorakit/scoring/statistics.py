"""What a metric is computed from, and what comes out: Examples and Statistics.

Statistics are sufficient: a row of numbers per example, whose sum determines the value. So a
significance test can draw examples again without scoring them again. This file knows no metric.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lorakit.runs.resume import SavedValues
    from lorakit.scoring.bertscore import Embedder

    Array = NDArray[np.float64]

Row = Sequence[float]
References = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Examples:
    """Predictions, the references of each, and the language they are in.

    `embedder` serves metrics that embed tokens; `baseline_predictions`, another system's outputs
    for the same examples, serve those that compare with them. `saved` holds what slow metrics have
    computed. Each is None where it is not needed.
    """

    predictions: Sequence[str]
    references: References
    lang: str
    embedder: Embedder | None = None
    baseline_predictions: Sequence[str] | None = None
    saved: SavedValues | None = None

    @property
    def reference_count(self) -> str:
        """How many references each example has, or `var`, as sacrebleu's signatures write it."""
        counts = {len(texts) for texts in self.references}
        return str(counts.pop()) if len(counts) == 1 else "var"


@dataclass(frozen=True)
class Statistics:
    """The sufficient statistics of one system under one metric.

    `rows` has one row of the same length per example; `value_of(total, count)` is the metric's
    value, in percent, for any multiset of `count` examples whose rows add up to `total`, and
    `values_of(totals, count)` the same values (n) of many such totals (n × length of a row).
    """

    rows: Sequence[Row]
    value_of: Callable[[Row, int], float]
    values_of: Callable[[Array, int], Array]
    signature: str

    @property
    def value(self) -> float:
        """The metric's value in percent, over all examples."""
        total = [math.fsum(column) for column in zip(*self.rows, strict=True)]
        return self.value_of(total, len(self.rows))


def weighted_mean(totals: Sequence[float], weights: Sequence[float], signature: str) -> Statistics:
    """Return the statistics of Σ totals / Σ weights, such as a mean loss over tokens by example."""
    rows = list(zip(totals, weights, strict=True))
    return Statistics(rows, _ratio, _ratios, signature)


def _ratio(total: Row, count: int) -> float:
    return total[0] / total[1]


def _ratios(totals: Array, count: int) -> Array:
    ratios: Array = totals[:, 0] / totals[:, 1]
    return ratios


MetricFunction = Callable[[Examples], Statistics]
TextComparison = Callable[[str, str, str], float]  # (prediction, reference, lang) -> 0..1
