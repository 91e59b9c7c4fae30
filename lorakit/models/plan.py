"""What a dry run says of the model: parameters, memory by part, and all of `generate`.

Rows are lines of the output, each of a section; the
commands lay them out (commands/_dry_run.py). The plans of training, merges and the boundary are in
training/plan.py, merging/plan.py and boundary/plan.py; formulae are in estimate.py.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from lorakit.adapters.adapter import Adapter
from lorakit.errors import LorakitError
from lorakit.models.base import Base
from lorakit.models.devices import device_name, is_here
from lorakit.models.estimate import (
    Part,
    Pass,
    cache_bytes,
    count_parameters,
    forward_bytes,
    padded_pass,
    trained_parts,
)
from lorakit.models.generation import complete_prompts, window_size
from lorakit.models.lengths import Row, cut_row, length_row, read_lengths
from lorakit.models.lora import check_fits
from lorakit.models.memory import in_batches
from lorakit.models.predictions import encoder_of
from lorakit.models.skeleton import Skeleton
from lorakit.models.tokens import Encoder, Example
from lorakit.models.whole import attached, check_whole_fits
from lorakit.records.few_shot import NO_EXAMPLES, FewShot
from lorakit.records.jsonl import read_records
from lorakit.records.record import Record
from lorakit.settings import GenerationSettings

# — rows that all plans share —


def parameter_row(skeleton: Skeleton, trained: int, attached: int | None = None) -> Row:
    """Return the line on parameters: those trained, and all; `attached` with LoRA not trained."""
    total = count_parameters(skeleton.base.model) + (trained if attached is None else attached)
    return {
        "section": "parameters",
        "trainable": trained,
        "total": total,
        "share": round(trained / total, 6),
    }


def memory_rows(
    skeleton: Skeleton, lasting: Sequence[Part], *phases: Sequence[Part]
) -> Iterator[Row]:
    """Yield a line for each part, and the peak: what lasts, and the phase that takes the most."""
    for part in (*lasting, *(part for phase in phases for part in phase)):
        yield {
            "section": "memory",
            "of": part.name,
            "bytes": part.bytes,
            "remark": part.remark,
        }
    peak = max((sum(part.bytes for part in phase) for phase in phases), default=0)
    yield {
        "section": "memory",
        "of": "peak",
        "bytes": sum(part.bytes for part in lasting) + peak,
        "remark": f"on {skeleton.device.type}, an estimate; an allocator's slack comes on top",
    }
    if skeleton.device.type == "cuda" and is_here(skeleton.device):
        yield {
            "section": "memory",
            "of": "device",
            "bytes": torch.cuda.get_device_properties(skeleton.device).total_memory,
            "remark": f"what {device_name(skeleton.device)} has",
        }


def time_row(what: str, seconds: float, remark: str) -> Row:
    """Return a line on how long something takes."""
    return {"section": "time", "of": what, "seconds": float(f"{seconds:.3g}"), "remark": remark}


def generation_parts(
    skeleton: Skeleton, batch: Sequence[int], new: int, *, cache: int | None = None
) -> list[Part]:
    """Return what decoding a batch takes: prompts of these lengths, and so many new tokens.

    `cache` sets the positions stored a row: without it one for every token but the last, which is
    never read, and one for padding.
    """
    longest, rows = max(batch), len(batch)
    positions = longest + new if cache is None else cache
    size = padded_pass(batch, rows)
    working = forward_bytes(skeleton.decoder, skeleton.precision, size)
    stored = cache_bytes(skeleton.decoder, skeleton.precision, rows, positions)
    return [
        Part("cache", stored, f"keys and values of {rows} rows of {positions} positions"),
        Part("reading prompts", working, f"{rows} prompts of up to {longest} tokens, no gradients"),
    ]


def reading_part(skeleton: Skeleton, size: Pass) -> Part:
    """Return what a batch takes that is read without gradients."""
    taken = forward_bytes(skeleton.decoder, skeleton.precision, size)
    return Part("reading", taken, f"{size.positions} positions, no gradients")


def adapter_parts(adapters: Sequence[Adapter]) -> list[Part]:
    """Return what the largest of the adapters takes, of which one is on the base at a time."""
    sizes = [lora_size(adapter) for adapter in adapters]
    return trained_parts(max(sizes), gradients=False) if sizes else []


def lora_size(adapter: Adapter) -> int:
    """Return the number of an adapter's parameters, whole weights among them."""
    whole = sum(math.prod(tensor.shape) for tensor in adapter.whole.values())
    return whole + sum(module.rank * sum(module.shape) for module in adapter.modules())


# — generate —


def plan_generation(
    skeleton: Skeleton,
    adapters: Sequence[Adapter],
    data: str,
    *,
    settings: GenerationSettings,
    few_shot: FewShot = NO_EXAMPLES,
    load: Callable[[], Base] | None = None,
) -> Iterator[Row]:
    """Yield what `generate` would do: a line each; with `load` also the time.

    Of several adapters the first says how prompts are encoded. Raises LorakitError, after the lines
    on lengths, as `write_predictions` does.
    """
    new = settings.max_new_tokens
    encoder = encoder_of(skeleton.base, adapters[0] if adapters else None, settings)
    for adapter in adapters:
        check_fits(skeleton.base, adapter)
        check_whole_fits(skeleton.base, adapter)

    def encode(encoder: Encoder, record: Record) -> Example:
        return encoder.prompt(record, new, few_shot.before(record))

    records, measures = read_records(data, "prompt"), load is not None
    reading = read_lengths(records, encoder, encode, room=new, keep=measures)
    yield length_row("prompts", [length.total for length in reading.whole])
    yield cut_row(reading)
    reading.check()
    if not reading.fitted:
        raise LorakitError(f"{data} holds no records; check what wrote it")
    batches = generation_batches([length.total for length in reading.fitted], settings)
    times = max(1, len(adapters))
    yield {
        "section": "work",
        "records": len(reading.fitted),
        "outputs": len(reading.fitted) * settings.samples * times,
        "batches": len(batches) * times,
        "most_new_tokens": sum(map(len, batches)) * new * times,
    }
    yield parameter_row(skeleton, 0, sum(map(lora_size, adapters[:1])))
    largest = max(batches, key=lambda batch: len(batch) * (batch[0] + new))
    yield from memory_rows(
        skeleton,
        [skeleton.base_part(), *adapter_parts(adapters)],
        generation_parts(skeleton, largest, new),
    )
    if load is not None:
        loaded = load()
        prompts = [example.ids for example in reading.examples]
        middle = middle_batch(prompts, settings.batch_size)
        with attached(loaded, adapters[0]) if adapters else contextlib.nullcontext():
            seconds = seconds_of_batch(loaded, middle, settings)
        yield from batch_time_rows(loaded, seconds, len(batches) * times, "")


def generation_batches(lengths: Sequence[int], settings: GenerationSettings) -> list[Sequence[int]]:
    """Return the lengths of the batches of `generate`: in each window of records, longest first."""
    batches: list[Sequence[int]] = []
    for window in in_batches(lengths, window_size(settings)):
        rows = sorted(list(window) * settings.samples, reverse=True)
        batches += in_batches(rows, settings.batch_size)
    return batches


def middle_batch(prompts: Sequence[Sequence[int]], rows: int) -> Sequence[Sequence[int]]:
    """Return a batch of prompts of middling length."""
    batches = in_batches(sorted(prompts, key=len), rows)
    return batches[(len(batches) - 1) // 2]


def seconds_of_batch(
    base: Base, prompts: Sequence[Sequence[int]], settings: GenerationSettings
) -> float:
    """Return how long one batch takes, after a first token that warms up."""
    complete_prompts(base, prompts, replace(settings, max_new_tokens=1), at_once=len(prompts))
    return timed(lambda: complete_prompts(base, prompts, settings, at_once=len(prompts)))


def timed(work: Callable[[], object]) -> float:
    """Return how many seconds some work takes whose result is read back from the device."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def batch_time_rows(base: Base, seconds: float, batches: int, more: str) -> Iterator[Row]:
    """Yield how long a batch took, and how long so many would."""
    yield time_row("batch", seconds, f"measured on {device_name(base.device)}: one batch")
    yield time_row("run", seconds * batches, f"extrapolated to {batches} batches{more}")
