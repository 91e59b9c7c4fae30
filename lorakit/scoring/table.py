"""The table of scores that a terminal gets: a row per system, a column per metric."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import IO

from lorakit.scoring.metrics import METRICS
from lorakit.scoring.systems import SystemScores

_WIDER_THAN_ANY_ROW = 10_000
_SIGNIFICANT = 0.05


def write_score_table(systems: Sequence[SystemScores], stream: IO[str]) -> None:
    """Write the values with two decimals, the best of several in bold, then notes on them.

    Where examples were resampled a value is followed by ± half its interval, and by a star where
    it differs from the baseline's with p < 0.05. The signatures stand below, each once. No line is
    folded or cut: a narrow terminal wraps it.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=stream, width=_WIDER_THAN_ANY_ROW)
    named = any(one.system.name is not None for one in systems)
    table = Table("system" if named else "file", box=None, pad_edge=False, header_style="bold")
    table.add_column("count", justify="right")
    for score in systems[0].scores:
        table.add_column(score.name, justify="right", no_wrap=True)
    best_of = {
        repr(one.group): _best_values([other for other in systems if other.group == one.group])
        for one in systems
    }
    for one in systems:
        best = best_of[repr(one.group)]
        cells = [
            Text(_cell(one, place), style="bold" if score.value == best[place] else "")
            for place, score in enumerate(one.scores)
        ]
        label = one.system.label
        if one.group is not None:
            label += f" [{one.group[0]}: {one.group[1]}]"
        table.add_row(Text(label), str(one.count), *cells)
    console.print(table)
    for line in dict.fromkeys(line for one in systems for line in _notes(one)):
        console.print(Text(line, style="dim"), soft_wrap=True)


def _cell(one: SystemScores, place: int) -> str:
    value = f"{one.scores[place].value:.2f}"
    if one.significance is None:
        return value
    compared = one.significance.comparisons
    star = "*" if compared and compared[place].p < _SIGNIFICANT else " "
    return f"{value} ±{one.significance.intervals[place].half:.2f}{star}"


def _notes(one: SystemScores) -> Iterator[str]:
    if one.significance is not None:
        settings, baseline = one.significance.settings, one.significance.baseline
        drawn = f"{settings.trials} trials, seed {settings.seed}"
        yield f"±: half the 95 % bootstrap interval over examples ({drawn})"
        if baseline is not None:
            yield f"*: p < {_SIGNIFICANT} against {baseline}, paired approximate randomization"
    yield from (f"{score.name}: {score.signature}" for score in one.scores)


def _best_values(systems: Sequence[SystemScores]) -> list[float | None]:
    if len(systems) == 1:
        return [None] * len(systems[0].scores)
    columns = zip(*(system.scores for system in systems), strict=True)
    return [
        (max if METRICS[column[0].name].higher_is_better else min)(one.value for one in column)
        for column in columns
    ]
