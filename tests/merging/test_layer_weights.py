"""Weights by layer: how they are written, and that merges are the sums that they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from lorakit.adapters.storage import load_adapter, save_adapter
from lorakit.cli import lorakit
from lorakit.errors import LorakitError
from lorakit.merging.layer_weights import (
    parse_runs,
    read_layer_weights,
    runs_by_adapter,
    runs_text,
    weight_at,
)
from lorakit.merging.methods import METHODS
from lorakit.settings import LayerRun
from tests.merging.test_static import new_adapter

THREE = {"0-1:0.5": (0.5, 0.5, 1), "1:2,2-:-1": (1, 2, -1), "0-2:0..1": (0, 0.5, 1)}


@pytest.mark.parametrize(
    ("text", "runs"),
    [
        pytest.param("3:0.5", (LayerRun(3, 3, 0.5, 0.5),), id="one layer"),
        pytest.param("0-9:1", (LayerRun(0, 9, 1.0, 1.0),), id="a range"),
        pytest.param("10-:-0.5", (LayerRun(10, None, -0.5, -0.5),), id="all above"),
        pytest.param("0-29:0..1", (LayerRun(0, 29, 0.0, 1.0),), id="on a line"),
        pytest.param(
            " 10-:2 ,0-9:1e-1",
            (LayerRun(0, 9, 0.1, 0.1), LayerRun(10, None, 2.0, 2.0)),
            id="in any order",
        ),
    ],
)
def test_runs_are_read_and_written(text: str, runs: tuple[LayerRun, ...]) -> None:
    assert parse_runs(text) == runs
    assert parse_runs(runs_text(runs)) == runs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no layers and weight"),
        ("0-9", "no layers and weight"),
        ("x:1", "no layers and weight"),
        ("9-0:1", "runs backwards"),
        ("0-9:x", "not a number"),
        ("0-9:nan", "not a number"),
        ("0-9:1e39", "float32"),
        ("0-:0..1", "two weights"),
        ("3:0..1", "two weights"),
        ("0-5:1,5-9:2", "layer 5 has two weights"),
        ("0-:1,7:2", "layer 7 has two weights"),
    ],
)
def test_what_is_no_run_is_refused(text: str, message: str) -> None:
    with pytest.raises(LorakitError, match=message):
        parse_runs(text)


@pytest.mark.parametrize(("text", "weights"), THREE.items())
def test_a_layer_has_the_weight_of_its_run_and_others_have_1(
    text: str, weights: tuple[float, ...]
) -> None:
    runs = parse_runs(text)
    assert tuple(weight_at(runs, layer) for layer in range(3)) == pytest.approx(weights)
    assert weight_at(runs, None) == 1


def test_a_file_gives_the_same_runs(tmp_path: Path) -> None:
    lines = [
        {"adapter": "xs", "layers": "10-29", "weight": 0.5},
        {"adapter": "wl", "layers": "0-29", "weight": [0, 1]},
        {"adapter": "xs", "layers": 3, "weight": 1},
    ]
    file = tmp_path / "weights.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_layer_weights(str(file)) == {
        "xs": parse_runs("3:1,10-29:0.5"),
        "wl": parse_runs("0-29:0..1"),
    }


@pytest.mark.parametrize(
    "line",
    [
        {"layers": "0", "weight": 1},
        {"adapter": "xs", "weight": 1},
        {"adapter": "xs", "layers": True, "weight": 1},
        {"adapter": "xs", "layers": "0"},
        {"adapter": "xs", "layers": "0", "weight": "1"},
        {"adapter": "xs", "layers": "0-2", "weight": [1, 2, 3]},
        {"adapter": "xs", "layers": "0-2", "weight": []},
        {"adapter": "xs", "layers": "2-0", "weight": 1},
    ],
)
def test_a_line_that_cannot_be_used_is_named(line: dict[str, object], tmp_path: Path) -> None:
    file = tmp_path / "weights.jsonl"
    file.write_text('{"adapter": "xs", "layers": 9, "weight": 1}\n' + json.dumps(line) + "\n")
    with pytest.raises(LorakitError, match=r"weights\.jsonl:2: "):
        read_layer_weights(str(file))


def test_weights_for_no_adapter_are_refused() -> None:
    with pytest.raises(LorakitError, match="weights for 'xz', but the adapters are xs, wl"):
        runs_by_adapter({"xz": parse_runs("0:1")}, ["xs", "wl"])


def run_merge(folder: Path, *options: str) -> Path:
    """Merge two adapters of three layers by the command line; return the merged file."""
    for seed, name in enumerate(("xs", "wl")):
        save_adapter(new_adapter(seed=seed), str(folder / f"{name}.safetensors"))
    files = [str(folder / f"{name}.safetensors") for name in ("xs", "wl")]
    output = folder / "merged.safetensors"
    done = CliRunner().invoke(
        lorakit, ["merge", *files, *options, "-o", str(output)], standalone_mode=False
    )
    if done.exception:
        raise done.exception
    return output


@pytest.mark.parametrize("method", ["cat", "linear"])
@pytest.mark.parametrize(("text", "weights"), THREE.items())
def test_a_merge_is_the_dense_sum_with_each_layers_weights(
    method: str, text: str, weights: tuple[float, ...], tmp_path: Path
) -> None:
    options = ["--method", method, "--weights", f"xs={text}", "--weights", "wl=0-:0.25"]
    merged = load_adapter(str(run_merge(tmp_path, *options)))
    xs, wl = (new_adapter(seed=seed) for seed in (0, 1))
    for ours, first, second in zip(merged.modules(), xs.modules(), wl.modules(), strict=True):
        assert ours.layer is not None
        dense = weights[ours.layer] * first.delta() + 0.25 * second.delta()
        np.testing.assert_allclose(ours.delta(), dense, rtol=0, atol=2e-5)
    settings = merged.header["history"][-1]["settings"]
    assert settings["weights"] == [1.0, 1.0]
    assert parse_runs(settings["weights_by_layer"]["xs"]) == parse_runs(text)


@pytest.mark.parametrize("method", METHODS)
def test_one_weight_for_all_layers_is_that_of_a_list(method: str, tmp_path: Path) -> None:
    by_layer = ["--weights", "xs=0-:0.5", "--weights", "wl=0-1:2,2-:2"]
    merges = [
        load_adapter(str(run_merge(tmp_path, "--method", method, *options)))
        for options in (by_layer, ["--weights", "0.5,2"])
    ]
    first, second = ({key: t.array().tobytes() for key, t in m.tensors.items()} for m in merges)
    assert first == second


def test_a_file_of_weights_merges_as_the_option_does(tmp_path: Path) -> None:
    file = tmp_path / "weights.jsonl"
    file.write_text('{"adapter": "wl", "layers": "0-2", "weight": [1, 0]}\n')
    by_file = run_merge(tmp_path, "--method", "cat", "--weights-by-layer", str(file)).read_bytes()
    by_option = run_merge(tmp_path, "--method", "cat", "--weights", "wl=0-2:1..0").read_bytes()
    assert by_file == by_option


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "1,2", "--weights", "xs=0:1"], "once"),
        (["--weights", "1,2", "--weights", "2,1"], "once"),
        (["--weights", "xs=0:1", "--weights", "xs=1:1"], "names an adapter twice"),
        (["--weights", "1"], "has 1 for 2 adapters"),
        (["--weights", "xs=5-4:1"], "runs backwards"),
        (["--weights", "xz=0:1"], "the adapters are xs, wl"),
        (["--weights-by-layer", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_weights_that_do_not_go_together_are_refused(
    options: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(Exception, match=message):
        run_merge(tmp_path, "--method", "cat", *options)
