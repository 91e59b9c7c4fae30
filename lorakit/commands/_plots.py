"""Curves and maps in PNG or SVG files, each with its data beside it as JSON lines.

Figures are plain, labelled and readable without colour. No other file imports matplotlib, which
comes with the extra `plot`. This file draws records and does not know how they were measured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import LorakitError, check_packages
from lorakit.files import atomic_path, open_text_output
from lorakit.records.jsonl import write_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FORMATS = (".png", ".svg")
_MARKERS = "os^Dv<>P"
# One fewer than the markers, so that the two repeat together only after 56 lines.
_STYLES = ("-", "--", ":", "-.", (0, (8, 2)), (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
_LIGHTEST = 0.65
_LEGEND_WIDTH = 64  # characters, with 6 for the line and the gap
_BARS = " ▁▂▃▄▅▆▇█"
Rows = Sequence[Mapping[str, Any]]


def check_plot(output: str) -> None:
    """Raise LorakitError where `output` could not be drawn; call it before the work."""
    if Path(output).suffix.lower() not in _FORMATS:
        raise LorakitError(f"--plot {output} is neither .png nor .svg; choose one of these endings")
    check_packages("--plot", "matplotlib", extra="plot")


@contextlib.contextmanager
def _figure(output: str, rows: Rows, *, size: tuple[float, float] = (6.4, 4.0)) -> Iterator[Figure]:
    """Yield a new figure, size in inches; write it and the rows it shows when the block ends."""
    check_plot(output)
    import matplotlib
    from matplotlib.figure import Figure

    path = Path(output)
    with matplotlib.rc_context({"svg.hashsalt": "lorakit", "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        yield figure
        kind = path.suffix.lower().removeprefix(".")
        undated = {"svg": {"Date": None}, "png": {"Software": None}}[kind]
        with atomic_path(path) as side:
            figure.savefig(side, format=kind, metadata=undated)
    with open_text_output(f"{output}.jsonl") as stream:
        write_records(rows, stream)


def _line(
    axes: Axes,
    number: int,
    x: Sequence[float],
    y: Sequence[float],
    label: str | None,
    *,
    of: int = 1,
) -> None:
    """Draw line `number` of several, each with a grey, a marker and a dash of its own."""
    axes.plot(
        x,
        y,
        color=grey(number, of),
        marker=_MARKERS[number % len(_MARKERS)],
        linestyle=_STYLES[number % len(_STYLES)],
        markersize=4,
        label=label,
    )


def grey(number: int, of: int) -> str:
    """Return the grey of line `number` of several: from black, in even steps, to a light one."""
    return f"{_LIGHTEST * number / max(1, of - 1):.3f}"


def _legend(figure: Figure, axes: Axes) -> None:
    """Draw the legend of `axes` above all axes of the figure, where it covers no data."""
    handles, names = axes.get_legend_handles_labels()
    entries = dict(zip(names, handles, strict=True))  # several searches have a best each
    labels, handles = list(entries), list(entries.values())
    columns = max(1, min(len(labels), _LEGEND_WIDTH // (max(map(len, labels), default=0) + 6)))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns)


def plot_lines(rows: Rows, *, x: str, y: str, line: str, output: str) -> None:
    """Draw the field `y` over the field `x`, one line for each value of the field `line`."""
    with _figure(output, rows) as figure:
        axes = figure.subplots()
        names = list(dict.fromkeys(row[line] for row in rows))
        for number, name in enumerate(names):
            points = sorted((row[x], row[y]) for row in rows if row[line] == name)
            xs, ys = [at for at, _ in points], [value for _, value in points]
            _line(axes, number, xs, ys, str(name), of=len(names))
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        _legend(figure, axes)


def plot_search(rows: Rows, *, metric: str, output: str) -> None:
    """Draw the value of every ratio or threshold tried, the best one marked (Figure 4).

    Those that were stopped early are hollow, at the value they had reached. Bars are the rows'
    intervals, where they have some.
    """
    option = _pruning_option(rows)
    ordered = sorted(rows, key=lambda row: row[option])
    with _figure(output, ordered) as figure:
        axes = figure.subplots()
        _draw_search(axes, ordered, option, metric, label="run to the end")
        _label_search(figure, axes, option, metric)


def plot_searches(searches: Mapping[str, Rows], *, metric: str, output: str) -> None:
    """Draw several searches over each other, such as one for each seed, a line for each name.

    Their points stand a little beside each other, so that no bar hides another.
    """
    rows = [{"search": name, **row} for name, rows in searches.items() for row in rows]
    option = _pruning_option(rows)
    amounts = [row[option] for row in rows]
    step = (max(amounts) - min(amounts)) / 150
    with _figure(output, rows) as figure:
        axes = figure.subplots()
        for number, (name, tried) in enumerate(searches.items()):
            place = (number - (len(searches) - 1) / 2) * step
            ordered = sorted(tried, key=lambda row: row[option])
            shifted = [{**row, option: row[option] + place} for row in ordered]
            _draw_search(axes, shifted, option, metric, name, number=number, of=len(searches))
        _label_search(figure, axes, option, metric)


def _pruning_option(rows: Rows) -> str:
    """Return the field of the ratios or thresholds that were tried."""
    return next(name for name in rows[0] if name.startswith("prune_"))


def _draw_search(
    axes: Axes, rows: Rows, option: str, metric: str, label: str, *, number: int = 0, of: int = 1
) -> None:
    """Draw search `number` of several: a line of what ran to the end, the rest hollow, bars."""
    complete = [row for row in rows if not row["stopped"]]
    xs, ys = [row[option] for row in complete], [row[metric] for row in complete]
    _line(axes, number, xs, ys, label, of=of)
    stopped = [row for row in rows if row["stopped"]]
    if stopped:
        xs, ys = [row[option] for row in stopped], [row[metric] for row in stopped]
        marker = _MARKERS[number % len(_MARKERS)]
        axes.plot(xs, ys, marker, color="0.5", mfc="white", markersize=4, label="stopped early")
    for row in rows:
        if "interval" in row:
            axes.vlines(row[option], *row["interval"], color=grey(number, of), linewidth=0.7)
    best = _best(rows)
    _mark_best(axes, best[option], best[metric])


def _label_search(figure: Figure, axes: Axes, option: str, metric: str) -> None:
    axes.set_xlabel(option.replace("_", " "))
    axes.set_ylabel(f"{metric} on the validation set")
    _legend(figure, axes)


def plot_importance(rows: Rows, *, output: str) -> None:
    """Draw the mean importance of every A/B pair, layers across, blocks and projections down."""
    lines = list(dict.fromkeys((row["block"], row["projection"]) for row in rows))
    layers = sorted({row["layer"] for row in rows if row["layer"] is not None})
    cells = {(row["block"], row["projection"], row["layer"]): row["importance"] for row in rows}
    table = [[cells.get((*line, layer), float("nan")) for layer in layers] for line in lines]
    size = (2.5 + 0.28 * len(layers), 1.4 + 0.3 * len(lines))
    with _figure(output, rows, size=size) as figure:
        axes = figure.subplots()
        image = axes.imshow(table, cmap="Greys", aspect="auto", interpolation="none")
        axes.grid(False)
        axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
        axes.set_yticks(range(len(lines)), [f"{block} {projection}" for block, projection in lines])
        axes.set_xlabel("layer")
        figure.colorbar(image, label="mean importance")


def plot_boundaries(rows: Rows, *, output: str) -> None:
    """Draw the score of every boundary, the best marked, the base model dashed (Figure 4).

    There is a line for each factor. A bar is one standard error of the difference from the highest
    score, where the records have it.
    """
    with _figure(output, rows) as figure:
        axes = figure.subplots()
        factors = list(dict.fromkeys(row.get("factor") for row in rows))
        for number, factor in enumerate(factors):
            own = [row for row in rows if row.get("factor") == factor]
            xs, ys = [row["boundary"] for row in own], [row["score"] for row in own]
            label = None if factor is None else f"factor {factor:g}"
            _line(axes, number, xs, ys, label, of=len(factors))
            if "standard_error" in rows[0]:
                errors = [row["standard_error"] for row in own]
                color = grey(number, len(factors))
                axes.errorbar(xs, ys, errors, fmt="none", ecolor=color, elinewidth=0.8, capsize=2)
        axes.axhline(rows[0]["baseline"], color="0.5", linestyle="--", label="base model")
        best = _best(rows)
        _mark_best(axes, best["boundary"], best["score"])
        axes.set_xlabel("boundary (layers that keep their LoRA)")
        axes.set_ylabel(f"{rows[0]['metric']} on the sample")
        _legend(figure, axes)


def _mark_best(axes: Axes, x: float, y: float) -> None:
    """Draw a star on the best point, above the lines."""
    axes.plot(x, y, "*", color="black", markersize=14, label="best", zorder=3)


def _best(rows: Rows) -> Mapping[str, Any]:
    """Return the row that is marked best; there is exactly one."""
    return next(row for row in rows if row["best"])


def plot_probabilities(rows: Rows, *, output: str) -> None:
    """Draw the gold token's probability by layer, a line a position, and their mean (Figure 1).

    With curves to compare, a column of panels for each position: the gold token's and the largest
    probability (Figure 2) of every adapter, and how far the gold token's differs from the whole
    adapter's (Figure 5).
    """
    if "compared" in rows[0]:
        _plot_compared(rows, output)
        return
    with _figure(output, rows) as figure:
        axes = figure.subplots()
        layers = [row["boundary"] for row in rows]
        tokens = len(rows[0]["probabilities"])
        for token in range(tokens):
            values = [row["probabilities"][token] for row in rows]
            _line(axes, token + 1, layers, values, f"token {token + 1}", of=tokens + 1)
        _line(axes, 0, layers, [row["score"] for row in rows], "mean")
        best = _best(rows)
        _mark_best(axes, best["boundary"], best["score"])
        axes.set_xlabel("layers")
        axes.set_ylabel("probability of the gold token")
        _legend(figure, axes)


def _plot_compared(rows: Rows, output: str) -> None:
    """Draw the panels of adapters stripped at several boundaries, positions across."""
    panels = {
        "probabilities": "probability of the gold token",
        "maximum_probabilities": "maximum probability",
        "differences": "difference from the whole adapter",
    }
    layers, tokens = [row["boundary"] for row in rows], len(rows[0]["probabilities"])
    best = _best(rows)["boundary"]
    with _figure(output, rows, size=(3.2 * tokens, 8.0)) as figure:
        grid = figure.subplots(len(panels), tokens, squeeze=False)
        for down, (name, title) in enumerate(panels.items()):
            for token in range(tokens):
                axes = grid[down, token]
                if name in rows[0]:
                    _line(axes, 0, layers, [row[name][token] for row in rows], "all layers")
                compared = rows[0]["compared"]
                for number, k in enumerate(compared, 1):
                    values = [row["compared"][k][name][token] for row in rows]
                    _line(axes, number, layers, values, f"bottom {k}", of=len(compared) + 1)
                axes.axvline(best, color="0.5", linewidth=0.8, label="best")
                axes.set_xlabel(f"layers (token {token + 1})")
                if token == 0:
                    axes.set_ylabel(title)
        _legend(figure, grid[0, 0])


def sketch(names: Sequence[int], values: Sequence[float], best: int, height: int = 5) -> list[str]:
    """Return lines of text that draw the values as bars with their names, `best` marked.

    The largest value is `height` lines high. This is for the terminal and needs no matplotlib.
    """
    low, high = min(values), max(values)
    eighths = [
        1 + round((value - low) / ((high - low) or 1.0) * (8 * height - 1)) for value in values
    ]
    width = max(len(str(name)) for name in names) + 1
    scale = {height - 1: f"{high:.4g}", 0: f"{low:.4g}"}
    lines = []
    for row in reversed(range(height)):
        cells = (_BARS[min(8, max(0, part - 8 * row))] for part in eighths)
        bars = "".join((cell * (width - 1)).rjust(width) for cell in cells)
        lines.append(f"{scale.get(row, ''):>8} {bars}".rstrip())
    lines.append(" " * 9 + "".join(f"{name:>{width}}" for name in names))
    mark = "".join(("▲" if name == best else "").rjust(width) for name in names)
    return [*lines, f"{'best':>8} {mark}".rstrip()]
