"""Significance: how far chance alone may set two systems apart, or move a value.

A trial draws the examples again but needs no texts: the rows of `Statistics` are enough even for
the value of a corpus metric. This file knows nothing of files.

A system is one or more runs (seeds) on the same examples, and its value the mean over its runs'
values. Examples are drawn, never runs: a trial swaps or draws an example in all runs at once. So
the test asks whether these trained systems differ by more than the choice of test examples
explains. How much training them again would change is the spread over the runs, which no p-value
here covers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from lorakit.errors import LorakitError
from lorakit.scoring.statistics import Statistics
from lorakit.settings import SignificanceSettings

if TYPE_CHECKING:
    from lorakit.scoring.statistics import Array

Runs = Sequence[Statistics]

_DRAWS_AT_ONCE = 1 << 21  # numbers in memory in one array
_WORD = 32  # numpy draws that many coins from one number: whole words keep its one sequence
_TIE = 1e-9  # points of percent: sums of fractions in another order differ by less


@dataclass(frozen=True)
class Interval:
    """The ends of a 95 % interval."""

    low: float
    high: float

    @property
    def half(self) -> float:
        """Half its width: the number after ±."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Comparison:
    """A system minus the baseline under one metric, in points, and the p-value of no difference."""

    difference: float
    interval: Interval
    p: float


def interval_of(values: Array) -> Interval:
    """Return the interval without a fortieth of the values at each end, as in sacrebleu."""
    ordered = np.sort(values)
    outside = len(ordered) // 40
    return Interval(float(ordered[outside]), float(ordered[-1 - outside]))


def bootstrap(metrics: Sequence[Runs], settings: SignificanceSettings) -> list[Array]:
    """Return a system's values under each metric (trials), its examples drawn with replacement.

    With the same settings and number of examples, the same examples are drawn for every system, so
    the values of two systems are pairs. Source: Koehn 2004; the draws are those of sacrebleu's
    `--paired-bs` with the same seed.
    """
    return bootstrap_all([metrics], settings)[0]


def bootstrap_all(
    systems: Sequence[Sequence[Runs]], settings: SignificanceSettings
) -> list[list[Array]]:
    """Return what `bootstrap` does of each system; those of as many examples share the draws."""
    rows = [np.hstack([_matrix(run) for runs in metrics for run in runs]) for metrics in systems]
    chunks: list[list[list[Array]]] = [[] for _ in systems]
    for count in dict.fromkeys(map(len, rows)):
        for times in _draws(count, settings):
            for number, metrics in enumerate(systems):
                if len(rows[number]) == count:
                    chunks[number].append(_values(metrics, times @ rows[number], count))
    return [[np.concatenate(parts) for parts in zip(*drawn, strict=True)] for drawn in chunks]


def _draws(count: int, settings: SignificanceSettings) -> Iterator[Array]:
    """Yield how often each of `count` examples is drawn, (some of the trials × count)."""
    generator = np.random.default_rng(settings.seed)
    for trials in _chunks(settings.trials, count):
        drawn = generator.choice(count, size=(trials, count), replace=True)
        drawn += count * np.arange(trials)[:, None]
        times = np.bincount(drawn.ravel(), minlength=trials * count).reshape(trials, count)
        yield times.astype(np.float64)


def compare(
    system: Sequence[Runs],
    baseline: Sequence[Runs],
    system_values: Sequence[Array],
    baseline_values: Sequence[Array],
    settings: SignificanceSettings,
) -> list[Comparison]:
    """Return the comparison under each metric; the values of both are those of `bootstrap`."""
    comparisons = []
    for metric, p in enumerate(p_values(system, baseline, settings)):
        ours, theirs = (fmean(run.value for run in side[metric]) for side in (system, baseline))
        interval = interval_of(system_values[metric] - baseline_values[metric])
        comparisons.append(Comparison(ours - theirs, interval, p))
    return comparisons


def p_values(
    system: Sequence[Runs], baseline: Sequence[Runs], settings: SignificanceSettings
) -> list[float]:
    """Return, for each metric, how often chance alone makes a difference as large as the observed.

    Paired approximate randomization, two-sided: in each trial a coin per example decides whether
    the two systems swap their outputs for it, and p = (c + 1) / (trials + 1), where c counts the
    trials whose absolute difference is no smaller than the observed one. sacrebleu counts only
    larger ones, which makes two equal systems differ significantly; apart from that its
    `--paired-ar`, with the same seed, gives the same p. Runs are paired in order, a single run with
    each of the other's. Source: Noreen 1989; Riezler and Maxwell 2005. Raises LorakitError where
    the numbers of runs or examples cannot be paired.
    """
    pairs = [_paired(ours, theirs) for ours, theirs in zip(system, baseline, strict=True)]
    ours, theirs = ([side for side, _ in pairs], [side for _, side in pairs])
    rows, others = (
        np.hstack([_matrix(run) for runs in side for run in runs]) for side in (ours, theirs)
    )
    total, swap, count = rows.sum(axis=0), others - rows, len(rows)
    both = total + others.sum(axis=0)
    observed = _distances(ours, theirs, total[None], both, count)
    extremes = [0] * len(pairs)  # trials whose difference is as large as the observed one
    generator = np.random.default_rng(settings.seed)
    for trials in _chunks(settings.trials, count):
        swapped = generator.integers(2, size=(trials, count), dtype=bool).astype(np.float64)
        distances = _distances(ours, theirs, total + swapped @ swap, both, count)
        for metric, distance in enumerate(distances):
            extremes[metric] += int(np.sum(distance >= observed[metric] - _TIE))
    return [(extreme + 1) / (settings.trials + 1) for extreme in extremes]


def paired_error(ours: Statistics, theirs: Statistics) -> float:
    """Return the standard error of the difference of two systems on the same examples, in points.

    It is the jackknife's: from the differences without one example at a time. For a mean over
    examples that is the usual s/√n of the paired differences; for BLEU, chrF and other values of a
    whole file it needs neither values of examples nor random draws. Source: Efron 1982, chapter 3.
    There must be two examples or more.
    """
    differences = _without_each(ours) - _without_each(theirs)
    return float(np.sqrt((len(differences) - 1) * np.var(differences)))


def _without_each(run: Statistics) -> Array:
    """Return a run's values (examples) over all examples but one, for each of them."""
    rows = _matrix(run)
    return run.values_of(rows.sum(axis=0) - rows, len(rows) - 1)


def _distances(
    ours: Sequence[Runs], theirs: Sequence[Runs], sums: Array, both: Array, count: int
) -> list[Array]:
    """Return the absolute difference (n) under each metric.

    `sums` (n × all runs' columns) are those of our side, `both` those of the two sides together.
    """
    sides = zip(_values(ours, sums, count), _values(theirs, both - sums, count), strict=True)
    return [np.abs(our_values - their_values) for our_values, their_values in sides]


def _paired(ours: Runs, theirs: Runs) -> tuple[Runs, Runs]:
    """Return equally many runs of both sides, repeating a single run for each of the other's."""
    if len(ours) != len(theirs) and 1 not in (len(ours), len(theirs)):
        raise LorakitError(
            f"{len(ours)} runs cannot be paired with {len(theirs)}; "
            "give as many of each system, or one of either"
        )
    if len({len(run.rows) for run in (*ours, *theirs)}) > 1:
        raise LorakitError(
            "the systems have different numbers of examples; compare them on the same ones"
        )
    most = max(len(ours), len(theirs))
    return list(ours) * (most // len(ours)), list(theirs) * (most // len(theirs))


def _matrix(run: Statistics) -> Array:
    """Return the rows of a run as an array (examples × length of a row)."""
    return np.asarray(run.rows, dtype=np.float64)


def _values(metrics: Sequence[Runs], sums: Array, count: int) -> list[Array]:
    """Return the mean over runs of their values (n) per metric; `sums` (n × all runs' columns)."""
    means, start = [], 0
    for runs in metrics:
        values = []
        for run in runs:
            end = start + len(run.rows[0])
            values.append(run.values_of(sums[:, start:end], count))
            start = end
        means.append(np.mean(values, axis=0))
    return means


def _chunks(trials: int, count: int) -> Iterator[int]:
    """Yield how many trials to run at a time; they add up to `trials` and bound the memory."""
    most = max(_WORD, _DRAWS_AT_ONCE // count // _WORD * _WORD)
    while trials > 0:
        yield min(most, trials)
        trials -= most
