"""The patterns of rank_pattern and alpha_pattern: which of them is the first to match a module.

PEFT matches a pattern to the last parts of a module's name. Most are names, which are looked up
rather than tried one after the other, so that thousands of modules can have one each.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from lorakit.adapters.regexes import UnboundedError, matched

MOST_EXPRESSIONS = 1_000  # patterns that are no names
LONGEST_TOGETHER = 1 << 18  # characters of them
_NAME = re.compile(r"\^?(?:[A-Za-z0-9_-]|\.|\\\.)*")
_Mask = tuple[int, ...]


def peft_regex(pattern: str) -> str:
    """Return the regular expression that PEFT makes of a pattern, for the start of a name."""
    return f"(.*\\.)?({pattern})$"


def is_name(pattern: str) -> bool:
    """Return whether a pattern is a name: it has no special characters but `.` and a first `^`."""
    return _NAME.fullmatch(pattern) is not None


class PatternTable:
    """Patterns in their order, as `first` looks them up.

    A dot in a name stands for any character; `model.h.1` matches `model.h.1` and, if it was there,
    `model_h_1`. Names with dots at the same places are in one dict, their dots masked.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self._names: dict[tuple[bool, int], dict[_Mask, dict[str, int]]] = {}
        self._others: list[tuple[int, str]] = []
        for number, pattern in enumerate(patterns):
            if is_name(pattern):
                self._add_name(pattern, number)
            else:
                self._others.append((number, peft_regex(pattern)))

    def _add_name(self, pattern: str, number: int) -> None:
        anchored = pattern.startswith("^")
        parts = re.findall(r"\\\.|[^^]", pattern)
        mask = tuple(place for place, part in enumerate(parts) if part == ".")
        by_mask = self._names.setdefault((anchored, len(parts)), {})
        name = "".join(part[-1] for part in parts)
        by_mask.setdefault(mask, {}).setdefault(name, number)

    def first(self, module: str) -> tuple[int | None, int]:
        """Return the number of the first pattern to match, if any, and the steps this took.

        Raises UnboundedError as a match does.
        """
        numbers, steps = self._matching_names(module)
        best = min(numbers, default=None)
        for number, regex in self._others:
            if best is not None and number > best:
                break
            match, taken = matched(regex, module, False)
            steps += taken
            if match is not None:
                return number, steps
        return best, steps

    def _matching_names(self, module: str) -> tuple[list[int], int]:
        """Return the numbers of the names that match a module, and the steps this took."""
        numbers, steps = [], 0
        for start in (0, *(dot.end() for dot in re.finditer(r"\.", module))):
            end = module[start:]
            for anchored in (False, True) if start == 0 else (False,):
                for mask, names in self._names.get((anchored, len(end)), {}).items():
                    steps += 1 + len(mask)
                    number = names.get(_masked(end, mask))
                    if number is not None:
                        numbers.append(number)
        return numbers, steps


def _masked(text: str, mask: _Mask) -> str:
    """Return a text with dots at the places of the mask."""
    characters = list(text)
    for place in mask:
        characters[place] = "."
    return "".join(characters)


@functools.lru_cache(maxsize=64)
def table_of(patterns: tuple[str, ...]) -> PatternTable:
    """Return the table of patterns, built once for each choice of them."""
    return PatternTable(patterns)


def check_patterns(patterns: Sequence[str]) -> None:
    """Raise UnboundedError for more patterns that are no names than can be matched in time."""
    lengths = [len(pattern) for pattern in patterns if not is_name(pattern)]
    if len(lengths) > MOST_EXPRESSIONS or sum(lengths) > LONGEST_TOGETHER:
        raise UnboundedError(f"{len(lengths)} patterns that are no names")
