"""A `.resume` file that holds anything but this run's checkpoint is an error in one line."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorakit.adapters.safetensors import read_tensors, write_tensors
from lorakit.adapters.tensors import Tensor
from lorakit.errors import LorakitError
from lorakit.models.lora import inject, pick_modules
from lorakit.models.sharing import new_accelerator
from lorakit.settings import TrainingSettings
from lorakit.training.checkpoint import Checkpoint
from lorakit.training.trainer import Trainer
from tests.support.models import open_base

Change = Callable[[dict[str, Tensor], dict[str, Any]], None]


def new_trainer(llama: str) -> Trainer:
    base = open_base(llama)
    layers = inject(base, dict.fromkeys(pick_modules(base, ["q_proj"], None), 2), alpha=4)
    settings = replace(TrainingSettings(), device="cpu", dtype="float32")
    return Trainer(base, layers, settings, accelerator=new_accelerator("cpu"))


def saved(llama: str, path: Path) -> Checkpoint:
    """Save the checkpoint of a trainer after one step."""
    trainer = new_trainer(llama)
    for parameter in trainer.parameters:
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    trainer.progress.step = 1
    checkpoint = Checkpoint(path, "key")
    checkpoint.save(trainer)
    return checkpoint


def bomb() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", b"\0" * (1 << 24))
    return content.getvalue()


FILES = {
    "empty": b"",
    "zip bomb": bomb(),
    "gzip": gzip.compress(b"\0" * (1 << 20)),
    "pickle": pickle.dumps({"a": 1}),
    "random": np.random.default_rng(0).bytes(4096),
    "not UTF-8": b"\xff\xfe" * 100,
    "JSON": b'{"a": 1}\n',
    "a header not of UTF-8": (4).to_bytes(8, "little") + b'{"\xff}',
    "nested": (1 << 16).to_bytes(8, "little") + b'{"a":' + b"[" * ((1 << 16) - 5),
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES.keys())
def test_a_file_of_anything_else_is_no_checkpoint(
    llama: str, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "a.safetensors.resume"
    path.write_bytes(content)
    with pytest.raises(LorakitError, match=r"a.safetensors.resume is not what training wrote; run"):
        Checkpoint(path, "key").restore_(new_trainer(llama))
    assert path.read_bytes() == content


def without(kind: str) -> Change:
    def change(tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        del tensors[next(name for name in tensors if name.startswith(f"{kind}."))]

    return change


def one_number(kind: str) -> Change:
    """A tensor of one number, which torch would spread over the whole parameter."""

    def change(tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        name = next(name for name in tensors if name.startswith(f"{kind}."))
        tensors[name] = Tensor.from_array(np.zeros(1, np.float32))

    return change


def with_progress(**fields: object) -> Change:
    return lambda tensors, progress: progress.update(fields)


CHANGES: dict[str, Change] = {
    "no weight": without("weight"),
    "no best": without("best"),
    "no moment": without("exp_avg"),
    "a small weight": one_number("weight"),
    "a small best": one_number("best"),
    "a small moment": one_number("exp_avg_sq"),
    "progress of a later version": with_progress(colour="red"),
    "an epoch that is no number": with_progress(epoch="1"),
    "a step of half": with_progress(step=0.5),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_checkpoint_that_was_changed_is_none(llama: str, tmp_path: Path, change: Change) -> None:
    path = tmp_path / "a.resume"
    checkpoint = saved(llama, path)
    assert checkpoint.restore_(new_trainer(llama))
    mapped, metadata = read_tensors(path.read_bytes(), "a")
    tensors, progress = dict(mapped), json.loads(metadata["progress"])
    change(tensors, progress)
    with open(path, "wb") as stream:
        write_tensors(tensors, {"key": "key", "progress": json.dumps(progress)}, stream)
    with pytest.raises(LorakitError, match=r"a.resume is not what training wrote"):
        checkpoint.restore_(new_trainer(llama))


def test_a_checkpoint_of_another_run_says_so(llama: str, tmp_path: Path) -> None:
    saved(llama, tmp_path / "a.resume")
    with pytest.raises(LorakitError, match="is of a run with other settings, data or adapters"):
        Checkpoint(tmp_path / "a.resume", "another").restore_(new_trainer(llama))
