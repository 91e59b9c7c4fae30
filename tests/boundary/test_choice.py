"""Which point is the best: highest scores, ties, the rule of one standard error, notes."""

from __future__ import annotations

import statistics as python_statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from lorakit.boundary.choice import Sweep, check_rule
from lorakit.boundary.cuts import BASE, Point, layer_order
from lorakit.boundary.loss import loss_statistics
from lorakit.errors import LorakitError
from lorakit.models.tokens import Example
from lorakit.scoring.metrics import METRICS
from lorakit.scoring.per_example import mean_over_examples
from lorakit.settings import BoundarySettings


def sweep(values: Mapping[Point, Sequence[float]], layers: int = 3, **settings: Any) -> Sweep:
    """Return a sweep of scores of single records, as shares."""
    chosen = BoundarySettings(**settings)
    rows = {point: mean_over_examples(own, "s") for point, own in values.items()}
    return Sweep(rows, chosen, layer_order(chosen.keep, layers, 0))


def scores(*values: float, **settings: Any) -> Sweep:
    """Return a sweep of one record, in percent, by boundary, 0 first."""
    rows = {Point(k): [value / 100] for k, value in enumerate(values)}
    return sweep(rows, layers=len(values) - 1, **settings)


def test_the_best_of_equal_boundaries_is_the_smaller_and_never_the_base() -> None:
    assert scores(9.0, 1.0, 3.0, 3.0).best == Point(2)
    assert scores(0.0, 0.0, 0.0).best == Point(1)


def test_the_best_of_equal_points_has_the_smaller_boundary_then_the_smaller_factor() -> None:
    values = {(1, 0.0): 0.1, (1, 0.5): 0.3, (2, 0.0): 0.3, (2, 0.5): 0.3}
    rows = {BASE: [0.0], **{Point(*point): [value] for point, value in values.items()}}
    soft = sweep(rows, layers=2, factors=(0.0, 0.5))
    assert soft.best == Point(1, 0.5)
    records = soft.as_records()
    assert [(r["boundary"], r["factor"]) for r in records] == list(values)
    assert [r["best"] for r in records] == [False, True, False, False]


def test_where_lower_is_better_the_lowest_is_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "wer", replace(METRICS["em"], higher_is_better=False))
    worse = scores(0.0, 2.0, 1.0, metric="wer")
    assert worse.best == Point(2)
    assert "does not help" in worse.baseline_note
    assert scores(0.0, 2.0, 1.0, metric="loss").best == Point(2)


def test_a_base_that_wins_is_said() -> None:
    line = scores(3.0, 1.0, 2.0).baseline_note
    assert line.endswith("(2.00): the adapter does not help")
    line = scores(1.0, 1.0, 2.0).baseline_note
    assert line.endswith("scores 1.00 rougeL, boundary 2 scores 2.00")


# boundary 2 differs from the best, 3, by 0.125 on average, and s/√n is 0.125 as well
NEAR = {
    BASE: [0.0, 0.0, 0.0, 0.0],
    Point(1): [0.25, 0.25, 0.0, 0.0],
    Point(2): [0.5, 0.5, 0.5, 0.0],
    Point(3): [0.5, 0.5, 0.5, 0.5],
}


def test_the_rule_takes_the_smallest_boundary_within_one_standard_error() -> None:
    assert sweep(NEAR).best == Point(3)
    chosen = sweep(NEAR, rule="1se")
    assert (chosen.best, chosen.highest) == (Point(2), Point(3))
    records = chosen.as_records()
    assert [record["best"] for record in records] == [False, True, False]
    for record in records:
        pairs = zip(NEAR[Point(3)], NEAR[Point(record["boundary"])], strict=True)
        differences = [100 * (high - low) for high, low in pairs]
        expected = python_statistics.stdev(differences) / 2
        assert record["standard_error"] == pytest.approx(expected)


def test_a_boundary_just_outside_the_error_is_not_taken() -> None:
    values = {**NEAR, Point(2): [0.5, 0.49, 0.49, 0.0]}
    assert sweep(values, rule="1se").best == Point(3)


def test_the_rule_chooses_among_factors_the_smaller_boundary_first() -> None:
    values = {BASE: [0.0] * 4, Point(1): [0.25, 0.25, 0.0, 0.0], Point(1, 0.5): NEAR[Point(2)]}
    values |= {Point(2): NEAR[Point(3)], Point(2, 0.5): NEAR[Point(2)]}
    assert sweep(values, layers=2, rule="1se", factors=(0.0, 0.5)).best == Point(1, 0.5)


def test_the_rule_is_refused_for_one_record() -> None:
    check_rule("best", 1)
    check_rule("1se", 2)
    with pytest.raises(LorakitError, match="--rule 1se needs two records or more"):
        check_rule("1se", 1)


def test_a_plain_search_writes_the_fields_it_always_wrote() -> None:
    fields = ["boundary", "score", "metric", "count", "baseline", "signature", "best"]
    assert all(list(record) == fields for record in sweep(NEAR).as_records())


def test_other_layers_than_the_bottom_ones_are_named_in_the_records() -> None:
    records = sweep(NEAR, keep="top").as_records()
    assert {record["keep"] for record in records} == {"top"}
    assert [record["layers"] for record in records] == [[2], [1, 2], [0, 1, 2]]


def test_a_loss_is_a_mean_over_tokens_and_carries_its_error() -> None:
    targets, low, lower = (2, 4, 8), (2.0, 4.0, 8.0), (1.0, 4.0, 9.0)
    examples = [Example(tuple(range(count + 1)), 1, "r") for count in targets]
    by_point = {BASE: [4.0, 8.0, 16.0], Point(1): low, Point(2): lower}
    rows = {point: loss_statistics(sums, examples) for point, sums in by_point.items()}
    losses = Sweep(rows, BoundarySettings(metric="loss"), [0, 1])
    first, second = losses.as_records()
    assert (first["score"], second["score"], first["baseline"]) == (1.0, 1.0, 2.0)
    assert (first["metric"], first["best"], second["best"]) == ("loss", True, False)
    differences = [  # without one record at a time
        sum(lower[n] - low[n] for n in others) / sum(targets[n] for n in others)
        for others in ((1, 2), (0, 2), (0, 1))
    ]
    mean = sum(differences) / 3
    expected = (2 / 3 * sum((difference - mean) ** 2 for difference in differences)) ** 0.5
    assert second["standard_error"] == pytest.approx(expected)
    assert losses.baseline_note.endswith("scores 2.000 loss, boundary 1 scores 1.000")


@pytest.mark.parametrize(
    ("values", "note"),
    [
        (NEAR, "no boundary below 3 is better than the whole adapter"),
        (
            {**NEAR, Point(2): [0.75, 0.75, 0.5, 0.25]},
            "no boundary below 3 is better than the whole adapter by more than one standard error: "
            "2 is so by 6.25 ± 11.97",
        ),
        ({**NEAR, Point(2): [0.75, 0.75, 0.75, 0.5]}, None),
        ({point: NEAR[point] for point in (BASE, Point(1), Point(2))}, None),
        ({point: NEAR[point] for point in (BASE, Point(3))}, None),
    ],
    ids=["the top is best", "flat", "a cut is better", "the top is not tried", "it alone is"],
)
def test_a_cut_that_gains_nothing_is_said(
    values: Mapping[Point, Sequence[float]], note: str | None
) -> None:
    assert sweep(values).flat_note == note
    assert len(sweep(values).notes) == (1 if note is None else 2)
