"""What commands that run a model do first: load the base, and set up a training run's reporter.

This file imports torch, so commands import it when they run, not before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.base_model import base_revision, check_fingerprint, choose_model
from lorakit.commands._options import check_resume
from lorakit.commands._progress import TerminalReporter
from lorakit.files import check_adapter_output
from lorakit.models.base import Base
from lorakit.models.devices import (
    keep_freed_memory,
    pick_device,
    pick_dtype,
    plan_device,
    plan_dtype,
)
from lorakit.models.estimate import QUANTISED
from lorakit.models.loading import load_base
from lorakit.models.sharing import new_accelerator
from lorakit.models.skeleton import Skeleton, load_skeleton
from lorakit.runs.processes import is_first_process
from lorakit.runs.sole_writer import refuse_second_writer
from lorakit.settings import ModelSettings, RunSettings


def open_base(
    model: ModelSettings,
    adapters: Sequence[Adapter],
    device: str,
    dtype: str,
    note: Callable[[str], None],
    *,
    training: bool,
) -> Base:
    """Load the base model that the settings, or the adapters, name."""
    name, revision = named_base(model, adapters, note)
    torch_device = pick_device(device)
    if torch_device.type == "cpu":
        keep_freed_memory()
    if model.shard:
        new_accelerator(torch_device.type)  # opens torch's process group
    base = load_base(
        name,
        device=torch_device,
        dtype=pick_dtype(dtype, torch_device, training=training),
        revision=revision,
        trust_remote_code=model.trust_remote_code,
        load_in=model.load_in,
        shard=model.shard,
    )
    warn_of_another_base(adapters, base, note)
    return base


def open_skeleton(
    model: ModelSettings,
    adapters: Sequence[Adapter],
    device: str,
    dtype: str,
    note: Callable[[str], None],
    *,
    training: bool,
) -> Skeleton:
    """Open the base that `open_base` would load, without its weights, for a device here or not."""
    name, revision = named_base(model, adapters, note)
    planned = plan_device(device)
    base = load_skeleton(
        name,
        dtype=plan_dtype(dtype, planned, training=training),
        revision=revision,
        trust_remote_code=model.trust_remote_code,
    )
    warn_of_another_base(adapters, base, note)
    return Skeleton(base, planned, QUANTISED.get(model.load_in or ""))


def named_base(
    model: ModelSettings, adapters: Sequence[Adapter], note: Callable[[str], None]
) -> tuple[str, str | None]:
    """Return name and revision of the base that the settings, or the adapters, name."""
    name, remark = choose_model(model.model, adapters)
    if remark:
        note(remark)
    return name, model.revision or base_revision(adapters, name)


def warn_of_another_base(
    adapters: Sequence[Adapter], base: Base, note: Callable[[str], None]
) -> None:
    """Note where the base is not the one that the adapters were trained on."""
    if warning := check_fingerprint(adapters, base.name, base.fingerprint):
        note(warning)


@contextlib.contextmanager
def reporting(run: RunSettings, output: str) -> Iterator[TerminalReporter]:
    """Yield the reporter of a training run and, at its end, say where the adapter was written.

    Of several processes only the first reports. Raises LorakitError or a usage error before the
    run where `output` cannot be written or resumed.
    """
    check_resume(run.resume, output)
    check_adapter_output(output)
    refuse_second_writer(output, writes=is_first_process())
    with TerminalReporter(
        quiet=run.quiet, log=run.log, append=run.resume, track=run.track, output=output
    ) as reporter:
        yield reporter
        reporter.note(f"wrote {output}")
