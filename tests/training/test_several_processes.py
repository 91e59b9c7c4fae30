"""Training over several processes gives the bytes of one process, whatever their number."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from lorakit.adapters.storage import load_adapter
from lorakit.merging.adaptive import merge_adaptively
from lorakit.merging.layer_importance import MEASURES
from lorakit.merging.learned_weights import merge_with_learned_weights
from lorakit.merging.lorahub import merge_lorahub
from lorakit.models.tokens import Example, encode_all
from lorakit.records.jsonl import load_records
from lorakit.settings import LoraSettings, PruningSettings, SelectionSettings, TrainingSettings
from lorakit.training.train import train_adapter
from tests.support.models import open_base
from tests.support.teams import run_launched
from tests.support.training_data import Recorder, rows, save_rows

SETTINGS = TrainingSettings(
    lr=1e-2,
    epochs=2,
    batch_size=6,
    micro_batch_tokens=60,
    dropout=0.0,
    device="cpu",
    dtype="float32",
)
PRUNING = PruningSettings(Decimal("0.3"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_rows(tmp_path_factory.mktemp("data") / "train.jsonl", rows(20))


@pytest.fixture(scope="module")
def files(llama: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two adapters of one shape."""
    folder = tmp_path_factory.mktemp("adapters")
    names = [str(folder / f"{name}.safetensors") for name in "ab"]
    for seed, name in enumerate(names):
        train(llama, data, name, settings=replace(SETTINGS, seed=seed, epochs=1, lr=5e-2))
    return names


def train(llama: str, data: str, output: str, **changes: Any) -> Recorder:
    reporter = Recorder()
    options: dict[str, Any] = {"settings": SETTINGS, "lora": LoraSettings(rank=4), **changes}
    train_adapter(open_base(llama), data, None, output=output, reporter=reporter, **options)
    return reporter


def trained(llama: str, data: str, files: list[str], output: str) -> None:
    train(llama, data, output)


def trained_by_a_metric(llama: str, data: str, files: list[str], output: str) -> None:
    train(llama, data, output, selection=SelectionSettings("rouge1", max_new_tokens=4))


def merged(how: PruningSettings, **changes: Any) -> Callable[..., None]:
    def merge(llama: str, data: str, files: list[str], output: str) -> None:
        merge_adaptively(
            [load_adapter(file) for file in files],
            open_base(llama),
            data,
            None,
            settings=SETTINGS,
            pruning=how,
            output=output,
            reporter=Recorder(),
            **changes,
        )

    return merge


def weighted(llama: str, data: str, files: list[str], output: str) -> None:
    merge_with_learned_weights(
        [load_adapter(file) for file in files],
        open_base(llama),
        data,
        None,
        settings=SETTINGS,
        output=output,
        reporter=Recorder(),
    )


def composed(llama: str, data: str, files: list[str], output: str) -> None:
    merge_lorahub(
        [load_adapter(file) for file in files],
        open_base(llama),
        data,
        settings=SETTINGS,
        output=output,
        reporter=Recorder(),
    )


RUNS: dict[str, Callable[..., None]] = {
    "train-adapter": trained,
    "train-adapter by a metric": trained_by_a_metric,
    "merge, pruned by the input": merged(PRUNING),
    "merge, pruned by the gradient": merged(replace(PRUNING, importance="gradient")),
    "merge, calibrated": merged(replace(PRUNING, calibrate_every=2)),
    "merge by a grid": merged(PruningSettings(), values=[Decimal(0), Decimal("0.3")]),
    "learned weights": weighted,
    "LoRAHub": composed,
}


@pytest.mark.parametrize("work", RUNS.values(), ids=RUNS.keys())
def test_three_processes_write_the_bytes_of_one(
    llama: str, data: str, files: list[str], tmp_path: Path, work: Callable[..., None]
) -> None:
    outputs = {count: str(tmp_path / f"{count}.safetensors") for count in (1, 3)}
    for count, output in outputs.items():
        run_launched(count, functools.partial(work, llama, data, files, output))
    one, three = (Path(output).read_bytes() for output in outputs.values())
    assert one == three
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.safetensors", "3.safetensors"]


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("by", [*MEASURES])
def test_importances_are_those_of_one_process(
    llama: str, data: str, files: list[str], by: str, packs: bool
) -> None:
    def measure() -> dict[str, float]:
        base = open_base(llama)
        vars(base)["packs"] = packs
        return MEASURES[by](
            base, load_adapter(files[0]), examples_of(llama, data), settings=SETTINGS
        )

    (one,) = run_launched(1, measure)
    assert run_launched(3, measure) == [one] * 3


def examples_of(llama: str, data: str) -> list[Example]:
    records, _ = load_records(data, "prompt", "completion")
    return encode_all(records, open_base(llama).encoder(chat="off").example, print)


@pytest.mark.parametrize(
    ("count", "tokens", "note"),
    [
        (1, 10_000, None),
        (2, 10_000, "2 processes share batches of at most 1 micro-batch; "),
        (3, 90, "3 processes share batches of at most 2 micro-batches; "),
        (2, 60, None),
    ],
)
def test_a_note_says_where_processes_have_nothing_to_do(
    llama: str, data: str, tmp_path: Path, count: int, tokens: int, note: str | None
) -> None:
    settings = replace(SETTINGS, epochs=1, micro_batch_tokens=tokens)

    def work() -> list[str]:
        return train(llama, data, str(tmp_path / "a.safetensors"), settings=settings).notes

    for notes in run_launched(count, work):
        ours = [text for text in notes if "processes" in text]
        assert ours == [text for text in ours if note and text.startswith(note)]
        assert len(ours) == (note is not None)
