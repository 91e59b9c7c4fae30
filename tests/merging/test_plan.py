"""What a dry run says of pruning against what the hooks of a merge hold."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

from lorakit.adapters.storage import load_adapter
from lorakit.merging.joint import prepare
from lorakit.merging.plan import pruning_part
from lorakit.merging.stack import stack
from lorakit.models.estimate import lora_parameters
from lorakit.models.lora import projections
from lorakit.settings import PruningSettings, SelectionSettings, TrainingSettings
from tests.support.models import open_base
from tests.support.training_data import Recorder, rows, save_rows
from tests.test_pipes import llama_adapter

_TRANSIENT = (
    5  # bytes a parameter: a score in float32, and the mask of a step; the last one is held
)


@pytest.mark.parametrize(
    "pruning",
    [
        PruningSettings(Decimal("0.1")),
        PruningSettings(Decimal("0.1"), importance="gradient"),
        PruningSettings(Decimal("0.1"), importance="magnitude"),
    ],
    ids=lambda pruning: pruning.importance,
)
def test_pruning_takes_what_its_hooks_hold(
    pruning: PruningSettings, llama: str, tmp_path: Path
) -> None:
    merge = prepare(
        [load_adapter(llama_adapter(tmp_path / f"{n}.safetensors", n)) for n in range(2)],
        open_base(llama),
        save_rows(tmp_path / "train.jsonl", rows(4)),
        save_rows(tmp_path / "val.jsonl", rows(2)),
        settings=TrainingSettings(epochs=1, device="cpu", dtype="float32"),
        selection=SelectionSettings(),
        reporter=Recorder(),
    )
    trainer = merge.trainer(pruning)
    for _ in trainer.train(merge.corpus.train, merge.corpus.validation, Recorder()):
        pass
    held = sum(
        tensor.nbytes
        for state in trainer.hook_states().values()
        for tensor in state.values()
        if tensor.numel() > 1  # not a count
    )
    size = lora_parameters(merge.stacked.ranks, projections(merge.base.model))
    assert pruning_part(merge.stacked, size, pruning).bytes == _TRANSIENT * size + held


def test_resetting_to_the_start_takes_a_copy_of_the_parameters(tmp_path: Path) -> None:
    stacked = stack([load_adapter(llama_adapter(tmp_path / "a.safetensors", 0))])
    to_zero = pruning_part(stacked, 100, PruningSettings())
    to_start = pruning_part(stacked, 100, PruningSettings(prune_value="init"))
    assert to_start.bytes - to_zero.bytes == 400
