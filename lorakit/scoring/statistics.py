"""Sufficient statistics of a metric: a row of numbers per example, and the value of their sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

Row = Sequence[float]
References = Sequence[Sequence[str]]


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
        total = [math.fsum(column) for column in zip(*self.rows, strict=True)]
        return self.value_of(total, len(self.rows))


MetricFunction = Callable[[Sequence[str], References, str], Statistics]
