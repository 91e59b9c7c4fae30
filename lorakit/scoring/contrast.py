"""Contrast two systems record by record: where one is worse, and by how much.

How it is shown stands in contrast_table.py and contrast_page.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lorakit.errors import LorakitError
from lorakit.records.jsonl import load_records
from lorakit.records.record import Record
from lorakit.scoring.metrics import METRICS, compute_statistics
from lorakit.scoring.texts import Texts, check_aligned, texts_of

if TYPE_CHECKING:
    from lorakit.scoring.bertscore import Embedder

Where = Literal["worse", "better", "differs"]


@dataclass(frozen=True)
class Contrast:
    """What two systems, A and B, wrote for one record, and the score of either under a metric."""

    id: str
    prompt: str | None
    references: list[str]
    prediction_a: str
    prediction_b: str
    score_a: float
    score_b: float

    @property
    def difference(self) -> float:
        """B's score minus A's."""
        return self.score_b - self.score_a

    def as_record(self) -> dict[str, object]:
        """Return the line of JSON."""
        return {
            "id": self.id,
            "prompt": self.prompt,
            "references": self.references,
            "prediction_a": self.prediction_a,
            "prediction_b": self.prediction_b,
            "score_a": self.score_a,
            "score_b": self.score_b,
            "difference": self.difference,
        }


def contrast_metrics(where: Where) -> list[str]:
    """Return the metrics by which records can be chosen.

    They score every record by itself; `worse` and `better` need one that has a direction.
    """
    return [
        name
        for name, metric in METRICS.items()
        if metric.per_example
        and metric.needs != "baseline"
        and (where == "differs" or metric.higher_is_better is not None)
    ]


def contrast_systems(
    path_a: str,
    path_b: str,
    *,
    where: Where,
    metric: str = "rougeL",
    lang: str = "en",
    embedder: Embedder | None = None,
) -> list[Contrast]:
    """Return the records where B is worse or better than A, or where their predictions differ.

    The largest differences in score come first, equal ones in the order of the files. Raises
    LorakitError naming file and line where the two do not hold predictions for the same records,
    and for a metric that is not of `contrast_metrics`.
    """
    if metric not in contrast_metrics(where):
        raise LorakitError(
            f"{metric!r} cannot say where a record is {where}; choose from "
            f"{', '.join(contrast_metrics(where))}"
        )
    records, _ = load_records(path_a, "prediction")
    others, _ = load_records(path_b, "prediction")
    ours, theirs = texts_of(path_a, records), texts_of(path_b, others)
    check_aligned(theirs, ours)
    scores = (_scores(texts, metric, lang, embedder) for texts in (ours, theirs))
    contrasts = list(_contrasts(records, ours, theirs, *scores))
    sign = 1 if METRICS[metric].higher_is_better in (True, None) else -1
    chosen = [contrast for contrast in contrasts if _is(where, contrast, sign)]
    return sorted(chosen, key=lambda contrast: -abs(contrast.difference))


def _contrasts(
    records: Sequence[Record],
    ours: Texts,
    theirs: Texts,
    scores_a: Sequence[float],
    scores_b: Sequence[float],
) -> Iterator[Contrast]:
    for number, record in enumerate(records):
        yield Contrast(
            record.id,
            record.prompt if "prompt" in record.fields else None,
            ours.references[number],
            ours.predictions[number],
            theirs.predictions[number],
            scores_a[number],
            scores_b[number],
        )


def _scores(texts: Texts, metric: str, lang: str, embedder: Embedder | None) -> list[float]:
    """Return the metric's value for each record by itself."""
    statistics = compute_statistics(
        texts.predictions, texts.references, metric=metric, lang=lang, embedder=embedder
    )
    return [statistics.value_of(row, 1) for row in statistics.rows]


def _is(where: Where, contrast: Contrast, sign: int) -> bool:
    if where == "differs":
        return contrast.prediction_a != contrast.prediction_b
    gain = sign * contrast.difference
    return gain < 0 if where == "worse" else gain > 0
