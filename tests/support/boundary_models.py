"""Random adapters, whole or stripped at a boundary, and what the model writes with one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from lorakit.adapters.adapter import Adapter, tensors_of
from lorakit.adapters.names import layer_of
from lorakit.adapters.targets import peft_config
from lorakit.models.base import Base
from lorakit.models.completions import text_of
from lorakit.models.generation import complete
from lorakit.models.lora import attach, default_targets, is_transposed, pick_modules, projections
from lorakit.models.memory import in_batches
from lorakit.records.record import Record
from lorakit.reporting import Silent
from lorakit.settings import GenerationSettings

T = TypeVar("T")
SETTINGS = GenerationSettings(max_new_tokens=12, device="cpu", dtype="float32")


class Notes(Silent):
    """A reporter that keeps its notes and checks announced totals."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def timed(self, items: Iterable[T], what: str, total: int) -> Iterator[T]:
        all_items = list(items)
        assert len(all_items) == total
        yield from all_items


def random_adapter(
    base: Base,
    *,
    seed: int = 0,
    size: float = 1.0,
    layers: Sequence[int] | None = None,
    targets: Sequence[str] | None = None,
    below: int | None = None,
) -> Any:
    """Return an adapter of random weights.

    With `below`, return it as stripped at that boundary, None where nothing is left.
    """
    draw = np.random.default_rng(seed)
    shapes = projections(base.model)
    factors = {}
    for name in pick_modules(base, targets or default_targets(base)[0], layers):
        d_out, d_in = shapes[name]
        a = draw.normal(size=(4, d_in)).astype(np.float32) * np.float32(size / d_in**0.5)
        b = draw.normal(size=(d_out, 4)).astype(np.float32) * np.float32(size)
        if below is None or (layer_of(name) or 0) < below:
            factors[name] = (a, b)
    if not factors:
        return None
    config = peft_config(
        dict.fromkeys(factors, 4),
        base=base.name,
        alpha=4,
        transposed=is_transposed(base, list(factors)),
    )
    return Adapter(tensors_of(factors), config)


def alone(
    base: Base,
    adapter: Adapter | None,
    records: Sequence[Record],
    settings: GenerationSettings,
) -> list[str]:
    """Return what transformers' own loop writes with this adapter, or with the base alone."""
    if adapter is not None:
        attach(base, adapter)
    encoder = base.encoder(chat="off")
    prompts = [encoder.prompt(record, settings.max_new_tokens).ids for record in records]
    batches = in_batches(prompts, settings.batch_size)
    return [text_of(base, ids) for batch in batches for ids in complete(base, batch, settings)]
