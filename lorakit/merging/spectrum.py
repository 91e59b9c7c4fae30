"""Singular values of an adapter's ΔW: how low a rank would do, and what another rank has cost.

`inspect --spectrum` prints and draws them; a merge by --keep-energy says its ranks and errors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from statistics import fmean
from typing import IO, NamedTuple, TypedDict

from lorakit.adapters.adapter import Adapter, LoraModule
from lorakit.foreign_text import printable
from lorakit.merging.low_rank import Matrix, energy_rank, product_svd
from lorakit.merging.task_vectors import Part, stack_parts

ENERGIES = ("0.5", "0.9", "0.95", "0.99", "1")  # shares of ‖ΔW‖² whose ranks are shown


class SpectrumRow(TypedDict):
    """A module's ΔW: its rank as stored, its singular values, largest first, and ranks by energy.

    `ranks` maps a share of ‖ΔW‖² to the lowest rank that keeps it; that of 1 is the rank that
    float32 can tell from a lower one.
    """

    module: str
    layer: int | None
    rank: int
    singular_values: list[float]
    ranks: dict[str, int]


class LayerFit(NamedTuple):
    """The ranks of a layer's modules, and the error ‖ΔW - fit‖ / ‖ΔW‖ over all of them."""

    layer: int | None
    lowest: int
    highest: int
    error: float


def spectrum(adapter: Adapter) -> Iterator[SpectrumRow]:
    """Yield a row for each module, by layer; one module's factors are in memory at a time."""
    for module in adapter.modules():
        yield _row(module)


def _row(module: LoraModule) -> SpectrumRow:
    values = abs(module.scale) * product_svd(module.a, module.b).values
    return {
        "module": module.name,
        "layer": module.layer,
        "rank": module.rank,
        "singular_values": [float(value) for value in values],
        "ranks": {energy: _rank_at(values, energy) for energy in ENERGIES},
    }


def _rank_at(values: Matrix, energy: str) -> int:
    """Return the lowest rank that keeps a share of the energy, 0 where all values are 0."""
    return energy_rank(values, Decimal(energy)) if values[0] else 0


def rank_rows(rows: Iterable[SpectrumRow]) -> list[dict[str, object]]:
    """Return the mean rank of each layer's modules at each share of ENERGIES, for a figure.

    Modules outside the layers are left out.
    """
    by_layer: dict[int, list[SpectrumRow]] = {}
    for row in rows:
        if row["layer"] is not None:
            by_layer.setdefault(row["layer"], []).append(row)
    return [
        {"layer": layer, "energy": energy, "rank": fmean(row["ranks"][energy] for row in modules)}
        for energy in ENERGIES
        for layer, modules in by_layer.items()
    ]


def write_ranks(rows: Iterable[SpectrumRow], stream: IO[str]) -> None:
    """Write a table of the modules: their rank, the largest singular value, the ranks by energy."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("module", "rank", "largest", *ENERGIES):
        table.add_column(column, justify="left" if column == "module" else "right", no_wrap=True)
    for row in rows:
        largest = f"{row['singular_values'][0]:.4g}"
        ranks = (str(row["ranks"][energy]) for energy in ENERGIES)
        cells = (printable(row["module"]), str(row["rank"]), largest, *ranks)
        table.add_row(*map(Text, cells))
    Console(file=stream, width=None if stream.isatty() else 1000).print(table)


def layer_fits(merged: Adapter, parts: Mapping[str, Sequence[Part]]) -> list[LayerFit]:
    """Return how well a merge of the nearest matrices fits the weighted sum of the parts, by layer.

    What the best fit of rank r leaves out are the singular values from the r-th on (Eckart and
    Young, 1936).
    """
    by_layer: dict[int | None, list[tuple[int, float, float]]] = {}
    for module in merged.modules():
        squares = product_svd(*stack_parts(parts[module.name])).values ** 2
        lost = float(squares[module.rank :].sum())
        by_layer.setdefault(module.layer, []).append((module.rank, lost, float(squares.sum())))
    return [layer_fit(layer, sizes) for layer, sizes in by_layer.items()]


def layer_fit(layer: int | None, sizes: Sequence[tuple[int, float, float]]) -> LayerFit:
    """Return a layer's fit from each module's rank, and squares of what is left out and of all."""
    ranks, lost, whole = zip(*sizes, strict=True)
    error = math.sqrt(sum(lost) / sum(whole)) if sum(whole) else 0.0
    return LayerFit(layer, min(ranks), max(ranks), error)


def fit_lines(fits: Iterable[LayerFit]) -> Iterator[str]:
    """Yield a line for each layer: `layer 3: rank 2 to 5, error 0.21`."""
    for fit in fits:
        where = "outside the layers" if fit.layer is None else f"layer {fit.layer}"
        ranks = str(fit.lowest) if fit.lowest == fit.highest else f"{fit.lowest} to {fit.highest}"
        yield f"{where}: rank {ranks}, error {fit.error:.2g}"
