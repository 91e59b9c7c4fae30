"""Singular values of ΔW, ranks by energy, and merges to such ranks, against the dense SVD."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from lorakit.adapters.storage import load_adapter, save_adapter
from lorakit.cli import lorakit
from lorakit.merging.low_rank import energy_rank
from lorakit.merging.spectrum import ENERGIES, rank_rows, spectrum
from tests.merging.test_static import new_adapter


def dense_rank(values: np.ndarray, energy: float) -> int:
    """Return the lowest rank whose squares reach the share, by trying all of them."""
    total = float(np.sum(values**2))
    return next(
        r
        for r in range(1, len(values) + 1)
        if np.sum(values[:r] ** 2) >= energy * total * (1 - 1e-12)
    )


def test_a_row_has_the_singular_values_of_the_dense_matrix() -> None:
    adapter = new_adapter()
    rows = list(spectrum(adapter))
    assert [row["module"] for row in rows] == [module.name for module in adapter.modules()]
    for row, module in zip(rows, adapter.modules(), strict=True):
        dense = np.linalg.svd(module.delta(), compute_uv=False)
        np.testing.assert_allclose(row["singular_values"], dense[: module.rank], atol=1e-6)
        assert row["ranks"]["0.9"] == dense_rank(dense, 0.9)
        assert row["ranks"]["1"] == np.linalg.matrix_rank(module.delta(), tol=1e-6)


@pytest.mark.parametrize(
    ("values", "energy", "rank"),
    [
        pytest.param([3, 2, 1], "0.5", 1, id="the first is enough"),
        pytest.param([3, 2, 1], "0.9", 2, id="two"),
        pytest.param([3, 2, 1], "1", 3, id="all"),
        pytest.param([3, 2, 1e-12], "1", 2, id="all that float32 can tell"),
        pytest.param([1, 1, 1, 1], "0.5", 2, id="exactly half"),
        pytest.param([0, 0], "0.9", 1, id="nothing"),
    ],
)
def test_the_rank_is_the_lowest_that_keeps_the_energy(
    values: list[float], energy: str, rank: int
) -> None:
    assert energy_rank(np.array(values, np.float64), Decimal(energy)) == rank


def run(*arguments: str) -> str:
    done = CliRunner().invoke(lorakit, list(arguments), standalone_mode=False)
    if done.exception:
        raise done.exception
    return done.stderr


@pytest.mark.parametrize("energy", ["0.3", "0.9", "0.99"])
@pytest.mark.parametrize("most", [None, 1, 2])
def test_each_module_gets_the_lowest_rank_that_keeps_the_energy(
    energy: str, most: int | None, tmp_path: Path
) -> None:
    source, output = str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")
    adapter = new_adapter()
    save_adapter(adapter, source)
    bound = [] if most is None else ["--max-rank", str(most)]
    notes = run("merge", source, "--keep-energy", energy, *bound, "-o", output)
    errors: dict[int | None, list[tuple[float, float]]] = {}
    for kept, whole in zip(load_adapter(output).modules(), adapter.modules(), strict=True):
        dense = np.linalg.svd(whole.delta(), compute_uv=False)
        rank = min(dense_rank(dense, float(energy)), most or 99)
        assert kept.rank == rank
        difference = float(np.linalg.norm(whole.delta() - kept.delta()))
        np.testing.assert_allclose(difference, np.linalg.norm(dense[rank:]), atol=1e-5)
        sizes = (difference**2, float(np.sum(dense**2)))
        errors.setdefault(whole.layer, []).append(sizes)
    for layer, of_layer in errors.items():
        lost, total = map(sum, zip(*of_layer, strict=True))
        line = next(line for line in notes.splitlines() if f"layer {layer}: " in line)
        assert float(line.rpartition("error ")[2]) == pytest.approx(
            np.sqrt(lost / total), rel=0.06, abs=1e-6
        )


def test_the_history_says_the_energy_and_not_a_rank(tmp_path: Path) -> None:
    source, output = str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")
    save_adapter(new_adapter(), source)
    run("merge", source, "--keep-energy", "0.9", "--max-rank", "2", "-o", output, "-q")
    assert load_adapter(output).header["history"][-1]["settings"] == {
        "method": "svd",
        "weights": [1.0],
        "keep_energy": 0.9,
        "max_rank": 2,
    }


@pytest.mark.parametrize(
    "options",
    [
        ["--rank", "2", "--keep-energy", "0.9"],
        ["--max-rank", "2", "--method", "svd"],
        ["--keep-energy", "0"],
        ["--keep-energy", "1.1"],
        ["--keep-energy", "0.9", "--method", "ties"],
    ],
)
def test_options_that_do_not_go_together_are_refused(options: list[str], tmp_path: Path) -> None:
    source = str(tmp_path / "a.safetensors")
    save_adapter(new_adapter(), source)
    done = CliRunner().invoke(lorakit, ["merge", source, *options, "-o", str(tmp_path / "b")])
    assert done.exit_code == 2
    assert not (tmp_path / "b").exists()


def test_inspect_prints_a_line_or_a_row_a_module_and_draws_the_ranks(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    source, figure = str(tmp_path / "a.safetensors"), tmp_path / "ranks.svg"
    adapter = new_adapter()
    save_adapter(adapter, source)
    done = CliRunner().invoke(lorakit, ["inspect", source, "--spectrum", "--plot", str(figure)])
    assert done.exit_code == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == list(spectrum(adapter))
    drawn = [json.loads(line) for line in Path(f"{figure}.jsonl").read_text().splitlines()]
    assert drawn == rank_rows(spectrum(adapter))
    assert {row["energy"] for row in drawn} == set(ENERGIES)
    table = CliRunner().invoke(lorakit, ["inspect", source, "--spectrum", "--format", "table"])
    assert len(table.stdout.splitlines()) == 1 + len(adapter.modules())


@pytest.mark.parametrize(
    "options", [["--spectrum", "--importance", "--data", "x"], ["--plot", "x.svg"]]
)
def test_inspect_refuses_options_that_mean_nothing_together(options: list[str]) -> None:
    assert CliRunner().invoke(lorakit, ["inspect", "a.safetensors", *options]).exit_code == 2
