"""Write scores as a table for the terminal: a row per system, a column per metric."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import IO

from lorakit.foreign_text import printable
from lorakit.scoring.metrics import METRICS
from lorakit.scoring.systems import SystemScores

_WIDER_THAN_ANY_ROW = 10_000
_SIGNIFICANT = 0.05


def write_score_table(systems: Sequence[SystemScores], stream: IO[str]) -> None:
    """Write the values with two decimals, the best of several in bold, then notes on them.

    Where examples were resampled, a value is followed by ± half its interval, and by a star where
    it differs from the baseline's with p < 0.05. The signatures stand below, each once. No line is
    folded or cut: a narrow terminal wraps it.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=stream, width=_WIDER_THAN_ANY_ROW)
    named = any(scores.system.name is not None for scores in systems)
    table = Table("system" if named else "file", box=None, pad_edge=False, header_style="bold")
    table.add_column("count", justify="right")
    for score in systems[0].scores:
        table.add_column(score.name, justify="right", no_wrap=True)
    best_of = {
        repr(scores.group): _best_values(
            [other for other in systems if other.group == scores.group]
        )
        for scores in systems
    }
    for scores in systems:
        best = best_of[repr(scores.group)]
        cells = [
            Text(_cell(scores, column), style="bold" if score.value == best[column] else "")
            for column, score in enumerate(scores.scores)
        ]
        table.add_row(Text(printable(_label(scores))), str(scores.count), *cells)
    console.print(table)
    for line in dict.fromkeys(line for scores in systems for line in _notes(scores)):
        console.print(Text(printable(line), style="dim"), soft_wrap=True)


def _label(scores: SystemScores) -> str:
    """Return what a row is about: the system and, where there is one, the group of records."""
    if scores.group is None:
        return scores.system.label
    field, value = scores.group
    return f"{scores.system.label} [{field}: {value}]"


def _cell(scores: SystemScores, column: int) -> str:
    """Return a value with its interval and star, where examples were resampled."""
    value = f"{scores.scores[column].value:.2f}"
    if scores.significance is None:
        return value
    comparisons = scores.significance.comparisons
    star = "*" if comparisons and comparisons[column].p < _SIGNIFICANT else " "
    return f"{value} ±{scores.significance.intervals[column].half:.2f}{star}"


def _notes(scores: SystemScores) -> Iterator[str]:
    """Yield the lines below the table: what ± and the star mean, and the signatures."""
    if scores.significance is not None:
        settings, baseline = scores.significance.settings, scores.significance.baseline
        draws = f"{settings.trials} trials, seed {settings.seed}"
        yield f"±: half the 95 % bootstrap interval over examples ({draws})"
        if baseline is not None:
            yield f"*: p < {_SIGNIFICANT} against {baseline}, paired approximate randomization"
    yield from (f"{score.name}: {score.signature}" for score in scores.scores)


def _best_values(systems: Sequence[SystemScores]) -> list[float | None]:
    """Return the best value of each column; None where no system is better than another."""
    if len(systems) == 1:
        return [None] * len(systems[0].scores)
    columns = zip(*(system.scores for system in systems), strict=True)
    return [
        _best(METRICS[column[0].name].higher_is_better, [score.value for score in column])
        for column in columns
    ]


def _best(higher_is_better: bool | None, values: Sequence[float]) -> float | None:
    if higher_is_better is None:
        return None
    return max(values) if higher_is_better else min(values)
