"""What the model commands do first: find and load the base, and watch the run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import click

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.base_model import base_revision, check_fingerprint, choose_model
from lorakit.commands._progress import TrainingProgress
from lorakit.files import STDIO, check_adapter_output
from lorakit.models.base import Base, load_base
from lorakit.models.devices import keep_freed_memory, pick_device, pick_dtype


def open_base(
    given: Mapping[str, Any],
    adapters: Sequence[Adapter],
    device: str,
    dtype: str,
    note: Callable[[str], None],
    *,
    training: bool,
) -> Base:
    """Load the base model that the options, or the adapters, name."""
    name, remark = choose_model(given["model"], adapters)
    if remark:
        note(remark)
    place = pick_device(device)
    if place.type == "cpu":
        keep_freed_memory()
    base = load_base(
        name,
        device=place,
        dtype=pick_dtype(dtype, place, training=training),
        revision=given["revision"] or base_revision(adapters, name),
        trust_remote_code=given["trust_remote_code"],
    )
    if warning := check_fingerprint(adapters, name, base.fingerprint):
        note(warning)
    return base


@contextlib.contextmanager
def watching(given: Mapping[str, Any], output: str) -> Iterator[TrainingProgress]:
    """Yield the watcher of a training run and, when it is done, say where the adapter went."""
    if given["resume"] and output == STDIO:
        raise click.UsageError("--resume needs -o FILE: a pipe keeps nothing to go on from.")
    check_adapter_output(output)
    log, resume, quiet = given["log"], given["resume"], given["quiet"]
    with TrainingProgress(log=log, append=resume, quiet=quiet) as watcher:
        yield watcher
        watcher.note(f"wrote {output}")
