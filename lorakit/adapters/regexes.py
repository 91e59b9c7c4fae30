r"""Regular expressions of configs, matched in bounded time with the meaning `re` gives them.

`re` tries every way to match one after the other, which for `(a+)+$` are more than can be tried.
Here an expression becomes a short program, and no step of it is tried twice at the same character,
so that a match takes at most (steps of the program) × (characters of the text):

    q|v+    0: either 1 or 3    1: q    2: go to 5    3: v    4: either 3 or 5    5: done

Steps are tried in the order in which `re` tries them, so the first match is the one that `re`
finds, with the same group. Characters, their classes and places such as `\b` are left to `re`
itself. What cannot be matched so, references to groups and possessive repeats, is refused.
"""

from __future__ import annotations

import functools
import re
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

_re: Any = re  # its parser is not in the type stubs
_parser: Any = _re._parser
_c: Any = _re._constants

LONGEST = 50_000  # characters of an expression
MOST_STEPS = 20_000  # of its program
MOST_TAKEN = 1_000_000  # in one match: some seconds
_INDEX = "idx"  # the group whose text is wanted: PEFT's name of a layer's index
_NONE = -1
_Node = tuple[Any, Any]


class UnboundedError(ValueError):
    """An expression that cannot be matched in bounded time; the message says why."""


class Match(NamedTuple):
    """Where a match ends, and the text of the group `idx` in it, if any."""

    end: int
    layer: str | None


class _Char(NamedTuple):
    """Step: one character that matches."""

    accepts: re.Pattern[str]


class _Place(NamedTuple):
    """Step: a place between characters, such as `$`."""

    holds: re.Pattern[str]


class _Mark(NamedTuple):
    """Step: where the group `idx` begins (0) or ends (1)."""

    side: int


class _Either(NamedTuple):
    """Step: go on at each of these steps; the first is tried first."""

    steps: tuple[int, ...]


class _Look(NamedTuple):
    """Step: another program matches here, or `back` characters before, or it must not."""

    program: Program
    back: int
    wanted: bool


_Step = _Char | _Place | _Mark | _Either | _Look


@dataclass(frozen=True)
class Program:
    """The steps of an expression; one past the last is a match."""

    steps: tuple[_Step, ...]

    def match(self, text: str, start: int = 0, *, full: bool = False) -> tuple[Match | None, int]:
        """Return the match that begins at `start`, if any, and the number of steps taken.

        Raises UnboundedError after MOST_TAKEN steps, which only a look ahead can need.
        """
        seen: set[tuple[int, int]] = set()
        todo = [(0, start, _NONE, _NONE)]
        taken, done = 0, len(self.steps)
        while todo:
            at, position, first, last = todo.pop()
            if (at, position) in seen:
                continue
            seen.add((at, position))
            taken += 1
            if taken > MOST_TAKEN:
                raise UnboundedError(f"it takes too long on a name of {len(text)} characters")
            if at == done:
                if not full or position == len(text):
                    index = text[first:last] if last != _NONE else None
                    return Match(position, index), taken
                continue
            step = self.steps[at]
            if isinstance(step, _Char):
                if position < len(text) and step.accepts.match(text[position]):
                    todo.append((at + 1, position + 1, first, last))
            elif isinstance(step, _Either):
                todo += [(to, position, first, last) for to in reversed(step.steps)]
            elif isinstance(step, _Place):
                if step.holds.match(text, position):
                    todo.append((at + 1, position, first, last))
            elif isinstance(step, _Mark):
                marks = (position, _NONE) if step.side == 0 else (first, position)
                todo.append((at + 1, position, *marks))
            else:
                found = None
                if position >= step.back:
                    found, more = step.program.match(text, position - step.back)
                    taken += more
                if (found is not None) == step.wanted:
                    todo.append((at + 1, position, first, last))
        return None, taken


def match(regex: str, text: str, *, full: bool = False) -> Match | None:
    """Return the match of an expression at the beginning of a text (`full`: of all of it), if any.

    Raises re.error, OverflowError or RecursionError for what is no regular expression, and
    UnboundedError for what cannot be matched in bounded time.
    """
    return matched(regex, text, full)[0]


@functools.lru_cache(maxsize=1 << 16)
def matched(regex: str, text: str, full: bool) -> tuple[Match | None, int]:
    """Return what `match` returns and the number of steps it took."""
    return compiled(regex).match(text, full=full)


@functools.lru_cache(maxsize=1 << 12)
def compiled(regex: str) -> Program:
    """Return the program of an expression; raises what `match` raises."""
    if len(regex) > LONGEST:
        raise UnboundedError(f"it is longer than {LONGEST} characters")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        re.compile(regex)  # checks what the parser alone does not, such as the width of (?<=…)
        tree = _parser.parse(regex)
    compiler = _Compiler(tree.state.groupdict.get(_INDEX), _Room(MOST_STEPS))
    return compiler.program(tree, tree.state.flags)


@dataclass
class _Room:
    """How many more steps an expression may have, with those of the programs within it."""

    left: int


class _Compiler:
    """Turns the tree of Python's own parser into steps."""

    def __init__(self, index: int | None, room: _Room) -> None:
        self._index = index
        self._room = room
        self._steps: list[_Step] = []

    def program(self, tree: Any, flags: int) -> Program:
        self._sequence(tree, flags)
        return Program(tuple(self._steps))

    def _add(self, step: _Step) -> int:
        self._room.left -= 1
        if self._room.left < 0:
            raise UnboundedError("it is too long, its repeats counted out")
        self._steps.append(step)
        return len(self._steps) - 1

    def _sequence(self, nodes: Any, flags: int) -> None:
        for node in nodes:
            self._node(node, flags)

    def _node(self, node: _Node, flags: int) -> None:
        kind, value = node
        if kind in (_c.LITERAL, _c.NOT_LITERAL, _c.ANY, _c.IN):
            self._add(_Char(_pattern(_char_text(kind, value), flags)))
        elif kind is _c.AT:
            self._add(_Place(_pattern(_PLACES[value], flags)))
        elif kind is _c.SUBPATTERN:
            group, added, removed, inner = value
            self._group(group, inner, (flags | added) & ~removed)
        elif kind is _c.BRANCH:
            self._branch(value[1], flags)
        elif kind in (_c.MAX_REPEAT, _c.MIN_REPEAT):
            self._repeat(value, flags, lazy=kind is _c.MIN_REPEAT)
        elif kind in (_c.ASSERT, _c.ASSERT_NOT):
            self._look(value, flags, wanted=kind is _c.ASSERT)
        elif kind is _FAILURE:  # (?!)
            self._add(_Either(()))
        else:
            raise UnboundedError("it refers to a group, or repeats possessively")

    def _group(self, group: int | None, inner: Any, flags: int) -> None:
        marked = group is not None and group == self._index
        if marked:
            self._add(_Mark(0))
        self._sequence(inner, flags)
        if marked:
            self._add(_Mark(1))

    def _branch(self, branches: Any, flags: int) -> None:
        fork = self._add(_Either(()))
        starts, ends = [], []
        for branch in branches:
            starts.append(len(self._steps))
            self._sequence(branch, flags)
            ends.append(self._add(_Either(())))
        self._steps[fork] = _Either(tuple(starts))
        for end in ends:
            self._steps[end] = _Either((len(self._steps),))

    def _repeat(self, value: Any, flags: int, *, lazy: bool) -> None:
        least, most, inner = value
        if self._index is not None and inner.getwidth()[0] == 0:
            raise UnboundedError("it repeats what may be empty")  # `re` does so in a way of its own
        for _ in range(least):
            before = len(self._steps)
            self._sequence(inner, flags)
            if len(self._steps) == before:
                break
        if most is _c.MAXREPEAT:
            loop = self._add(_Either(()))
            self._sequence(inner, flags)
            self._add(_Either((loop,)))
            self._steps[loop] = _choice(loop + 1, len(self._steps), lazy=lazy)
            return
        forks = []
        for _ in range(int(most) - least):
            forks.append(self._add(_Either(())))
            self._sequence(inner, flags)
        for fork in forks:
            self._steps[fork] = _choice(fork + 1, len(self._steps), lazy=lazy)

    def _look(self, value: Any, flags: int, *, wanted: bool) -> None:
        direction, inner = value
        program = _Compiler(None, self._room).program(inner, flags)
        back = inner.getwidth()[1] if direction < 0 else 0
        self._add(_Look(program, back, wanted))


def _choice(go_on: int, leave: int, *, lazy: bool) -> _Either:
    return _Either((leave, go_on) if lazy else (go_on, leave))


_PLACES = {
    _c.AT_BEGINNING: "^",
    _c.AT_BEGINNING_STRING: r"\A",
    _c.AT_BOUNDARY: r"\b",
    _c.AT_NON_BOUNDARY: r"\B",
    _c.AT_END: "$",
    _c.AT_END_STRING: r"\Z",
}
_CLASSES = {
    _c.CATEGORY_DIGIT: r"\d",
    _c.CATEGORY_NOT_DIGIT: r"\D",
    _c.CATEGORY_SPACE: r"\s",
    _c.CATEGORY_NOT_SPACE: r"\S",
    _c.CATEGORY_WORD: r"\w",
    _c.CATEGORY_NOT_WORD: r"\W",
}
_FAILURE = _c.FAILURE
# re.UNICODE cannot be passed beside re.ASCII; re.VERBOSE would drop a space.
_KEPT_FLAGS = re.ASCII | re.IGNORECASE | re.MULTILINE | re.DOTALL


def _pattern(text: str, flags: int) -> re.Pattern[str]:
    return _compiled_part(text, flags & _KEPT_FLAGS)


@functools.lru_cache(maxsize=1 << 12)
def _compiled_part(text: str, flags: int) -> re.Pattern[str]:
    """Return `re`'s own pattern of one character or place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return re.compile(text, flags)


def _char_text(kind: Any, value: Any) -> str:
    """Return the expression of one character, as it could have been written."""
    if kind is _c.ANY:
        return "."
    if kind is _c.LITERAL:
        return f"[{_escaped(value)}]"
    if kind is _c.NOT_LITERAL:
        return f"[^{_escaped(value)}]"
    return f"[{''.join(_item_text(*item) for item in value)}]"


def _item_text(kind: Any, value: Any) -> str:
    """Return one item of a set of characters."""
    if kind is _c.NEGATE:
        return "^"
    if kind is _c.RANGE:
        return f"{_escaped(value[0])}-{_escaped(value[1])}"
    return _CLASSES[value] if kind is _c.CATEGORY else _escaped(value)


def _escaped(code: int) -> str:
    return f"\\U{code:08x}"
