"""Compare models by a metric: greedy outputs for the validation records, scored as by `score`."""

from __future__ import annotations

from collections.abc import Sequence

from lorakit.models.base import Base
from lorakit.models.generation import generate
from lorakit.models.sharing import ALONE, Team
from lorakit.models.tokens import Encoder
from lorakit.records.record import Record
from lorakit.scoring.metrics import METRICS, compute_statistics
from lorakit.scoring.statistics import Statistics
from lorakit.settings import LOSS, GenerationSettings, SelectionSettings


class MetricMeasure:
    """Measures a model, in its current state, by a metric, such that higher is better.

    `generated` counts the outputs generated so far.
    """

    def __init__(
        self,
        base: Base,
        encoder: Encoder,
        records: Sequence[Record],
        *,
        metric: str,
        settings: SelectionSettings,
        team: Team = ALONE,
    ) -> None:
        self._team = ALONE if base.sharded else team  # all have to run the base equally often
        self._base, self._encoder, self._records = base, encoder, records
        self._metric, self._lang = metric, settings.lang
        self._settings = GenerationSettings(max_new_tokens=settings.max_new_tokens)
        self.generated = 0

    def __call__(self) -> float:
        """Generate for every record and return the score, negated where lower is better."""
        return self.value_of(self.statistics())

    def value_of(self, statistics: Statistics) -> float:
        """Return the score in the metric's statistics, negated where lower is better."""
        value = statistics.value
        return value if METRICS[self._metric].higher_is_better else -value

    def statistics(self) -> Statistics:
        """Generate for every record and return the statistics of the metric."""
        outputs = generate(
            self._base, self._encoder, self._records, self._settings, team=self._team
        )
        texts = [record.prediction for record, _ in outputs]
        self.generated += len(texts)
        references = [record.references for record in self._records]
        return compute_statistics(texts, references, metric=self._metric, lang=self._lang)


def measure_of(
    metric: str,
    base: Base,
    encoder: Encoder,
    records: Sequence[Record],
    settings: SelectionSettings,
    team: Team = ALONE,
) -> MetricMeasure | None:
    """Return the measure of a model by `metric`, or None if that is the validation loss."""
    if metric == LOSS:
        return None
    return MetricMeasure(base, encoder, records, metric=metric, settings=settings, team=team)
