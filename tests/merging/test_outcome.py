from __future__ import annotations

from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest

from lorakit.merging.outcome import interval, judge_pruning, loss_statistics
from lorakit.settings import PruningSettings, SignificanceSettings

SETTINGS = SignificanceSettings(trials=1000)
TOKENS = [4 + number % 7 for number in range(40)]


def candidate(ratio: str, value: float, *, complete: bool = True, module: bool = False) -> Any:
    by_threshold = PruningSettings(unit="module", prune_threshold=Decimal(0))
    pruning = (by_threshold if module else PruningSettings()).at(Decimal(ratio))
    return SimpleNamespace(name=ratio, pruning=pruning, value=value, is_complete=complete)


def losses_of(candidate: Any) -> Any:
    """Return losses that differ from record to record, their level the candidate's value."""
    means = [number * 37 % 11 / 10 - candidate.value for number in range(len(TOKENS))]
    return loss_statistics(means, TOKENS)


CASES = {
    "a winner that prunes is tested against none": (
        {"0": -3.0, "0.1": -1.0, "0.2": -2.0},
        "pruning at 0.1 is better than no pruning (p = 0.0010)",
    ),
    "none that wins is tested against the best that prunes": (
        {"0": -1.0, "0.1": -4.0, "0.2": -3.0},
        "pruning does not help: no pruning is better than pruning at 0.2 (p = 0.0010)",
    ),
    "equal ones differ by nothing": (
        {"0": -1.0, "0.1": -1.0},
        "no difference shown between no pruning and pruning at 0.1 (p = 1.0000)",
    ),
}


@pytest.mark.parametrize(("values", "line"), CASES.values(), ids=CASES.keys())
def test_the_verdict_says_what_the_paired_test_shows(values: dict[str, float], line: str) -> None:
    candidates = [candidate(ratio, value) for ratio, value in values.items()]
    best = max(candidates, key=lambda one: one.value)
    verdict = judge_pruning(candidates, best, losses_of, SETTINGS)
    assert verdict is not None
    assert verdict.line() == line
    fields = verdict.fields()
    assert fields["difference"] == pytest.approx(verdict.rival.value - best.value)
    assert (fields["trials"], fields["seed"]) == (1000, 0)


def test_a_threshold_is_called_one() -> None:
    candidates = [candidate("0", -3.0, module=True), candidate("1.5", -1.0, module=True)]
    verdict = judge_pruning(candidates, candidates[1], losses_of, SETTINGS)
    assert verdict is not None
    assert verdict.line().startswith("pruning at threshold 1.5 is better than no pruning")


def test_what_was_stopped_early_is_no_rival() -> None:
    candidates = [candidate("0", -1.0), candidate("0.1", -1.1, complete=False)]
    assert judge_pruning(candidates, candidates[0], losses_of, SETTINGS) is None


def test_the_loss_of_a_sample_is_that_of_all_its_tokens() -> None:
    statistics = loss_statistics([1.0, 4.0], [3, 1])
    assert statistics.value == pytest.approx((3 * 1.0 + 1 * 4.0) / 4)
    low, high = interval(statistics, SETTINGS)
    assert (low, high) == (1.0, 4.0)


def test_records_of_one_loss_leave_no_doubt() -> None:
    assert interval(loss_statistics([2.0] * 9, [5] * 9), SETTINGS) == [2.0, 2.0]
