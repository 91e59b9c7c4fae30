"""Score systems: from the paths of JSONL files to the scores of the systems that wrote them.

A system is one or more runs (seeds), each a file. Metrics are in metrics.py, significance tests in
significance.py, and the reading of files in texts.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

from lorakit.errors import LorakitError
from lorakit.scoring.cautions import find_cautions
from lorakit.scoring.metrics import METRICS, Score, compute_statistics
from lorakit.scoring.statistics import Statistics
from lorakit.scoring.texts import Texts, check_aligned, load_texts
from lorakit.settings import SignificanceSettings

if TYPE_CHECKING:  # imports numpy
    from lorakit.runs.resume import SavedValues
    from lorakit.scoring.bertscore import Embedder
    from lorakit.scoring.significance import Comparison, Interval


@dataclass(frozen=True)
class System:
    """What one line of scores is about: a file, or a name and the files of its runs (seeds)."""

    files: tuple[str, ...]
    name: str | None = None

    @property
    def label(self) -> str:
        """The system's name, or else its file."""
        return self.files[0] if self.name is None else self.name


@dataclass(frozen=True)
class Significance:
    """What resampling the examples says of one system, per metric in the order of its scores.

    `baseline` is the label of the system it is compared with; except for the baseline itself,
    `comparisons` then has one entry per metric.
    """

    settings: SignificanceSettings
    intervals: tuple[Interval, ...]
    baseline: str | None = None
    comparisons: tuple[Comparison, ...] = ()

    def as_record(self, names: Sequence[str]) -> dict[str, object]:
        """Return one object: the settings, then each kind of number as an object by metric."""
        record: dict[str, object] = {"trials": self.settings.trials, "seed": self.settings.seed}
        record["intervals"] = _ends_by_name(names, self.intervals)
        if self.baseline is not None:
            record["baseline"] = self.baseline
        if self.comparisons:
            compared = list(zip(names, self.comparisons, strict=True))
            intervals = [comparison.interval for comparison in self.comparisons]
            record["differences"] = {name: comparison.difference for name, comparison in compared}
            record["difference_intervals"] = _ends_by_name(names, intervals)
            record["p_values"] = {name: comparison.p for name, comparison in compared}
        return record


def _ends_by_name(names: Sequence[str], intervals: Sequence[Interval]) -> dict[str, list[float]]:
    pairs = zip(names, intervals, strict=True)
    return {name: [interval.low, interval.high] for name, interval in pairs}


@dataclass(frozen=True)
class SystemScores:
    """The scores of one system, and what the user should know before believing them.

    `runs` has one entry per metric, with the statistics of each file; a score is the mean of its
    runs' values. `group` is a field and the value of it that all these records have in common.
    """

    system: System
    lang: str
    count: int
    runs: tuple[tuple[Statistics, ...], ...]
    scores: tuple[Score, ...]
    cautions: tuple[str, ...]
    significance: Significance | None = None
    group: tuple[str, object] | None = None

    def of_group(self, field: str, value: object, members: Sequence[int]) -> SystemScores:
        """Return the scores over the examples with these numbers, which share a field's value."""
        runs = tuple(
            tuple(replace(run, rows=[run.rows[member] for member in members]) for run in of_metric)
            for of_metric in self.runs
        )
        scores = tuple(
            replace(score, value=fmean(run.value for run in of_metric), count=len(members))
            for score, of_metric in zip(self.scores, runs, strict=True)
        )
        group = (field, value)
        return replace(self, runs=runs, scores=scores, count=len(members), group=group)

    def as_record(self) -> dict[str, object]:
        """Return one flat record: the metrics' full values by name, signatures in one object.

        The record of a named system also lists its files and the value of each.
        """
        names = [score.name for score in self.scores]
        named = self.system.name is not None
        record: dict[str, object] = (
            {"system": self.system.name, "files": list(self.system.files)}
            if named
            else {"file": self.system.label}
        )
        if self.group is not None:
            record["group"] = dict([self.group])
        record |= {"count": self.count, "lang": self.lang}
        record |= {score.name: score.value for score in self.scores}
        record["signatures"] = {score.name: score.signature for score in self.scores}
        if named:
            values = ([run.value for run in of_metric] for of_metric in self.runs)
            record["runs"] = dict(zip(names, values, strict=True))
        if self.significance is not None:
            record["significance"] = self.significance.as_record(names)
        return record


@dataclass(frozen=True)
class _Request:
    """What to compute of every system."""

    metrics: Sequence[str]
    lang: str
    embedder: Embedder | None
    group_by: str | None
    saved: SavedValues | None = None

    @property
    def needs_baseline(self) -> bool:
        return any(METRICS[name].needs == "baseline" for name in self.metrics)


Groups = Mapping[str, Sequence[int]]  # a value as JSON: the numbers of the examples that have it


def score_systems(
    systems: Sequence[System],
    *,
    metrics: Sequence[str],
    lang: str = "en",
    baseline: str | None = None,
    settings: SignificanceSettings | None = None,
    embedder: Embedder | None = None,
    group_by: str | None = None,
    saved: SavedValues | None = None,
) -> list[SystemScores]:
    """Return the scores of each system under each metric, in order.

    `group_by` is a field of the records: after the scores over all of them come those over the
    records of each of its values, in the order in which the values first occur.

    With `settings`, every system gets bootstrap intervals; with the label of one as `baseline`, all
    others are compared with it. All must then hold predictions for the same records in the same
    order, as the files of one system always must. At most two files' texts are in memory at a time.
    Raises LorakitError naming file and line.
    """
    request = _Request(metrics, lang, embedder, group_by, saved)
    baseline_runs = [] if baseline is None else _load_baseline(systems, baseline, request)
    scored, groups = [], []
    for system in systems:
        scores, groups_of_system = _score(system, baseline_runs, request)
        scored.append(scores)
        groups.append(groups_of_system)
    parts = [scored]
    if group_by is not None:
        parts += _by_group(scored, groups, group_by)
    if settings is not None:
        parts = [_with_significance(part, baseline, settings) for part in parts]
    return [scores for part in parts for scores in part]


def _load_baseline(systems: Sequence[System], label: str, request: _Request) -> list[Texts]:
    """Return the baseline's first run, and its others where a metric compares with them."""
    baseline = next(system for system in systems if system.label == label)
    _check_runs(systems, baseline)
    files = baseline.files if request.needs_baseline else baseline.files[:1]
    return [load_texts(path, request.group_by) for path in files]


def _check_runs(systems: Sequence[System], baseline: System) -> None:
    """Raise LorakitError where the runs of a system cannot be paired with the baseline's."""
    theirs = len(baseline.files)
    for system in systems:
        ours = len(system.files)
        if ours != theirs and 1 not in (ours, theirs):
            raise LorakitError(
                f"{system.label} has {ours} runs and the baseline {baseline.label} {theirs}; "
                "give as many of each, or one of either"
            )


def _score(
    system: System, baseline_runs: Sequence[Texts], request: _Request
) -> tuple[SystemScores, Groups]:
    """Return a system's scores and the groups of its examples.

    Its files are checked to line up with the baseline's first run, or else with each other.
    """
    runs: list[tuple[Statistics, ...]] = []
    reference = baseline_runs[0] if baseline_runs else None
    for number, path in enumerate(system.files):
        texts = _load(path, baseline_runs, request.group_by)
        if reference is not None:
            check_aligned(texts, reference)
        elif len(system.files) > 1:
            reference = texts
        opponent = baseline_runs[number if len(baseline_runs) > 1 else 0] if baseline_runs else None
        runs.append(_statistics(texts, opponent, request))
    by_metric = tuple(zip(*runs, strict=True))
    count = len(texts.predictions)
    scores = tuple(
        Score(name, fmean(run.value for run in of_metric), count, of_metric[0].signature)
        for name, of_metric in zip(request.metrics, by_metric, strict=True)
    )
    cautions = find_cautions(texts.references, metrics=request.metrics, lang=request.lang)
    scored = SystemScores(system, request.lang, count, by_metric, scores, tuple(cautions))
    return scored, _groups(texts.groups)


def _load(path: str, baseline_runs: Sequence[Texts], group_by: str | None) -> Texts:
    """Return the texts of a file, reusing the baseline's first run: stdin can be read only once."""
    first = baseline_runs[0] if baseline_runs else None
    return first if first is not None and first.path == path else load_texts(path, group_by)


def _statistics(
    texts: Texts, baseline_run: Texts | None, request: _Request
) -> tuple[Statistics, ...]:
    """Return the statistics of one run under each metric."""
    return tuple(
        compute_statistics(
            texts.predictions,
            texts.references,
            metric=name,
            lang=request.lang,
            embedder=request.embedder,
            saved=request.saved,
            baseline_predictions=None if baseline_run is None else baseline_run.predictions,
        )
        for name in request.metrics
    )


def _groups(values: Sequence[str]) -> Groups:
    """Return the numbers of the examples by their value."""
    groups: dict[str, list[int]] = {}
    for number, value in enumerate(values):
        groups.setdefault(value, []).append(number)
    return groups


def _by_group(
    scored: Sequence[SystemScores], groups: Sequence[Groups], field: str
) -> Iterator[list[SystemScores]]:
    """Yield, for each value of the field, the scores of every system that has records with it."""
    for value in dict.fromkeys(value for of_system in groups for value in of_system):
        yield [
            scores.of_group(field, json.loads(value), of_system[value])
            for scores, of_system in zip(scored, groups, strict=True)
            if value in of_system
        ]


def _with_significance(
    scored: Sequence[SystemScores], baseline: str | None, settings: SignificanceSettings
) -> list[SystemScores]:
    """Return the scores with intervals and, where there is a baseline, comparisons with it."""
    from lorakit.scoring.significance import bootstrap_all, compare, interval_of

    resampled = bootstrap_all([scores.runs for scores in scored], settings)
    labels = [scores.system.label for scores in scored]
    reference = None if baseline is None else labels.index(baseline)
    results = []
    for scores, values in zip(scored, resampled, strict=True):
        significance = Significance(settings, tuple(map(interval_of, values)), baseline)
        if reference is not None and scores.system.label != baseline:
            comparisons = compare(
                scores.runs, scored[reference].runs, values, resampled[reference], settings
            )
            significance = replace(significance, comparisons=tuple(comparisons))
        results.append(replace(scores, significance=significance))
    return results
