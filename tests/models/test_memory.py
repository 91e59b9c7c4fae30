"""A device with too little memory: batches are halved, results stay, a note says so."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.adapters.storage import load_adapter
from lorakit.boundary import evaluate as evaluation
from lorakit.boundary.evaluate import evaluate
from lorakit.boundary.loss import evaluate_loss
from lorakit.boundary.probability import read_probabilities
from lorakit.errors import LorakitError
from lorakit.merging.importance import importance_on
from lorakit.merging.output_norms import mean_outputs
from lorakit.models.base import Base
from lorakit.models.generation import generate
from lorakit.models.memory import BatchSize
from lorakit.records.record import Record
from lorakit.settings import BoundarySettings, GenerationSettings, TrainingSettings
from tests.support.in_process import run_here
from tests.support.models import open_base
from tests.support.training_data import Recorder, rows, save_rows
from tests.test_pipes import llama_adapter

GENERATION = GenerationSettings(max_new_tokens=5, batch_size=8, dtype="float32", device="cpu")
Work = Callable[[Base, Any, str, Recorder], object]


@contextlib.contextmanager
def scarce_memory(base: Base, tokens: int) -> Iterator[None]:
    """Let passes of more than so many tokens, with padding, run out of memory in the last layer."""

    def check(module: torch.nn.Module, args: Sequence[Any], options: Mapping[str, Any]) -> None:
        state = args[0] if args else options["hidden_states"]
        if state.shape[0] * state.shape[1] > tokens:
            raise torch.OutOfMemoryError("no memory")

    hook = base.model.model.layers[-1].register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def generated(base: Base, adapter: Any, data: str, reporter: Recorder) -> object:
    sample = [Record(row, "a row") for row in rows(20)]
    outputs = generate(base, base.encoder(chat="off"), sample, GENERATION, note=reporter.note)
    return [dict(record.fields) for record, _ in outputs]


def searched(base: Base, adapter: Any, data: str, reporter: Recorder) -> object:
    settings = BoundarySettings()
    sweep = evaluate(
        base, adapter, data, settings=settings, generation=GENERATION, reporter=reporter
    )
    return list(sweep.as_records())


def searched_alone(base: Base, adapter: Any, data: str, reporter: Recorder) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "can_pool", lambda *_: False)
        return searched(base, adapter, data, reporter)


def searched_by_loss(base: Base, adapter: Any, data: str, reporter: Recorder) -> object:
    settings = BoundarySettings(metric="loss")
    sweep = evaluate_loss(
        base, adapter, data, settings=settings, generation=GENERATION, reporter=reporter
    )
    return [row["score"] for row in sweep.as_records()]


def searched_by_probability(base: Base, adapter: Any, data: str, reporter: Recorder) -> object:
    settings = BoundarySettings(by="probability", compare=(1,))
    found = read_probabilities(
        base, adapter, data, settings=settings, generation=GENERATION, reporter=reporter
    )
    return [row["score"] for row in found]


def importance(base: Base, adapter: Any, data: str, reporter: Recorder) -> object:
    settings = TrainingSettings(micro_batch_tokens=2048)
    examples = [base.encoder(chat="off").example(Record(row, "a row")) for row in rows(20)]
    found = importance_on(base, adapter, examples, settings=settings)
    return [module["importance"] for module in found]


def outputs(base: Base, adapter: Any, data: str, reporter: Recorder) -> object:
    settings = TrainingSettings(micro_batch_tokens=2048)
    examples = [base.encoder(chat="off").example(Record(row, "a row")) for row in rows(20)]
    return list(mean_outputs(base, adapter, examples, settings=settings).values())


WORKS: list[tuple[Work, int]] = [  # with the tokens for which memory suffices
    (generated, 120),
    (searched, 120),
    (searched_alone, 120),
    (searched_by_loss, 170),
    (searched_by_probability, 170),
    (importance, 120),
    (outputs, 120),
]


@pytest.fixture
def data(tmp_path: Path) -> str:
    return save_rows(tmp_path / "data.jsonl", rows(20))


@pytest.mark.parametrize(
    ("work", "tokens"), [pytest.param(*case, id=case[0].__name__) for case in WORKS]
)
def test_the_result_is_that_of_enough_memory(
    work: Work, tokens: int, llama: str, data: str, tmp_path: Path
) -> None:
    adapter = load_adapter(llama_adapter(tmp_path / "a.safetensors", 1))
    base, plenty, scarce = open_base(llama), Recorder(), Recorder()
    expected = work(base, adapter, data, plenty)
    with scarce_memory(base, tokens):
        result = work(base, adapter, data, scarce)
    if isinstance(expected, list) and isinstance(expected[0], float):
        assert result == pytest.approx(expected, rel=1e-5)
    else:
        assert result == expected
    if work not in (importance, outputs):  # which have nobody to tell
        added = [note for note in scarce.notes if note not in plenty.notes]
        assert added[0] == "out of memory: batches of at most 4 records from here on"
        assert all(note.startswith("out of memory: ") for note in added)


@pytest.mark.parametrize("work", [work for work, _ in WORKS], ids=lambda work: work.__name__)
def test_too_little_for_a_single_record_is_an_error(
    work: Work, llama: str, data: str, tmp_path: Path
) -> None:
    adapter = load_adapter(llama_adapter(tmp_path / "a.safetensors", 1))
    base = open_base(llama)
    assert base.packs
    with scarce_memory(base, 0), pytest.raises(LorakitError, match="memory does not suffice"):
        work(base, adapter, data, Recorder())


def test_batches_stay_small_once_they_were_too_much() -> None:
    tried: list[list[int]] = []

    def compute(batch: Sequence[int]) -> int:
        tried.append(list(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError
        return sum(batch)

    size = BatchSize(5, lambda text: None)
    assert list(size.over([1, 2, 3, 4], compute)) == [3, 7]
    assert list(size.over([5, 6, 7], compute)) == [11, 7]
    assert tried == [[1, 2, 3, 4], [1, 2], [3, 4], [5, 6], [7]]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_memory_that_runs_out_anywhere_else_is_one_line(
    error: type[Exception], data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error("no memory")

    monkeypatch.setattr("lorakit.records.jsonl.write_records", fail)
    ended = run_here("score", save_rows(Path(data), [{"prediction": "a", "completion": "a"}]))
    assert ended.code == 1
    assert ended.errors == [
        "Error: memory does not suffice; give less data, or options that need less"
    ]
