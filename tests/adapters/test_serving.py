"""Portable adapters of every kind, read by vLLM's rules; and the line that serves them."""

from __future__ import annotations

import shlex
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from lorakit.adapters.adapter import Adapter, tensors_of
from lorakit.adapters.portable import make_portable
from lorakit.adapters.serving import VLLM_RANKS, serving_note, vllm_command
from lorakit.adapters.storage import load_adapter, save_adapter
from lorakit.adapters.targets import peft_config
from lorakit.adapters.tensors import Tensor
from lorakit.boundary.strip import strip_layers
from lorakit.commands._methods import TRAINED
from lorakit.errors import LorakitError
from lorakit.merging.methods import METHODS
from lorakit.merging.static import merge_adapters
from lorakit.settings import StaticSettings
from tests.support.adapters import tiny
from tests.support.in_process import Ended, run_here
from tests.support.training_data import rows, save_rows
from tests.support.vllm_rules import RANKS, RefusedByVllmError, read_adapter


def adapter(seed: int, *, uneven: bool = False, **config: object) -> Adapter:
    """Return an adapter of two layers and three projections, with different ranks if `uneven`."""
    draw = np.random.default_rng(seed)
    ranks = {
        f"model.layers.{layer}.{part}": 3 + (uneven and layer)
        for layer in range(2)
        for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    }
    factors = {
        name: (
            draw.normal(size=(rank, 6)).astype(np.float32),
            draw.normal(size=(5, rank)).astype(np.float32),
        )
        for name, rank in ranks.items()
    }
    fields = {**peft_config(ranks, base=None, alpha=8), **config}
    return Adapter(tensors_of(factors), fields, {"format": 1}, f"a{seed}")


def assert_read_alike(made: Adapter, meant: Adapter, folder: Path) -> None:
    """Assert that vLLM applies the ΔW of `meant` where it reads `made`, by the line for it."""
    save_adapter(made, f"{folder}/")
    words = shlex.split(vllm_command(made, f"{folder}/"))
    rank = int(words[words.index("--max-lora-rank") + 1])
    read = read_adapter(folder, max_rank=rank)
    expected = {module.name: module.delta() for module in meant.modules()}
    assert read.keys() == expected.keys()
    for name, delta in expected.items():
        np.testing.assert_allclose(read[name], delta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_every_merge_without_data_is_read_as_it_is_meant(method: str, tmp_path: Path) -> None:
    both = [adapter(0), adapter(1)]
    settings = StaticSettings(weights=(0.75, 0.25), density=Decimal("0.5"))
    meant = merge_adapters(both, method, settings=settings)
    assert_read_alike(
        merge_adapters(both, method, settings=settings, portable=True), meant, tmp_path / "x"
    )


@pytest.mark.parametrize(
    "meant",
    [
        adapter(0),
        adapter(0, uneven=True),
        adapter(0, use_rslora=True),
        adapter(0, alpha_pattern={"q_proj": 3}),
        adapter(0, uneven=True, use_rslora=True, alpha_pattern={r".*\.0\..*": 5}),
        adapter(0, init_lora_weights="gaussian", lora_dropout=0.5),
        strip_layers(adapter(0, uneven=True), boundary=1),
        strip_layers(make_portable(adapter(0, uneven=True)), boundary=1),
    ],
    ids=["plain", "ranks", "rslora", "alphas", "all", "init", "stripped", "portable before"],
)
def test_every_encoding_is_read_as_it_is_meant_once_it_is_portable(
    meant: Adapter, tmp_path: Path
) -> None:
    assert_read_alike(make_portable(meant), meant, tmp_path / "x")


def test_a_pruned_adapter_stays_as_sparse_as_it_was(tmp_path: Path) -> None:
    meant = adapter(0)
    pruned = {
        key: Tensor.exactly(np.where(np.abs(t.array()) < 0.7, 0, t.array()), t.dtype)
        for key, t in meant.tensors.items()
    }
    meant = Adapter(pruned, meant.config, meant.header, "pruned")
    made = make_portable(meant)
    assert_read_alike(made, meant, tmp_path / "x")
    for before, after in zip(meant.modules(), made.modules(), strict=True):
        np.testing.assert_array_equal(after.a == 0, before.a == 0)


@pytest.mark.parametrize(
    "other",
    [adapter(0, uneven=True), adapter(0, alpha_pattern={"q_proj": 3})],
    ids=["ranks", "alphas"],
)
def test_the_rules_tell_what_is_not_portable(other: Adapter, tmp_path: Path) -> None:
    save_adapter(other, f"{tmp_path}/")
    with pytest.raises(RefusedByVllmError, match="in one version and"):
        read_adapter(tmp_path, max_rank=8)


def test_an_adapter_with_other_tensors_is_not_made_portable() -> None:
    plain = adapter(0)
    key = "base_model.model.model.embed_tokens.weight"
    tensors = {**plain.tensors, key: Tensor.from_array(np.ones((2, 2), np.float32), "F32")}
    with pytest.raises(LorakitError, match=r"embed_tokens\.weight' whole, besides LoRA"):
        make_portable(Adapter(tensors, plain.config, {}, "x"))


def test_the_ranks_are_vllms() -> None:
    assert set(VLLM_RANKS) <= set(RANKS)


@pytest.mark.parametrize(
    ("rank", "allowed"), [(1, 8), (8, 8), (9, 16), (24, 32), (257, 320), (512, 512)]
)
def test_the_line_has_the_lowest_rank_that_is_enough(rank: int, allowed: int) -> None:
    made = make_portable(tiny(rank=rank))
    assert vllm_command(made, "out/") == (
        f"vllm serve BASE --enable-lora --max-lora-rank {allowed} --lora-modules out=out/"
    )


def test_the_line_names_base_and_revision_and_is_quoted_for_a_shell() -> None:
    base = {"name": "owner/base", "revision": "abc"}
    plain = tiny()
    made = Adapter(plain.tensors, plain.config, {"base": base}, "x")  # type: ignore[typeddict-item]
    words = shlex.split(vllm_command(made, "my runs/a=b"))
    assert words[:5] == ["vllm", "serve", "owner/base", "--revision", "abc"]
    assert words[-2:] == ["--lora-modules", "a-b=my runs/a=b"]


def test_a_rank_beyond_vllms_is_refused_by_convert_and_a_warning_of_merge(tmp_path: Path) -> None:
    path = save_adapter(tiny(rank=600), str(tmp_path / "a.safetensors"))
    done = run_here("convert", path, "--to", "vllm", "-o", str(tmp_path / "out/"))
    assert (done.code, (tmp_path / "out").exists()) == (1, False)
    (error,) = done.errors
    assert error.endswith("has rank 600, and vLLM takes 512 at most; refit it by merge --rank 512")
    note = serving_note(save_adapter(make_portable(tiny(rank=600)), str(tmp_path / "b")))
    assert note is not None
    assert note.startswith("Warning: ")


def lines(done: Ended) -> list[str]:
    assert done.code == 0, done.stderr
    return done.stderr.splitlines()


def test_convert_and_merge_say_how_vllm_serves_what_they_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_adapter(tiny(rank=4, rank_pattern={"q_proj": 4}), "a.safetensors")
    serve = "vllm serve BASE --enable-lora --max-lora-rank 8 --lora-modules out=out/"
    written = ["Note: wrote out/", f"Note: to serve it: {serve}"]
    assert lines(run_here("convert", "a.safetensors", "--to", "vllm", "-o", "out/")) == written
    merge = ("merge", "a.safetensors", "--rank", "2", "--portable", "-o")
    assert lines(run_here(*merge, "out/"))[-2:] == written
    convert = "lorakit convert b.safetensors --to vllm -o b/"
    assert lines(run_here(*merge, "b.safetensors"))[-1] == f"Note: vLLM reads folders: {convert}"
    assert not any("vllm" in line.lower() for line in run_here(*merge, "-").stderr.splitlines())
    assert read_adapter(Path("out"), max_rank=8).keys() == {
        module.name for module in load_adapter("out").modules()
    }
    done = run_here("convert", "a.safetensors", "--to", "vllm", "-o", "c.safetensors")
    assert done.errors == ["Error: vLLM reads folders, and c.safetensors is none; end -o in /"]


@pytest.mark.slow
@pytest.mark.parametrize("method", TRAINED)
def test_every_merge_that_trains_is_read_as_it_is_meant(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters of the shipped model, pruned where the method prunes."""
    monkeypatch.chdir(tmp_path)
    save_rows(tmp_path / "data.jsonl", rows(8))
    train = ("train-adapter", "--data", "data.jsonl", "--val", "data.jsonl", "--model", "tiny")
    for name in ("xs", "wl"):
        lines(run_here(*train, "--rank", "4", "--epochs", "1", "-o", f"{name}.safetensors"))
    options = ["--data", "data.jsonl", "--method", method, "--model", "tiny"]
    if method != "lorahub":
        options += ["--val", "data.jsonl", "--epochs", "1"]
    if method == "adaptive":
        options += ["--prune-ratio", "0.3"]
    merge = ("merge", "xs.safetensors", "wl.safetensors", *options)
    lines(run_here(*merge, "-o", "plain.safetensors"))
    done = lines(run_here(*merge, "--portable", "-o", "out/"))
    assert done[-1].startswith("Note: to serve it: vllm serve BASE --enable-lora")
    assert_read_alike(load_adapter("out"), load_adapter("plain.safetensors"), tmp_path / "out")
