"""Types of options that are numbers, or lists of them, besides click's own; texts: _text_types.py.

Each is a click ParamType; a value that it cannot read is a usage error.
"""

from __future__ import annotations

import math
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any, Literal

import click

from lorakit.errors import LorakitError
from lorakit.float32 import LARGEST, TINIEST, fits
from lorakit.settings import PruningValues

if TYPE_CHECKING:
    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType  # not generic before click 8.4

MOST = 2**63 - 1  # what torch and numpy hold in an integer
RANK = 2**16  # the highest of an adapter


class Whole(click.IntRange):
    """A whole number within click's range that is no larger than `most`."""

    def __init__(self, min: int, *, most: int = MOST) -> None:
        super().__init__(min=min)
        self._most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if number > self._most:
            self.fail(f"{value} is above {self._most}, the largest number allowed", param, ctx)
        return number


class Real(click.FloatRange):
    """A number within click's range that float32 holds; `inf` only where `infinite`.

    NaN is refused, and so is what is not zero but smaller than `least`.
    """

    def __init__(
        self,
        *,
        min: float = 0,
        max: float | None = None,
        min_open: bool = False,
        max_open: bool = False,
        least: float = TINIEST,
        most: float = LARGEST,
        infinite: bool = False,
    ) -> None:
        super().__init__(min=min, max=max, min_open=min_open, max_open=max_open)
        self._least, self._most, self._infinite = least, most, infinite

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if number == math.inf and self._infinite:
            return number
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        if abs(number) > self._most:
            self.fail(f"{value} is above {self._most:.4g}, the largest number allowed", param, ctx)
        if 0 < abs(number) < self._least:
            self.fail(f"{value} is nearer to 0 than {self._least:.4g}; give 0 or more", param, ctx)
        return number


class Amounts(ParamType):
    """Ratios or thresholds, one or a list, each the exact decimal as written; or `auto`."""

    def __init__(self, name: str, *, below: int | None = None) -> None:
        self.name = name
        self._below = below

    def convert(
        self,
        value: str | tuple[Decimal, ...],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> PruningValues:
        if isinstance(value, tuple):
            return value
        if value == "auto":
            return "auto"
        return tuple(self._amount(part.strip(), param, ctx) for part in value.split(","))

    def _amount(
        self, text: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> Decimal:
        amount = _decimal(text)
        if not amount.is_finite():
            self.fail(f"{text!r} is not a number", param, ctx)
        if amount > 0 and not fits(amount):
            self.fail(f"{text} is not a number that float32 holds", param, ctx)
        if amount < 0 or (self._below is not None and amount >= self._below):
            top = "" if self._below is None else f" < {self._below}"
            self.fail(f"{text} is not in 0 ≤ {self.name}{top}", param, ctx)
        return amount


class StepsOrEpoch(ParamType):
    """How often something happens: every so many optimiser steps, or `epoch`."""

    name = "steps"

    def convert(
        self, value: str | int, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | Literal["epoch"]:
        if value == "epoch":
            return "epoch"
        try:
            steps = int(value)
        except ValueError:
            steps = 0
        if steps < 1:
            self.fail(f"{value!r} is neither a number of steps from 1 up nor 'epoch'", param, ctx)
        return steps


def _decimal(text: str) -> Decimal:
    """Return the decimal that a text writes out, NaN where it is not one."""
    try:
        return Decimal(text)
    except InvalidOperation:
        return Decimal("NaN")


class Density(ParamType):
    """A share above 0 and up to 1, the exact decimal as written."""

    def __init__(self, name: str = "density") -> None:
        self.name = name

    def convert(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> Decimal:
        density = _decimal(value)
        if density.is_nan():
            self.fail(f"{value!r} is not a number", param, ctx)
        if not 0 < density <= 1:
            self.fail(f"{value} is not in 0 < {self.name} ≤ 1", param, ctx)
        if not fits(density):
            self.fail(f"{value} is not a number that float32 holds", param, ctx)
        return density


class Numbers(ParamType):
    """A list of finite numbers, separated by commas (`0.5,-0.3`)."""

    name = "numbers"

    def convert(
        self,
        value: str | tuple[float, ...],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(self._number(part.strip(), param, ctx) for part in value.split(","))

    def _number(self, text: str, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            self.fail(f"{text!r} is not a number", param, ctx)
        if not fits(number):
            self.fail(f"{text} is not a number that float32 holds", param, ctx)
        return number


class Weights(Numbers):
    """A list of weights, one for each adapter, or weights by layer of one (`xs=0-9:1,10-:0.5`)."""

    name = "weights"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:  # numbers, or a name and its runs
        if isinstance(value, tuple) or "=" not in value:
            return super().convert(value, param, ctx)
        from lorakit.merging.layer_weights import parse_runs

        name, _, runs = value.rpartition("=")
        try:
            return name, parse_runs(runs)
        except LorakitError as error:
            self.fail(str(error), param, ctx)


class Factors(Numbers):
    """A list of factors between 0 and 1, sorted, each once."""

    name = "factors"

    def convert(
        self,
        value: str | tuple[float, ...],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> tuple[float, ...]:
        return tuple(sorted(set(super().convert(value, param, ctx))))

    def _number(self, text: str, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super()._number(text, param, ctx)
        if not 0 <= number <= 1:
            self.fail(f"{text} is not in 0 ≤ factor ≤ 1", param, ctx)
        return number + 0.0  # not -0.0
