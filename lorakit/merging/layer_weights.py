"""Weights of merges without data that differ by layer: `xs=0-9:1,10-29:0.5`, or a file of them.

A run gives the layers from `first` to `last` one weight, or weights on a line between two, as
mergekit's gradients and kohya's block weights do. Layers in no run, and modules outside the layers,
have weight 1. What a weight multiplies is said in task_vectors.py.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence

from lorakit.errors import LorakitError
from lorakit.float32 import fits
from lorakit.foreign_text import quote
from lorakit.records.jsonl import read_objects
from lorakit.settings import LayerRun

Runs = tuple[LayerRun, ...]  # of one adapter, none overlapping another

_RUN = re.compile(r"([0-9]{1,4})(?:(-)([0-9]{1,4})?)?:([^:]+)")


def parse_runs(text: str) -> Runs:
    """Return the runs in `0-9:1,10-:0.5` or, with weights on a line, `0-29:0..1`, by layer.

    `K` is one layer, `K-M` all from K to M, `K-` all from K up. Raises LorakitError for what is
    none of these, runs backwards, or names a layer twice.
    """
    return _sorted(tuple(_run(part.strip()) for part in text.split(",")))


def _run(text: str) -> LayerRun:
    match = _RUN.fullmatch(text)
    if match is None:
        raise LorakitError(f"{quote(text)} is no layers and weight; write them as 0-9:0.5")
    first, last = int(match[1]), _last(match)
    weights = [_weight(part) for part in match[4].split("..", 1)]
    if last is not None and last < first:
        raise LorakitError(f"{quote(text)} runs backwards; write the lower layer first")
    if len(weights) == 2 and (last is None or last == first):
        raise LorakitError(f"{quote(text)} has two weights; give the layers they run between: 0-9")
    return LayerRun(first, last, weights[0], weights[-1])


def _last(match: re.Match[str]) -> int | None:
    """Return the last layer of a run: the one after the dash, none after a bare dash."""
    if match[2] is None:
        return int(match[1])
    return None if match[3] is None else int(match[3])


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise LorakitError(f"{quote(text)} is not a number; write a weight, such as 0.5")
    if not fits(weight):
        raise LorakitError(f"{text} is not a number that float32 holds; write another weight")
    return weight


def _sorted(runs: Runs) -> Runs:
    """Return the runs by their first layer; LorakitError where two have a layer in common."""
    ordered = tuple(sorted(runs, key=lambda run: run.first))
    for lower, upper in itertools.pairwise(ordered):
        if lower.last is None or upper.first <= lower.last:
            raise LorakitError(f"layer {upper.first} has two weights; give it one")
    return ordered


def runs_text(runs: Runs) -> str:
    """Return runs as `parse_runs` reads them."""
    return ",".join(f"{_layers_text(run)}:{_weights_text(run)}" for run in runs)


def _layers_text(run: LayerRun) -> str:
    if run.last is None:
        return f"{run.first}-"
    return str(run.first) if run.last == run.first else f"{run.first}-{run.last}"


def _weights_text(run: LayerRun) -> str:
    return f"{run.start!r}" if run.start == run.end else f"{run.start!r}..{run.end!r}"


def weight_at(runs: Runs, layer: int | None) -> float:
    """Return the weight of a layer: that of its run, 1 where it is in none or `layer` is None."""
    for run in runs:
        if layer is not None and run.first <= layer and (run.last is None or layer <= run.last):
            if run.last is None or run.start == run.end:
                return run.start
            share = (layer - run.first) / (run.last - run.first)
            return run.start * (1 - share) + run.end * share
    return 1.0


def read_layer_weights(path: str) -> dict[str, Runs]:
    """Return the runs by adapter of a file, whose lines are as `{"adapter", "layers", "weight"}`.

    `layers` is written as in `parse_runs` or is a number; `weight` is a number, or two in a list
    for weights on a line. Raises LorakitError naming the line of what is not so.
    """
    runs: dict[str, Runs] = {}
    for record in read_objects(path):
        fields = record.fields
        try:
            name, run = _name_and_run(fields)
            runs[name] = _sorted((*runs.get(name, ()), run))
        except LorakitError as error:
            raise LorakitError(f"{record.where}: {error}") from None
    return runs


def _name_and_run(fields: Mapping[str, object]) -> tuple[str, LayerRun]:
    name, layers, weight = (fields.get(key) for key in ("adapter", "layers", "weight"))
    if not isinstance(name, str):
        raise LorakitError("no text `adapter`; name the adapter that the weight is for")
    if isinstance(layers, bool) or not isinstance(layers, str | int):
        raise LorakitError('no `layers`; give a layer or a range, such as "0-9"')
    weights = weight if isinstance(weight, list) else [weight]
    if len(weights) > 2 or not weights or not all(_is_number(value) for value in weights):
        raise LorakitError("`weight` is neither a number nor a list of two; give one")
    return name, _run(f"{layers}:{'..'.join(map(repr, weights))}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def runs_by_adapter(layer_weights: Mapping[str, Runs], names: Sequence[str]) -> list[Runs]:
    """Return the runs of each adapter in order, () for one that `layer_weights` does not name.

    Raises LorakitError for a name that no adapter has.
    """
    if unknown := [name for name in layer_weights if name not in names]:
        raise LorakitError(
            f"weights for {quote(unknown[0])}, but the adapters are {', '.join(names)}; name one"
        )
    return [layer_weights.get(name, ()) for name in names]
