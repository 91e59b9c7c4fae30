"""Scoring files of records: from the paths of JSONL files to scores of the systems they came from.

What a metric is stands in metrics.py, what a significance test does in significance.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lorakit.errors import LorakitError
from lorakit.scoring.answers import final_number
from lorakit.scoring.languages import LANGUAGES, script_of
from lorakit.scoring.metrics import METRICS, Score, statistics
from lorakit.scoring.statistics import Statistics
from lorakit.scoring.texts import Texts, check_alike, load_texts
from lorakit.settings import SignificanceSettings

if TYPE_CHECKING:  # imports numpy
    from lorakit.scoring.bertscore import Embedder
    from lorakit.scoring.significance import Comparison, Interval

_ENOUGH_TO_JUDGE = 1000


@dataclass(frozen=True)
class System:
    """What one line of scores is about: a file, or a name and the files of its runs (seeds)."""

    files: tuple[str, ...]
    name: str | None = None

    @property
    def label(self) -> str:
        return self.files[0] if self.name is None else self.name


@dataclass(frozen=True)
class Significance:
    """What a resampling of the examples says of one system, per metric in the order of its scores.

    `baseline` is the label of what it is compared with; then, and but for the baseline itself,
    `comparisons` has one entry per metric.
    """

    settings: SignificanceSettings
    intervals: tuple[Interval, ...]
    baseline: str | None = None
    comparisons: tuple[Comparison, ...] = ()

    def as_record(self, names: Sequence[str]) -> dict[str, Any]:
        """Return one object: the settings, then an object by metric of each kind of number."""
        told: dict[str, Any] = {"trials": self.settings.trials, "seed": self.settings.seed}
        intervals = zip(names, self.intervals, strict=True)
        told["intervals"] = {name: [one.low, one.high] for name, one in intervals}
        if self.baseline is not None:
            told["baseline"] = self.baseline
        if self.comparisons:
            compared = list(zip(names, self.comparisons, strict=True))
            told["differences"] = {name: one.difference for name, one in compared}
            told["difference_intervals"] = {
                name: [one.interval.low, one.interval.high] for name, one in compared
            }
            told["p_values"] = {name: one.p for name, one in compared}
        return told


@dataclass(frozen=True)
class SystemScores:
    """The scores of one system, and what the user should know before believing them.

    `runs` has one entry per metric, with the statistics of each file; a score is the mean of its
    runs' values.
    """

    system: System
    lang: str
    count: int
    runs: tuple[tuple[Statistics, ...], ...]
    scores: tuple[Score, ...]
    cautions: tuple[str, ...]
    significance: Significance | None = None
    group: tuple[str, Any] | None = None  # the field and its value that all its records have

    def of_group(self, field: str, value: Any, members: Sequence[int]) -> SystemScores:
        """Return the scores over some of the examples, by their numbers."""
        runs = tuple(
            tuple(replace(run, rows=[run.rows[member] for member in members]) for run in of_metric)
            for of_metric in self.runs
        )
        scores = tuple(
            replace(one, value=fmean(run.value for run in of_metric), count=len(members))
            for one, of_metric in zip(self.scores, runs, strict=True)
        )
        group = (field, value)
        return replace(self, runs=runs, scores=scores, count=len(members), group=group)

    def as_record(self) -> dict[str, Any]:
        """Return one flat record: the metrics' full values by name, signatures in one object.

        A system that was given a name also tells its files and the value of each.
        """
        names = [one.name for one in self.scores]
        named = self.system.name is not None
        told: dict[str, Any] = (
            {"system": self.system.name, "files": list(self.system.files)}
            if named
            else {"file": self.system.label}
        )
        if self.group is not None:
            told["group"] = dict([self.group])
        told |= {"count": self.count, "lang": self.lang}
        told |= {one.name: one.value for one in self.scores}
        told["signatures"] = {one.name: one.signature for one in self.scores}
        if named:
            values = ([run.value for run in runs] for runs in self.runs)
            told["runs"] = dict(zip(names, values, strict=True))
        if self.significance is not None:
            told["significance"] = self.significance.as_record(names)
        return told


def score_systems(
    systems: Sequence[System],
    *,
    metrics: Sequence[str],
    lang: str = "en",
    baseline: str | None = None,
    settings: SignificanceSettings | None = None,
    embedder: Embedder | None = None,
    group_by: str | None = None,
) -> list[SystemScores]:
    """Return the scores of each system under each metric, in order.

    `group_by` is a field of the records: after the scores over all of them come those over the
    records of each of its values, in the order in which they first occur.

    With `settings`, each has bootstrap intervals, and with the label of one as `baseline`, every
    other is compared with it; then all must have predicted for the same records in the same order,
    as the files of one system always must. The texts of two files are in memory at a time. Raises
    LorakitError naming file and line.
    """
    alike = None
    compares = any(METRICS[name].compared for name in metrics)
    others: list[Texts] = []
    if baseline is not None:
        first = next(system for system in systems if system.label == baseline)
        _check_runs(systems, first)
        alike = load_texts(first.files[0], group_by)
        others = [load_texts(path, group_by) for path in first.files[1:]] if compares else []
    loaded: dict[str, Texts] = {} if alike is None else {alike.path: alike}
    scored, groups = [], []
    for system in systems:
        one, texts = _score(
            system,
            alike,
            loaded,
            others=[alike, *others] if compares and alike else [],
            metrics=metrics,
            lang=lang,
            embedder=embedder,
            group_by=group_by,
        )
        scored.append(one)
        groups.append(_groups(texts.groups))
    told = [scored]
    if group_by is not None:
        values = dict.fromkeys(key for found in groups for key in found)
        told += [_of_group(scored, groups, group_by, value) for value in values]
    if settings is None:
        return [one for part in told for one in part]
    return [one for part in told for one in _with_significance(part, baseline, settings)]


def _groups(values: Sequence[str]) -> dict[str, list[int]]:
    """Return the numbers of the examples of each value, as JSON, in the order of the values."""
    groups: dict[str, list[int]] = {}
    for number, value in enumerate(values):
        groups.setdefault(value, []).append(number)
    return groups


def _of_group(
    scored: Sequence[SystemScores],
    groups: Sequence[dict[str, list[int]]],
    field: str,
    group: str,
) -> list[SystemScores]:
    return [
        one.of_group(field, json.loads(group), found[group])
        for one, found in zip(scored, groups, strict=True)
        if group in found
    ]


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
    system: System,
    alike: Texts | None,
    loaded: dict[str, Texts],
    *,
    others: Sequence[Texts],
    metrics: Sequence[str],
    lang: str,
    embedder: Embedder | None,
    group_by: str | None,
) -> tuple[SystemScores, Texts]:
    """Return one system's scores, its files checked to line up with `alike`, and its texts.

    `loaded` are the files that were read before: stdin can be read only once. `others` are the
    baseline's runs, one for each of the system's or one for all.
    """
    runs: list[list[Statistics]] = [[] for _ in metrics]
    for number, path in enumerate(system.files):
        texts = loaded[path] if path in loaded else load_texts(path, group_by)
        other = others[number if len(others) > 1 else 0].predictions if others else None
        alike = alike or (texts if len(system.files) > 1 else None)
        if alike is not None:
            check_alike(texts, alike)
        for place, name in enumerate(metrics):
            found = statistics(
                texts.predictions,
                texts.references,
                metric=name,
                lang=lang,
                embedder=embedder,
                others=other,
            )
            runs[place].append(found)
    count = len(texts.predictions)
    scores = tuple(
        Score(name, fmean(run.value for run in of_metric), count, of_metric[0].signature)
        for name, of_metric in zip(metrics, runs, strict=True)
    )
    cautions = tuple(find_cautions(texts.references, metrics=metrics, lang=lang))
    return SystemScores(system, lang, count, tuple(map(tuple, runs)), scores, cautions), texts


def _with_significance(
    scored: Sequence[SystemScores], baseline: str | None, settings: SignificanceSettings
) -> list[SystemScores]:
    from lorakit.scoring.significance import bootstrap, compare, interval_of

    drawn = [bootstrap(one.runs, settings) for one in scored]
    labels = [one.system.label for one in scored]
    place = None if baseline is None else labels.index(baseline)
    told = []
    for one, values in zip(scored, drawn, strict=True):
        found = Significance(settings, tuple(map(interval_of, values)), baseline)
        if place is not None and one.system.label != baseline:
            compared = compare(one.runs, scored[place].runs, values, drawn[place], settings)
            found = replace(found, comparisons=tuple(compared))
        told.append(replace(one, significance=found))
    return told


def find_cautions(
    references: Sequence[Sequence[str]], *, metrics: Sequence[str], lang: str
) -> list[str]:
    """Return a line for each way in which a metric cannot work on such references."""
    texts = [text for listed in references[:_ENOUGH_TO_JUDGE] for text in listed]
    script = script_of(texts)
    found = []
    blind = [name for name in metrics if METRICS[name].reads in ("words", "ascii")]
    if blind and _needs_other_language(script, lang):
        found.append(
            f"the references are mostly {LANGUAGES[script].name}, whose words --lang {lang} does "
            f"not find ({', '.join(blind)}); use --lang {script}"
        )
    dropped = [name for name in metrics if METRICS[name].reads == "ascii"]
    if dropped and script == "other" and LANGUAGES[lang].spaced:
        found.append(
            f"the references are mostly not in ASCII letters, the only ones {', '.join(dropped)} "
            "counts; use --metric chrf"
        )
    numeric = [name for name in metrics if METRICS[name].reads == "numbers"]
    if numeric and 2 * sum(final_number(text) is None for text in texts) > len(texts):
        found.append(
            f"most references hold no number, which {', '.join(numeric)} compares; "
            "choose another --metric"
        )
    return found


def _needs_other_language(script: str, lang: str) -> bool:
    """Say whether words are not found: no spaces between them, or kana among Chinese characters."""
    if script not in LANGUAGES or script == lang:
        return False
    return LANGUAGES[lang].spaced or script == "ja"
