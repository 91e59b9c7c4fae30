"""Which point of a search is the best: by its score, or by the rule of one standard error.

The score of the best of many points is too good by chance, and neighbours often score about the
same. The rule `1se` takes the smallest boundary whose paired difference from the highest score is
within one standard error of that difference (the rule of Breiman et al., Classification and
Regression Trees, 1984, with the differences paired). How points are scored is not known here.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorakit.boundary.cuts import BASE, Point
from lorakit.boundary.records import EvaluationRecord
from lorakit.errors import LorakitError
from lorakit.scoring.metrics import METRICS
from lorakit.scoring.significance import paired_error
from lorakit.scoring.statistics import Statistics
from lorakit.settings import LOSS, BoundarySettings


def check_rule(rule: str, count: int) -> None:
    """Raise LorakitError for a rule that needs more records than `count`."""
    if rule == "1se" and count < 2:
        raise LorakitError("--rule 1se needs two records or more; give more --data, or --rule best")


@dataclass(frozen=True)
class Sweep:
    """The statistics of every point, the base model among them, on the same records.

    `order` is that of cuts.layer_order: its first k layers keep their LoRA at boundary k.
    """

    statistics: Mapping[Point, Statistics]
    settings: BoundarySettings
    order: Sequence[int]

    @functools.cached_property
    def scores(self) -> dict[Point, float]:
        """The score of every point, BASE included, in order."""
        return {point: self.statistics[point].value for point in sorted(self.statistics)}

    @functools.cached_property
    def highest(self) -> Point:
        """The point that scores best, never the base; of equals the smaller boundary and factor."""
        points = [point for point in self.scores if point != BASE]
        return max(points, key=lambda point: self._sign * self.scores[point])

    @functools.cached_property
    def errors(self) -> dict[Point, float]:
        """The standard error of every point's difference from the highest; none of one record."""
        if self._count < 2:
            return {}
        highest = self.statistics[self.highest]
        return {point: paired_error(these, highest) for point, these in self.statistics.items()}

    @functools.cached_property
    def best(self) -> Point:
        """The point that the rule chooses, never the base."""
        if self.settings.rule == "best":
            return self.highest
        return next(point for point in self.scores if point != BASE and self._is_near(point))

    def as_records(self) -> list[EvaluationRecord]:
        """Return a record for each point but the base, in order, with the base model's score."""
        return [self._record(point) for point in self.scores if point != BASE]

    @property
    def notes(self) -> list[str]:
        """Lines for the user: the base model beside the best, and a cut that gains nothing."""
        return [self.baseline_note, *([self.flat_note] if self.flat_note else [])]

    @property
    def baseline_note(self) -> str:
        """A line that compares the base model with the best boundary."""
        base, best = self.scores[BASE], self.scores[self.best]
        metric = self.settings.metric
        line = f"baseline: the base model (boundary 0) scores {self._shown(base)} {metric}"
        if self._sign * base <= self._sign * best:
            return f"{line}, boundary {self.best.boundary} scores {self._shown(best)}"
        return (
            f"{line}, better than every boundary ({self._shown(best)}): the adapter does not help"
        )

    @property
    def flat_note(self) -> str | None:
        """A line for a whole adapter that no cut beats, None where one does."""
        layers = len(self.order)
        whole = next((point for point in self.scores if point.boundary == layers), None)
        if whole is None or len(self.scores) == 2:
            return None
        line = f"no boundary below {layers} is better than the whole adapter"
        if self.highest.boundary == layers:
            return line
        error = self.errors.get(whole)
        if error is None or not self._is_near(whole):
            return None
        gain = abs(self.scores[self.highest] - self.scores[whole])
        return (
            f"{line} by more than one standard error: {self.highest.boundary} is so by "
            f"{self._shown(gain)} ± {self._shown(error)}"
        )

    @property
    def _sign(self) -> int:
        metric = self.settings.metric
        return 1 if metric != LOSS and METRICS[metric].higher_is_better else -1

    @property
    def _count(self) -> int:
        return len(self.statistics[BASE].rows)

    def _is_near(self, point: Point) -> bool:
        """Return whether a point is within one standard error of the highest.

        Where one record alone differs, the difference is the error: rounding must not decide.
        """
        difference = abs(self.scores[point] - self.scores[self.highest])
        return difference <= self.errors[point] * (1 + 1e-9)

    def _shown(self, value: float) -> str:
        """Return a score as notes show it: a loss has one more digit."""
        return f"{value:.3f}" if self.settings.metric == LOSS else f"{value:.2f}"

    def _record(self, point: Point) -> EvaluationRecord:
        """Return the record of a point; what a plain search does not have is left out."""
        settings = self.settings
        record: EvaluationRecord = {
            "boundary": point.boundary,
            "score": self.scores[point],
            "metric": settings.metric,
            "count": self._count,
            "baseline": self.scores[BASE],
            "signature": self.statistics[point].signature,
            "best": point == self.best,
        }
        if settings.factors is not None:
            record["factor"] = point.factor
        if settings.keep != "bottom":
            record["keep"] = settings.keep
            record["layers"] = sorted(self.order[: point.boundary])
        if self.errors and (settings.rule == "1se" or settings.metric == LOSS):
            record["standard_error"] = self.errors[point]
        return record
