"""Types of options that are texts: names, layers, metrics, addresses.

Each is a click ParamType; a value that it cannot read is a usage error.
"""

from __future__ import annotations

import json
import re

import click

from lorakit.commands._types import ParamType
from lorakit.errors import LorakitError

_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}
_ESCAPE = re.compile(r"\\([nt\\])")
_LAYER_RANGE = re.compile(r"([0-9]{1,4})(?:-([0-9]{1,4}))?")


class Names(ParamType):
    """A list of names, separated by commas."""

    name = "names"

    def convert(
        self, value: str | tuple[str, ...], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(name.strip() for name in value.split(","))
        if not all(names):
            self.fail(f"{value!r} has an empty name", param, ctx)
        return names


class NamedValue(ParamType):
    """A name and its value, `enable_thinking=false`: a number, true, false or null, else a text."""

    name = "named value"

    def convert(
        self,
        value: str | tuple[str, object],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> tuple[str, object]:
        if isinstance(value, tuple):
            return value
        name, separator, text = value.partition("=")
        if not separator or not name.isidentifier():
            self.fail(f"{value!r} is not of the form NAME=VALUE", param, ctx)
        try:
            parsed: object = json.loads(text)
        except (ValueError, RecursionError):
            parsed = text
        return name, text if isinstance(parsed, dict | list) else parsed


class StopText(ParamType):
    r"""A text that is not empty; `\n` and `\t` are a line end and a tab, `\\` is `\`."""

    name = "text"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not value:
            self.fail("an empty text would stop everything", param, ctx)
        return _ESCAPE.sub(lambda match: _ESCAPES[match[1]], value)


class Layers(ParamType):
    """A set of layers: numbers and ranges, separated by commas (`0-19,24`)."""

    name = "layers"

    def convert(
        self, value: str | tuple[int, ...], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        layers: set[int] = set()
        for part in value.split(","):
            match = _LAYER_RANGE.fullmatch(part.strip())
            if match is None:
                self.fail(f"{part!r} is not a layer or a range of layers, such as 0-19", param, ctx)
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first:
                self.fail(f"{part!r} runs backwards", param, ctx)
            layers.update(range(first, last + 1))
        return tuple(sorted(layers))


class Boundaries(Layers):
    """A set of boundaries, written like layers (`8-31`), none of them 0."""

    name = "boundaries"

    def convert(
        self, value: str | tuple[int, ...], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        boundaries = super().convert(value, param, ctx)
        if 0 in boundaries:
            self.fail("boundaries begin at 1; 0, the base model, is the baseline", param, ctx)
        return boundaries


class MetricName(ParamType):
    """The name of a metric that can decide from predictions and references, or one of `others`."""

    name = "metric"

    def __init__(self, *others: str) -> None:
        self._others = others

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        names = self.names()
        if value not in names:
            self.fail(f"{value!r} is not one of {', '.join(names)}.", param, ctx)
        return str(value)

    def names(self) -> list[str]:
        """Return all names that the option takes."""
        from lorakit.scoring.metrics import METRICS

        texts = (name for name, metric in METRICS.items() if metric.decides)
        return [*self._others, *texts]


class ServerUrl(ParamType):
    """An http(s) URL, without a slash at its end."""

    name = "url"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from lorakit.judging.opening import check_url

        try:
            return check_url(value)
        except LorakitError as error:
            self.fail(str(error), param, ctx)
