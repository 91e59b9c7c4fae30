"""What `find-boundary` computes, shared out over the processes of a team and saved as it comes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

from lorakit.models.sharing import Team
from lorakit.runs.resume import SavedValues


def values_in_turn(
    names: Sequence[str], compute: Callable[[int], list[float]], saved: SavedValues, team: Team
) -> Iterator[list[float]]:
    """Yield the values under every name, in order: those saved, or what `compute` returns.

    `compute` is called with the place of a name, by the process whose turn it is. What is saved is
    the same on every process to begin with, and in the end.
    """

    def values(place: int) -> list[float]:
        before = saved.get(names[place], float)
        return compute(place) if before is None else before

    for name, computed in zip(names, team.in_turn(range(len(names)), values), strict=True):
        yield saved.find(name, float, functools.partial(list, computed))
