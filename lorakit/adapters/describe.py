"""Describe an adapter for `inspect`: a summary of its config, its layers, blocks and history.

Modules are read one at a time, so that memory does not grow with the adapter. ΔW is never formed:
norms are computed from the factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, NotRequired, TypedDict

import numpy as np

from lorakit.adapters.adapter import Adapter, LoraModule, product_norm
from lorakit.adapters.base_model import base_name
from lorakit.adapters.blocks import BlockFields, pair_of, slices_of
from lorakit.adapters.config import alpha_of
from lorakit.adapters.history import HistoryEntry, base_fields, learned_weights, weight_line
from lorakit.adapters.names import last_part
from lorakit.adapters.tensors import FloatArray
from lorakit.foreign_text import printable

if TYPE_CHECKING:
    from rich.table import Table


class Measures(TypedDict):
    """`norm` is the Frobenius norm of ΔW, `zeros` the share of parameters that are exactly zero."""

    modules: int
    parameters: int
    norm: float
    zeros: float | None


class LayerRow(Measures):
    """The measures of one layer; None stands for the modules outside the layers."""

    layer: int | None


class BlockSummary(TypedDict):
    """What the header says about a block; `rank` and `scale` list the values that occur.

    `reset` is the share of parameters that stood at the value, other than zero, that pruning reset
    them to; it is there where the header has it.
    """

    name: str | None
    sha256: str | None
    rank: list[int]
    scale: list[float]
    reset: NotRequired[float]


class BlockRow(BlockSummary, Measures):
    """What the header says about a block, and its measures."""


class Summary(TypedDict):
    """What config and header say about an adapter; the lists hold the values that occur.

    `use_dora` and `whole`, the names of the base's weights that it replaces, are there where set.
    """

    base: str | None
    fingerprint: str | None
    chat: str | None
    rank: list[int]
    alpha: list[float]
    scale: list[float]
    use_rslora: bool
    target_modules: list[str]
    dtype: list[str]
    use_dora: NotRequired[bool]
    whole: NotRequired[list[str]]


class Description(Summary, Measures):
    """Everything that `inspect` says about an adapter."""

    adapter: str
    sha256: str
    layers: list[LayerRow]
    blocks: list[BlockRow]
    history: list[HistoryEntry]


@dataclass(frozen=True)
class Sums:
    """Sums over modules: parameters, how many are exactly zero, and the squared norms of ΔW."""

    modules: int = 0
    parameters: int = 0
    zeros: int = 0
    square: float = 0.0

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.modules + other.modules,
            self.parameters + other.parameters,
            self.zeros + other.zeros,
            self.square + other.square,
        )

    def measures(self) -> Measures:
        """Return the sums as measures; the norm is that of all ΔW together."""
        return {
            "modules": self.modules,
            "parameters": self.parameters,
            "norm": math.sqrt(self.square),
            "zeros": self.zeros / self.parameters if self.parameters else None,
        }


def measure(a: FloatArray, b: FloatArray, scale: float) -> Sums:
    """Return the sums for one module's A (r × d_in) and B (d_out × r)."""
    parameters = a.size + b.size
    zeros = parameters - int(np.count_nonzero(a)) - int(np.count_nonzero(b))
    return Sums(1, parameters, zeros, (scale * product_norm(a, b)) ** 2)


def inspect_adapter(adapter: Adapter) -> Description:
    """Return the description of an adapter, ready for JSON.

    Norms and zeros are given for the whole adapter, for each layer (modules outside the layers come
    last) and for each block.
    """
    modules = adapter.modules()
    blocks: list[BlockFields] = [block or {} for block in adapter.header.get("blocks") or []]
    slices = [slices_of(block) for block in blocks]
    by_layer: dict[int | None, Sums] = {}
    by_block = [Sums() for _ in blocks]
    for module in modules:
        a, b = module.a, module.b
        by_layer[module.layer] = by_layer.get(module.layer, Sums()) + measure(a, b, module.scale)
        for index, parts in enumerate(slices):
            if part := parts.get(module.name):
                by_block[index] += measure(*pair_of(part, a, b), module.scale)
    return {
        "adapter": adapter.name,
        "sha256": adapter.sha256,
        **_summary(adapter, modules),
        **sum(by_layer.values(), Sums()).measures(),
        "layers": [{"layer": layer, **sums.measures()} for layer, sums in by_layer.items()],
        "blocks": [
            {**_block_summary(block), **sums.measures()}
            for block, sums in zip(blocks, by_block, strict=True)
        ],
        "history": adapter.header.get("history") or [],
    }


def _summary(adapter: Adapter, modules: Sequence[LoraModule]) -> Summary:
    config, header = adapter.config, adapter.header
    summary: Summary = {
        "base": base_name(adapter),
        "fingerprint": base_fields(header).get("fingerprint"),
        "chat": header.get("chat"),
        "rank": sorted({module.rank for module in modules}),
        "alpha": sorted({alpha_of(config, module.name) for module in modules}),
        "scale": sorted({module.scale for module in modules}),
        "use_rslora": bool(config.get("use_rslora")),
        "target_modules": sorted({last_part(module.name) for module in modules}),
        "dtype": sorted({tensor.dtype for tensor in adapter.tensors.values()}),
    }
    if adapter.is_dora:
        summary["use_dora"] = True
    if adapter.whole:
        summary["whole"] = list(adapter.whole)
    return summary


def _block_summary(block: BlockFields) -> BlockSummary:
    parts = slices_of(block).values()
    summary: BlockSummary = {
        "name": block.get("name"),
        "sha256": block.get("sha256"),
        "rank": sorted({part["rank"] for part in parts if part.get("rank") is not None}),
        "scale": sorted({part["scale"] for part in parts if part.get("scale") is not None}),
    }
    if (reset := block.get("reset")) is not None:
        summary["reset"] = reset
    return summary


def write_table(description: Description, stream: IO[str]) -> None:
    """Write a description as text: the summary, then the layers, the blocks and the history."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=stream, width=None if stream.isatty() else 1000)
    fields: Mapping[str, object] = description
    for name in _SUMMARY_FIELDS:
        if fields.get(name) not in (None, []):
            console.print(Text(f"{name:<15} {_formatted(name, fields[name])}"), soft_wrap=True)
    for columns, rows in (
        (_LAYER_COLUMNS, description["layers"]),
        (_block_columns(description["blocks"]), description["blocks"]),
    ):
        if rows:
            console.print()
            console.print(_table(columns, rows))
    for number, entry in enumerate(description["history"], 1):
        console.print()
        for line in _history_lines(number, entry or {}):
            console.print(Text(line), soft_wrap=True)


_SUMMARY_FIELDS = (
    "adapter",
    "sha256",
    "base",
    "fingerprint",
    "chat",
    "target_modules",
    "rank",
    "alpha",
    "scale",
    "use_rslora",
    "use_dora",
    "whole",
    "dtype",
    "modules",
    "parameters",
    "norm",
    "zeros",
)
_MOST_SCALES = 4  # that are listed; of more (weights learned by module) the range is shown
_LAYER_COLUMNS = ("layer", "modules", "parameters", "norm", "zeros")
_BLOCK_COLUMNS = ("name", "rank", "scale", "modules", "parameters", "norm", "zeros", "sha256")


def _block_columns(rows: Iterable[BlockRow]) -> Sequence[str]:
    """Return the columns of the blocks' table: `reset` only where a block has it."""
    if not any("reset" in row for row in rows):
        return _BLOCK_COLUMNS
    *columns, sha256 = _BLOCK_COLUMNS
    return (*columns, "reset", sha256)


def _table(columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        left = column in ("name", "sha256")
        heading = "block" if column == "name" else column
        table.add_column(heading, justify="left" if left else "right", no_wrap=not left)
    for row in rows:
        table.add_row(*(Text(_formatted(column, row.get(column))) for column in columns))
    return table


def _formatted(name: str, value: object) -> str:
    """Return the value of the field `name` formatted for reading."""
    if value is None:
        return "–"
    if isinstance(value, list) and name == "scale" and len(value) > _MOST_SCALES:
        return f"{_formatted(name, value[0])} to {_formatted(name, value[-1])}"
    if isinstance(value, list):
        return ", ".join(_formatted(name, item) for item in value)
    if isinstance(value, int | float):
        if name in ("zeros", "reset"):
            return f"{value:.2%}"
        if name in ("norm", "alpha", "scale"):
            return f"{value:.6g}"
        if name == "parameters":
            return f"{value:,}"
    return printable(str(value))


def _history_lines(number: int, entry: HistoryEntry) -> Iterator[str]:
    version = (entry.get("versions") or {}).get("lorakit")
    yield printable(f"{number}. {entry.get('command')} (lorakit {version})")
    weights = learned_weights(entry)
    for name, value in entry.items():
        if name == "weights" and weights:
            value = weight_line(weights).removeprefix("weights: ")
        elif isinstance(value, dict):
            value = ", ".join(f"{key}={item}" for key, item in value.items())
        if name != "command":
            yield printable(f"   {name}: {value}")
