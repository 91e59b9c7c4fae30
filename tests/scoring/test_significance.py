"""Significance tests against sacrebleu's own, exact enumeration, and what must hold of any."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lorakit.errors import LorakitError
from lorakit.scoring.metrics import METRICS, compute_statistics
from lorakit.scoring.significance import (
    bootstrap,
    bootstrap_all,
    compare,
    interval_of,
    p_values,
    paired_error,
)
from lorakit.scoring.statistics import Statistics
from lorakit.settings import SignificanceSettings

SEED = 12345
FEW = SignificanceSettings(trials=500, seed=SEED)
WMT = "data/wmt23-en-zh/generaltest2023.en-zh."
SIZE = 400  # segments: sacrebleu takes its time
TEXT_METRICS = [name for name, metric in METRICS.items() if metric.needs != "model"]


def wmt_lines(shared: Path, name: str) -> list[str]:
    return (shared / f"{WMT}{name}.zh").read_text(encoding="utf-8").split("\n")[:-1]


def by_turns(first: list[str], second: list[str]) -> list[str]:
    return [pair[n % 2] for n, pair in enumerate(zip(first, second, strict=True))]


@pytest.fixture(scope="module")
def texts(shared: Path) -> dict[str, list[str]]:
    """The reference, the two systems, and two close ones that take turns between these."""
    ref, nllb, online = (
        wmt_lines(shared, name)[:SIZE] for name in ("ref.refA", "hyp.NLLB_Greedy", "hyp.ONLINE-A")
    )
    turns = {"even": by_turns(nllb, online), "odd": by_turns(online, nllb)}
    return {"ref": ref, "nllb": nllb, "online": online, **turns}


def runs_of(predictions: list[str], reference: list[str], *metrics: str) -> list[list[Statistics]]:
    references = [[text] for text in reference]
    return [
        [compute_statistics(predictions, references, metric=metric, lang="zh")]
        for metric in metrics
    ]


def sacrebleu(
    texts: dict[str, list[str]], systems: list[str], folder: Path, *options: str
) -> list[dict[str, Any]]:
    """Return what sacrebleu's own command says of systems, the first as the baseline."""
    for name in ("ref", *systems):
        (folder / name).write_text("\n".join(texts[name]) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "sacrebleu", "ref", "-i", *systems, "-m", "bleu", "chrf"]
    done = subprocess.run(
        [*command, "--tokenize", "zh", "--format", "json", *options],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
        env={**os.environ, "SACREBLEU_SEED": str(SEED)},
    )
    results: list[dict[str, Any]] = json.loads(done.stdout)
    return results


@pytest.mark.parametrize(("baseline", "system"), [("nllb", "online"), ("even", "odd")])
def test_p_values_are_those_of_sacrebleus_paired_ar(
    texts: dict[str, list[str]], baseline: str, system: str, tmp_path: Path
) -> None:
    options = ("--paired-ar", "--paired-ar-n", str(FEW.trials))
    _, theirs = sacrebleu(texts, [baseline, system], tmp_path, *options)
    ours, base = (runs_of(texts[name], texts["ref"], "bleu", "chrf") for name in (system, baseline))
    ps = p_values(ours, base, FEW)
    assert ps == [theirs[name]["p_value"] for name in ("BLEU", "chrF2")]
    assert max(ps) < 0.05 if system == "online" else min(ps) > 0.05


@pytest.mark.parametrize("system", ["nllb", "odd"])
def test_intervals_are_those_of_sacrebleus_paired_bs(
    texts: dict[str, list[str]], system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its API: its command cannot write chrF's as JSON. It computes in float32 here."""
    from sacrebleu import BLEU, CHRF
    from sacrebleu.significance import PairedTest

    monkeypatch.setenv("SACREBLEU_SEED", str(SEED))
    listed = [texts["ref"]]
    judges: dict[str, BLEU | CHRF] = {
        "bleu": BLEU(tokenize="zh", references=listed),
        "chrf": CHRF(references=listed),
    }
    systems: list[tuple[str, Sequence[str]]] = [(name, texts[name]) for name in ("online", system)]
    _, theirs = PairedTest(systems, judges, None, test_type="bs", n_samples=FEW.trials)()
    values = bootstrap(runs_of(texts[system], texts["ref"], *judges), FEW)
    for name, drawn in zip(("BLEU", "chrF2"), values, strict=True):
        expected: Any = theirs[name][1]
        assert len(drawn) == FEW.trials
        assert float(drawn.mean()) == pytest.approx(expected.mean, abs=1e-4)
        assert interval_of(drawn).half == pytest.approx(expected.ci, abs=1e-4)


def test_draws_do_not_depend_on_how_they_are_cut_into_chunks(
    texts: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = (runs_of(texts[name], texts["ref"], "bleu", "f1") for name in ("odd", "even"))
    whole = (p_values(ours, theirs, FEW), [interval_of(values) for values in bootstrap(ours, FEW)])
    monkeypatch.setattr("lorakit.scoring.significance._DRAWS_AT_ONCE", 1)
    intervals = [interval_of(values) for values in bootstrap(ours, FEW)]
    assert p_values(ours, theirs, FEW) == whole[0]
    for interval, other in zip(intervals, whole[1], strict=True):
        assert (interval.low, interval.high) == pytest.approx((other.low, other.high), abs=1e-9)


# — many sums at once —


def random_sums(metric: str) -> tuple[Statistics, NDArray[np.float64]]:
    """Sums of which many have a zero somewhere: no output, no match, no 4-gram."""
    statistics = compute_statistics(
        ["a b c d 7", "x"], [["a b d c 7"], ["y"]], metric=metric, baseline_predictions=["7", "y"]
    )
    columns = len(statistics.rows[0])
    draw = np.random.default_rng(0)
    sums = draw.integers(0, 400, (3000, columns)).astype(np.float64)
    sums *= draw.random((3000, columns)) < draw.random((3000, 1))
    return statistics, np.vstack(
        [sums, np.zeros((1, columns)), np.sum(statistics.rows, axis=0)[None]]
    )


@pytest.mark.parametrize("metric", TEXT_METRICS)
def test_many_values_at_once_are_to_the_bit_those_of_each_alone(metric: str) -> None:
    statistics, sums = random_sums(metric)
    assert statistics.values_of(sums, 7).tolist() == [
        statistics.value_of(list(row), 7) for row in sums
    ]


# — what must hold of any test —


def of_rows(*rows: float) -> list[list[Statistics]]:
    """One run under one metric that is a mean."""
    mean = compute_statistics(["a"], [["a"]], metric="em")
    return [[Statistics([[row] for row in rows], mean.value_of, mean.values_of, "")]]


def in_runs(*runs: Iterable[float]) -> list[list[Statistics]]:
    return [[of_rows(*rows)[0][0] for rows in runs]]


def test_p_is_the_share_of_all_ways_to_swap_that_differ_as_much() -> None:
    ours = (1, 1, 1, 1, 1, 0.3, 1, 1, 0, 1)
    theirs = (0, 1, 0, 0, 1, 0.7, 0, 0, 0, 1)
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    ways = [
        sum(map(math.prod, zip(gaps, signs, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(gaps))
    ]
    exact = sum(abs(way) >= abs(sum(gaps)) - 1e-9 for way in ways) / len(ways)
    settings = SignificanceSettings(trials=20_000)
    assert p_values(of_rows(*ours), of_rows(*theirs), settings)[0] == pytest.approx(exact, abs=0.01)
    assert 0.05 < exact < 0.2


def test_two_equal_systems_do_not_differ_and_neither_do_two_with_equal_values() -> None:
    rows = (1, 0.1, 0.2, 0.3, 1, 0)
    assert p_values(of_rows(*rows), of_rows(*rows), FEW) == [1]
    assert p_values(of_rows(*rows), of_rows(*reversed(rows)), FEW) == [1]


def test_p_is_never_zero_and_the_same_from_both_sides() -> None:
    ones, zeros = of_rows(*[1.0] * 40), of_rows(*[0.0] * 40)
    assert p_values(ones, zeros, FEW) == p_values(zeros, ones, FEW) == [1 / 501]


def test_p_values_of_systems_that_differ_by_chance_are_spread_evenly() -> None:
    """A test at 10 % that rejects equal systems in about 10 % of the cases."""
    draw = np.random.default_rng(1)
    settings = SignificanceSettings(trials=199)
    ps = [
        p_values(of_rows(*draw.random(30)), of_rows(*draw.random(30)), settings)[0]
        for _ in range(400)
    ]
    assert np.mean(np.array(ps) <= 0.1) == pytest.approx(0.1, abs=0.05)
    assert np.mean(ps) == pytest.approx(0.5, abs=0.06)


def test_intervals_hold_the_true_mean_in_about_19_of_20_cases() -> None:
    draw = np.random.default_rng(2)
    settings = SignificanceSettings(trials=400)
    intervals = [
        interval_of(bootstrap(of_rows(*draw.random(100)), settings)[0]) for _ in range(300)
    ]
    inside = np.mean([interval.low <= 50 <= interval.high for interval in intervals])
    assert inside == pytest.approx(0.945, abs=0.04)


def test_another_seed_draws_other_examples_and_the_same_seed_the_same() -> None:
    runs = of_rows(*np.random.default_rng(0).random(50))
    drawn = [bootstrap(runs, SignificanceSettings(100, seed))[0].tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_systems_resampled_together_have_the_values_that_each_has_alone() -> None:
    draw = np.random.default_rng(4)
    systems = [of_rows(*draw.random(count)) for count in (30, 20, 30)]
    together = bootstrap_all(systems, FEW)
    alone = [bootstrap(system, FEW) for system in systems]
    assert [values[0].tolist() for values in together] == [values[0].tolist() for values in alone]


# — several runs of a system —


def test_a_run_counted_twice_changes_nothing(texts: dict[str, list[str]]) -> None:
    ours, theirs = (runs_of(texts[name], texts["ref"], "chrf") for name in ("odd", "even"))
    twice = [[*ours[0], *ours[0]]]
    expected = p_values(ours, theirs, FEW)
    assert p_values(twice, theirs, FEW) == p_values(theirs, twice, FEW) == expected
    assert p_values(twice, [[*theirs[0], *theirs[0]]], FEW) == expected
    assert bootstrap(twice, FEW)[0].tolist() == bootstrap(ours, FEW)[0].tolist()


def test_runs_of_a_mean_are_tested_as_the_mean_of_their_rows() -> None:
    draw = np.random.default_rng(3)
    rows = draw.random((2, 3, 40))
    rows[0] += 0.1
    ours, theirs = (in_runs(*system) for system in rows)
    mean_of_ours, mean_of_theirs = (of_rows(*system.mean(axis=0)) for system in rows)
    assert p_values(ours, theirs, FEW) == p_values(mean_of_ours, mean_of_theirs, FEW)
    assert np.allclose(bootstrap(ours, FEW)[0], bootstrap(mean_of_ours, FEW)[0], atol=1e-9)


def test_a_comparison_is_the_difference_its_interval_and_its_p() -> None:
    ours, theirs = of_rows(1, 1, 1, 0, 1, 1), of_rows(0, 1, 0, 0, 1, 0)
    (comparison,) = compare(ours, theirs, bootstrap(ours, FEW), bootstrap(theirs, FEW), FEW)
    assert comparison.difference == pytest.approx(50)
    assert 0 <= comparison.interval.low < 50 < comparison.interval.high <= 100
    assert [comparison.p] == p_values(ours, theirs, FEW)


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ([[1, 0]] * 2, [[1, 0]] * 3, "2 runs cannot be paired with 3"),
        ([[1, 0]], [[1, 0, 0]], "different numbers of examples"),
    ],
)
def test_what_cannot_be_paired_is_an_error(
    ours: list[list[float]], theirs: list[list[float]], message: str
) -> None:
    with pytest.raises(LorakitError, match=message):
        p_values(in_runs(*ours), in_runs(*theirs), FEW)


def test_ten_thousand_trials_on_a_whole_test_set_take_seconds(shared: Path) -> None:
    """Measured: under a second of one core for both."""
    reference = wmt_lines(shared, "ref.refA")
    systems = [wmt_lines(shared, f"hyp.{name}") for name in ("ONLINE-A", "NLLB_Greedy")]
    ours, theirs = (runs_of(system, reference, "bleu") for system in systems)
    start = time.process_time()
    assert p_values(ours, theirs, SignificanceSettings()) == [1 / 10_001]
    interval = interval_of(bootstrap(ours, SignificanceSettings())[0])
    assert time.process_time() - start < 10
    assert interval.low < ours[0][0].value < interval.high


# — the standard error of a paired difference —

WORDS = ["red", "blue", "green", "cat", "dog", "sun", "moon", "tree", "old", "new"]


def texts_of(count: int, seed: int) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, size=draw.integers(4, 12))) for _ in range(count)]


def test_the_paired_error_of_a_mean_is_the_usual_one() -> None:
    references = [[text] for text in texts_of(20, 0)]
    ours, theirs = (
        compute_statistics(texts_of(20, seed), references, metric="f1") for seed in (1, 2)
    )
    pairs = zip(ours.rows, theirs.rows, strict=True)
    differences = [100 * (our_row[0] - their_row[0]) for our_row, their_row in pairs]
    assert paired_error(ours, theirs) == pytest.approx(np.std(differences, ddof=1) / 20**0.5)
    assert paired_error(ours, ours) == 0.0


def test_the_paired_error_of_a_value_of_the_file_is_near_the_bootstrap_s() -> None:
    texts = texts_of(200, 0)
    draw = np.random.default_rng(1)
    sides = []
    for share in (0.2, 0.4):  # of the words exchanged
        other = [
            " ".join(str(draw.choice(WORDS)) if draw.random() < share else w for w in text.split())
            for text in texts
        ]
        sides.append(compute_statistics(other, [[text] for text in texts], metric="bleu"))
    ours, theirs = sides
    (our_values,), (their_values,) = (bootstrap([[side]], FEW) for side in sides)
    assert paired_error(ours, theirs) == pytest.approx(np.std(our_values - their_values), rel=0.15)
