"""What commands that run a model do first: load the base, and set up a training run's reporter.

This file imports torch, so commands import it when they run, not before.
"""

from __future__ import annotations

import lorakit.models.libraries  # noqa: F401  imports them quickly, and so comes first

# isort: split
import contextlib
from collections.abc import Callable, Iterator, Sequence

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.base_model import base_revision, check_fingerprint, choose_model
from lorakit.adapters.serving import serving_note
from lorakit.adapters.whole import check_plain_or_embeddings
from lorakit.commands._options import check_resume
from lorakit.commands._progress import TerminalReporter
from lorakit.export.model_folder import ModelFolder, open_model_folder
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
from lorakit.models.whole import without_copies
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


def open_base_and_adapters(
    model: ModelSettings,
    adapters: Sequence[Adapter],
    device: str,
    dtype: str,
    note: Callable[[str], None],
    *,
    training: bool,
) -> tuple[Base, list[Adapter]]:
    """Load the adapters' base; return it and them, without the copies of its embeddings.

    Raises LorakitError for adapters that hold more than A and B besides.
    """
    for adapter in adapters:
        check_plain_or_embeddings(adapter)
    base = open_base(model, adapters, device, dtype, note, training=training)
    return base, [without_copies(base, adapter, note) for adapter in adapters]


def open_folder(
    model: ModelSettings, adapters: Sequence[Adapter], note: Callable[[str], None]
) -> ModelFolder:
    """Return the folder of the base model that the settings, or the adapters, name."""
    name, revision = named_base(model, adapters, note)
    folder = open_model_folder(ModelSettings(name, revision, model.trust_remote_code), name)
    warn_of_another_base(adapters, folder.as_base, note)
    return folder


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
def reporting(
    run: RunSettings, output: str, *, portable: bool = False
) -> Iterator[TerminalReporter]:
    """Yield the reporter of a training run and, at its end, say where the adapter was written.

    Of a `portable` one it also says how vLLM serves it. Of several processes only the first
    reports. Raises LorakitError or a usage error before the run where `output` cannot be written or
    resumed.
    """
    check_resume(run.resume, output)
    check_adapter_output(output)
    refuse_second_writer(output, writes=is_first_process())
    with TerminalReporter(
        quiet=run.quiet, log=run.log, append=run.resume, track=run.track, output=output
    ) as reporter:
        yield reporter
        reporter.note(f"wrote {output}")
        if portable and is_first_process() and (line := serving_note(output)):
            reporter.note(line)
