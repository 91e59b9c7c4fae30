"""What is in an adapter, in numbers: its config in short, its layers, its blocks, its history.

It reads one module at a time, so that memory does not grow with the adapter. ΔW is never built:
norms come from the factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from lorakit.adapters.adapter import Adapter, LoraModule, product_norm
from lorakit.adapters.config import alpha_of
from lorakit.adapters.foreign import printable
from lorakit.adapters.tensors import FloatArray


@dataclass(frozen=True)
class Measure:
    """Sums over A/B pairs: parameters, exact zeros among them, the square of the norm of ΔW."""

    modules: int = 0
    parameters: int = 0
    zeros: int = 0
    square: float = 0.0

    def __add__(self, other: Measure) -> Measure:
        return Measure(
            self.modules + other.modules,
            self.parameters + other.parameters,
            self.zeros + other.zeros,
            self.square + other.square,
        )

    def as_fields(self) -> dict[str, Any]:
        """Return the fields of a record: `norm` is that of all ΔW together, `zeros` a share."""
        return {
            "modules": self.modules,
            "parameters": self.parameters,
            "norm": math.sqrt(self.square),
            "zeros": self.zeros / self.parameters if self.parameters else None,
        }


def measure(a: FloatArray, b: FloatArray, scale: float) -> Measure:
    """Measure one pair A (r × d_in), B (d_out × r)."""
    parameters = a.size + b.size
    zeros = parameters - int(np.count_nonzero(a)) - int(np.count_nonzero(b))
    return Measure(1, parameters, zeros, (scale * product_norm(a, b)) ** 2)


def inspect_adapter(adapter: Adapter) -> dict[str, Any]:
    """Return what is in an adapter as one record, fit for JSON.

    `zeros` is the share of parameters that are exactly zero and `norm` the Frobenius norm of ΔW, of
    the whole, of each layer (`layer` null: modules outside the layers) and of each block. `rank`,
    `alpha`, `scale` and `dtype` are lists of the values that occur.
    """
    modules = adapter.modules()
    blocks: list[Mapping[str, Any]] = [block or {} for block in adapter.header.get("blocks") or []]
    by_layer: dict[int | None, Measure] = {}
    by_block = [Measure() for _ in blocks]
    for module in modules:
        a, b = module.a, module.b
        layer = by_layer.get(module.layer, Measure())
        by_layer[module.layer] = layer + measure(a, b, module.scale)
        for index, block in enumerate(blocks):
            by_block[index] += _measure_block(block, module, a, b)
    whole = sum(by_layer.values(), Measure())
    return {
        "adapter": adapter.name,
        "sha256": adapter.sha256,
        **_summary(adapter, modules),
        **whole.as_fields(),
        "layers": [{"layer": layer, **found.as_fields()} for layer, found in by_layer.items()],
        "blocks": [
            {**_block_summary(block), **found.as_fields()}
            for block, found in zip(blocks, by_block, strict=True)
        ],
        "history": adapter.header.get("history") or [],
    }


def _measure_block(
    block: Mapping[str, Any], module: LoraModule, a: FloatArray, b: FloatArray
) -> Measure:
    part = (block.get("modules") or {}).get(module.name)
    if not part:
        return Measure()
    first = part.get("offset") or 0
    span = slice(first, first + (part.get("rank") or 0))
    return measure(a[span], b[:, span], module.scale)


def _summary(adapter: Adapter, modules: Iterable[LoraModule]) -> dict[str, Any]:
    config, header = adapter.config, adapter.header
    base = header.get("base") or {}
    return {
        "base": base.get("name") or config.get("base_model_name_or_path"),
        "fingerprint": base.get("fingerprint"),
        "chat": header.get("chat"),
        "rank": sorted({module.rank for module in modules}),
        "alpha": sorted({alpha_of(config, module.name) for module in modules}),
        "scale": sorted({module.scale for module in modules}),
        "use_rslora": bool(config.get("use_rslora")),
        "target_modules": sorted({module.name.rsplit(".", 1)[-1] for module in modules}),
        "dtype": sorted({tensor.dtype for tensor in adapter.tensors.values()}),
    }


def _block_summary(block: Mapping[str, Any]) -> dict[str, Any]:
    parts = [part or {} for part in (block.get("modules") or {}).values()]
    return {
        "name": block.get("name"),
        "sha256": block.get("sha256"),
        "rank": sorted({part["rank"] for part in parts if part.get("rank") is not None}),
        "scale": sorted({part["scale"] for part in parts if part.get("scale") is not None}),
    }


def write_table(record: Mapping[str, Any], stream: IO[str]) -> None:
    """Write a record of inspect_adapter for people: the config, the layers, blocks and history."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=stream, width=None if stream.isatty() else 1000)
    for name in _SHOWN:
        if record[name] not in (None, []):
            console.print(Text(f"{name:<15} {_shown(name, record[name])}"), soft_wrap=True)
    for title in ("layers", "blocks"):
        if record[title]:
            console.print()
            console.print(_table(title, record[title]))
    for number, step in enumerate(record["history"], 1):
        console.print()
        for line in _history_lines(number, step or {}):
            console.print(Text(line), soft_wrap=True)


_SHOWN = (
    *("adapter", "sha256", "base", "fingerprint", "chat", "target_modules", "rank", "alpha"),
    *("scale", "use_rslora", "dtype", "modules", "parameters", "norm", "zeros"),
)
_COLUMNS = {
    "layers": ("layer", "modules", "parameters", "norm", "zeros"),
    "blocks": ("name", "rank", "scale", "modules", "parameters", "norm", "zeros", "sha256"),
}


def _table(title: str, rows: Iterable[Mapping[str, Any]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in _COLUMNS[title]:
        left = column in ("name", "sha256")
        heading = "block" if column == "name" else column
        table.add_column(heading, justify="left" if left else "right", no_wrap=not left)
    for row in rows:
        table.add_row(*(Text(_shown(column, row[column])) for column in _COLUMNS[title]))
    return table


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, list):
        return ", ".join(_shown(name, item) for item in value)
    if name == "zeros":
        return f"{value:.2%}"
    if name in ("norm", "alpha", "scale"):
        return f"{value:.6g}"
    return f"{value:,}" if name == "parameters" else printable(str(value))


def _history_lines(number: int, step: Mapping[str, Any]) -> Iterable[str]:
    version = (step.get("versions") or {}).get("lorakit")
    yield printable(f"{number}. {step.get('command')} (lorakit {version})")
    for name, value in step.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key}={item}" for key, item in value.items())
        if name != "command":
            yield printable(f"   {name}: {value}")
