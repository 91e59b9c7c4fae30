"""What a benchmark returns, and how it is written: a line to read, or one of JSON.

`ours` and `peer` are in the same unit, smaller is better; `ratio` says how many times as much the
peer takes, in the median over rounds, and `spread` the lowest and the highest of them. The limit is
what no program on this machine could go beyond, and `limit_share` the part of it that was reached.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from tests.benchmarks.machine import Machine


class BenchmarkError(Exception):
    """Why a benchmark has no result: wrong outputs, or data or a library that is not here."""


@dataclass(frozen=True)
class Result:
    """One comparison; what has no peer, or no limit, leaves it None."""

    name: str
    unit: str
    ours: float
    machine: Machine
    peer: float | None = None
    ratio: float | None = None
    spread: tuple[float, float] | None = None
    limit: str | None = None
    limit_share: float | None = None
    details: Mapping[str, object] = field(default_factory=dict)

    def as_json(self) -> str:
        """Return the result as one line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)

    def as_text(self) -> str:
        """Return the result as lines to read."""
        details = (f"  {name}: {_shown(value)}" for name, value in self.details.items())
        return "\n".join([f"{self.name}: {self._comparison()}", f"  {self.machine}", *details])

    def _comparison(self) -> str:
        parts = [f"{self.ours:.3g} {self.unit}"]
        if self.peer is not None:
            parts.append(f"peer {self.peer:.3g}")
        if self.ratio is not None and self.spread is not None:
            low, high = self.spread
            parts.append(f"{self.ratio:.2f}× ({low:.2f}-{high:.2f})")
        if self.limit_share is not None:
            parts.append(f"{100 * self.limit_share:.0f} % of {self.limit}")
        return ", ".join(parts)


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
