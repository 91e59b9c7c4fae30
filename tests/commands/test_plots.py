from __future__ import annotations

import itertools
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from lorakit.commands._plots import (
    check_plot,
    grey,
    plot_boundaries,
    plot_importance,
    plot_lines,
    plot_probabilities,
    plot_search,
    plot_searches,
    sketch,
)
from lorakit.errors import LorakitError

TRIED = [
    {"prune_ratio": 0.5, "steps": 4, "loss": 1.5, "stopped": True, "best": False},
    {"prune_ratio": 0.0, "steps": 9, "loss": 1.2, "stopped": False, "best": False},
    {"prune_ratio": 0.1, "steps": 9, "loss": 1.1, "stopped": False, "best": True},
]


def test_a_search_is_drawn_in_the_order_of_its_ratios_with_its_data_beside(tmp_path: Path) -> None:
    plot = tmp_path / "ratios.svg"
    plot_search(TRIED, metric="loss", output=str(plot))
    text = plot.read_text(encoding="utf-8")
    for label in ("prune ratio", "loss on the validation set", "stopped early", "best"):
        assert f"<!-- {label} -->" in text
    rows = [json.loads(line) for line in Path(f"{plot}.jsonl").read_text().splitlines()]
    assert [row["prune_ratio"] for row in rows] == [0, 0.1, 0.5]


def with_intervals(shift: float = 0.0) -> list[dict[str, Any]]:
    return [
        {**row, "loss": row["loss"] + shift, "interval": [1.0 + shift, 1.9 + shift]}
        for row in TRIED
    ]


def test_the_bars_of_a_search_are_its_intervals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = with_intervals()
    figure = drawn(
        lambda output: plot_search(rows, metric="loss", output=output), tmp_path, monkeypatch
    )
    bars = [np.asarray(bar.get_paths()[0].vertices).tolist() for bar in figure.axes[0].collections]
    assert sorted(bars) == [[[x, 1.0], [x, 1.9]] for x in (0.0, 0.1, 0.5)]


def test_searches_of_several_seeds_are_one_figure_with_all_data_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searches = {f"seed {seed}": with_intervals(seed / 10) for seed in range(3)}
    figure = drawn(
        lambda output: plot_searches(searches, metric="loss", output=output), tmp_path, monkeypatch
    )
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(labels) == ["best", "seed 0", "seed 1", "seed 2", "stopped early"]
    assert len(figure.axes[0].collections) == 9
    text = (tmp_path / "a.png.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["search"] for row in rows] == [name for name in searches for _ in TRIED]
    assert [row["prune_ratio"] for row in rows] == [row["prune_ratio"] for row in TRIED] * 3


def test_every_line_has_its_own_marker_and_dash(tmp_path: Path) -> None:
    rows = [{"k": k, "v": k * n, "name": f"line {n}"} for n in range(4) for k in (2, 1)]
    plot_lines(rows, x="k", y="v", line="name", output=str(tmp_path / "a.svg"))
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert all(f"<!-- line {n} -->" in text for n in range(4))


def test_every_line_has_a_grey_of_its_own() -> None:
    greys = [grey(number, 9) for number in range(9)]
    assert len(set(greys)) == 9
    assert greys[0] == "0.000"
    assert all(float(one) < float(next) <= 0.65 for one, next in itertools.pairwise(greys))


def drawn(draw: Callable[[str], None], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Figure:
    """Return the figure that a function draws."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    draw(str(folder / "a.png"))
    return figures[0]


def many_lines(output: str) -> None:
    rows = [{"k": k, "v": k * n, "name": f"run {n}"} for n in range(9) for k in (0, 1)]
    plot_lines(rows, x="k", y="v", line="name", output=output)


def panels(output: str) -> None:
    names = ("probabilities", "maximum_probabilities", "differences")
    curves = {name: [0.1, 0.9] for name in names}
    rows = [
        {"boundary": k, "score": k / 9, "best": k == 3, "compared": {"2": curves}, **curves}
        for k in range(1, 6)
    ]
    plot_probabilities(rows, output=output)


PLOTS: dict[str, Callable[[str], None]] = {
    "lines": many_lines,
    "panels": panels,
    "search": lambda output: plot_search(TRIED, metric="loss", output=output),
}


@pytest.mark.parametrize("draw", PLOTS.values(), ids=PLOTS.keys())
def test_a_legend_covers_no_data(
    draw: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = drawn(draw, tmp_path, monkeypatch)
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert figure.bbox.contains(box.x0, box.y0)
    assert figure.bbox.contains(box.x1, box.y1)
    for axes in figure.axes:
        assert axes.get_legend() is None
        assert not box.overlaps(axes.get_window_extent())


def scored(k: int, factor: float | None = None, **more: float) -> dict[str, Any]:
    named = {} if factor is None else {"factor": factor}
    row = {"boundary": k, "score": k / 9, "metric": "f1", "baseline": 0.1, "best": k == 2}
    return {**row, "best": k == 2 and not factor, **named, **more}


@pytest.mark.parametrize("errors", [{}, {"standard_error": 0.5}], ids=["without", "with"])
def test_boundaries_have_bars_where_the_records_have_errors(
    errors: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [scored(k, **errors) for k in (1, 2, 3)]
    figure = drawn(lambda output: plot_boundaries(rows, output=output), tmp_path, monkeypatch)
    (axes,) = figure.axes
    (star,) = (line for line in axes.lines if line.get_label() == "best")
    assert np.asarray(star.get_xdata()).tolist() == [2.0]
    bars = [path for lines in axes.collections for path in lines.get_paths()]
    lengths = [float(np.ptp(np.asarray(bar.vertices)[:, 1])) for bar in bars]
    assert lengths == pytest.approx([1.0, 1.0, 1.0] if errors else [])


def test_every_factor_has_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [scored(k, factor) for k in (1, 2, 3) for factor in (0.0, 0.25)]
    figure = drawn(lambda output: plot_boundaries(rows, output=output), tmp_path, monkeypatch)
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert labels == ["factor 0", "factor 0.25", "base model", "best"]


def test_importance_has_a_row_for_each_block_and_projection(tmp_path: Path) -> None:
    rows = [
        {"block": block, "projection": "q_proj", "layer": layer, "importance": layer + 1.0}
        for block in ("xs", "tgt")
        for layer in (0, 1, 3)
    ]
    plot_importance(rows, output=str(tmp_path / "a.svg"))
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert "<!-- xs q_proj -->" in text
    assert "<!-- tgt q_proj -->" in text


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_same_data_give_the_same_bytes(tmp_path: Path, ending: str) -> None:
    for name in "ab":
        plot_search(TRIED, metric="loss", output=str(tmp_path / f"{name}.{ending}"))
    one, other = ((tmp_path / f"{name}.{ending}").read_bytes() for name in "ab")
    assert one == other


def test_another_ending_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    with pytest.raises(LorakitError, match=r"a\.pdf is neither \.png nor \.svg"):
        check_plot(str(tmp_path / "a.pdf"))


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(LorakitError, match=r"pip install 'lorakit\[plot\]'"):
        check_plot("a.png")


def test_a_sketch_has_a_bar_for_each_value_and_marks_the_best() -> None:
    lines = sketch([8, 9, 10], [0.0, 0.5, 1.0], 9, height=2)
    assert lines == [
        "       1     ▁▁ ██",
        "       0  ▁▁ ██ ██",
        "           8  9 10",
        "    best      ▲",
    ]


def test_the_overlay_script_draws_the_data_files_of_several_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(2):
        output = str(tmp_path / f"{seed}.svg")
        plot_search(with_intervals(seed / 10), metric="loss", output=output)
    files = [f"seed {seed}={tmp_path / f'{seed}.svg.jsonl'}" for seed in range(2)]
    script = Path(__file__).parents[2] / "examples/overlay.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "both.svg"), *files])
    runpy.run_path(str(script), run_name="__main__")
    text = (tmp_path / "both.svg").read_text(encoding="utf-8")
    assert "<!-- seed 0 -->" in text
    assert "<!-- seed 1 -->" in text
