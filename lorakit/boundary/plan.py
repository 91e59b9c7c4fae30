"""What a dry run says of `find-boundary`: the outputs to decode, or passes to read, and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.names import layer_of
from lorakit.boundary.choice import check_rule
from lorakit.boundary.cuts import cut_at, layer_order, pick_boundaries, search_points
from lorakit.boundary.decode import FANNED, fans_that_hold
from lorakit.boundary.evaluate import draw_sample
from lorakit.boundary.loss import TOKENS_PER_ROW
from lorakit.boundary.strip import check_layers_are_named
from lorakit.models.base import Base
from lorakit.models.batches import completion_logits, lay_out, micro_batches
from lorakit.models.devices import device_name
from lorakit.models.estimate import Part, cache_bytes, training_pass
from lorakit.models.guesses import GUESSED
from lorakit.models.lengths import Row, cut_row, length_row, read_lengths
from lorakit.models.lora import attach, check_fits
from lorakit.models.memory import in_batches
from lorakit.models.plan import (
    adapter_parts,
    batch_time_rows,
    generation_parts,
    lora_size,
    memory_rows,
    middle_batch,
    parameter_row,
    reading_part,
    seconds_of_batch,
    time_row,
    timed,
)
from lorakit.models.predictions import encoder_of
from lorakit.models.prefixes import shared_prefix
from lorakit.models.skeleton import Skeleton
from lorakit.models.tokens import Example
from lorakit.settings import LOSS, BoundarySettings, GenerationSettings


def plan_boundary(
    skeleton: Skeleton,
    adapter: Adapter,
    data: str,
    *,
    settings: BoundarySettings,
    generation: GenerationSettings,
    load: Callable[[], Base] | None = None,
) -> Iterator[Row]:
    """Yield what `find-boundary` would do: a line each; with `load` also the time.

    The time is an upper bound: boundaries share work, how much depends on the outputs. Raises
    LorakitError as the search does, for records that are too long after the lines on their lengths.
    """
    check_layers_are_named(adapter)
    decodes = settings.by == "evaluation" and settings.metric != LOSS
    plan = _plan_decoding if decodes else _plan_reading
    yield from plan(skeleton, adapter, data, settings, generation, load)


def _plan_decoding(
    skeleton: Skeleton,
    adapter: Adapter,
    data: str,
    settings: BoundarySettings,
    generation: GenerationSettings,
    load: Callable[[], Base] | None,
) -> Iterator[Row]:
    """Yield the lines of a search that decodes."""
    points = search_points(settings, skeleton.base.layers)
    new, rows = generation.max_new_tokens, generation.batch_size
    records = draw_sample(data, "prompt", sample=settings.sample, seed=generation.seed)
    check_rule(settings.rule, len(records))
    encoder = encoder_of(skeleton.base, adapter, generation)
    reading = read_lengths(
        records, encoder, lambda encoder, record: encoder.prompt(record, new), room=new
    )
    yield length_row("prompts", [length.total for length in reading.whole])
    yield cut_row(reading)
    reading.check()
    check_fits(skeleton.base, adapter)
    prompts = sorted(reading.examples, key=lambda example: -len(example.ids))
    yield {
        "section": "work",
        "records": len(prompts),
        "boundaries": len(points),
        "outputs": len(prompts) * len(points),
        "most_new_tokens": len(prompts) * len(points) * new,
    }
    yield parameter_row(skeleton, 0, lora_size(adapter))
    longest = len(prompts[0].ids)
    batch = [len(prompt.ids) for prompt in prompts[:rows]]
    cache, read = generation_parts(
        skeleton, batch + [longest] * (rows - len(batch)), new, cache=longest + new + 1
    )
    prefixes = _prefix_part(skeleton, adapter, prompts, settings, generation)
    yield from memory_rows(
        skeleton,
        [skeleton.base_part(), *adapter_parts([adapter]), cache, *prefixes],
        [read],
        [_verified_part(skeleton, rows, new)],
    )
    if load is not None:
        loaded = load()
        attach(loaded, adapter)
        batches = -(-len(prompts) // rows)
        middle = middle_batch([prompt.ids for prompt in prompts], rows)
        seconds = seconds_of_batch(loaded, middle, generation)
        more = " at most: what boundaries share is computed once"
        yield from batch_time_rows(loaded, seconds, batches * len(points), more)


def _prefix_part(
    skeleton: Skeleton,
    adapter: Adapter,
    prompts: Sequence[Example],
    settings: BoundarySettings,
    generation: GenerationSettings,
) -> list[Part]:
    """Return what the keys take of what all prompts begin with: no more than those of the batch."""
    ids = [prompt.ids for prompt in prompts]
    shared, length = len(shared_prefix(ids)), max(map(len, ids)) + generation.max_new_tokens
    if not shared:
        return []
    layers, adapted = skeleton.base.layers, {layer_of(module.name) for module in adapter.modules()}
    order = layer_order(settings.keep, layers, generation.seed)
    cuts = {cut_at(point, order).on(adapted) for point in search_points(settings, layers)}
    rows = sum(fans_that_hold(cuts, generation.batch_size, shared / length).values())
    taken = cache_bytes(skeleton.decoder, skeleton.precision, rows, shared) // layers
    return [Part("prefixes", taken, f"what all prompts begin with: {shared} tokens")]


def _verified_part(skeleton: Skeleton, rows: int, new: int) -> Part:
    """Return what the logits take where guesses, or a draft at several boundaries, are verified."""
    count = max(rows * (GUESSED + 1), FANNED * (new + 1))
    value = skeleton.precision.value + 4
    taken = count * skeleton.decoder.vocabulary * value
    return Part("logits", taken, f"{count} rows of {skeleton.decoder.vocabulary}, also in float32")


def _plan_reading(
    skeleton: Skeleton,
    adapter: Adapter,
    data: str,
    settings: BoundarySettings,
    generation: GenerationSettings,
    load: Callable[[], Base] | None,
) -> Iterator[Row]:
    """Yield the lines of a search that reads the completions, by loss or by probability."""
    by_loss, layers = settings.by == "evaluation", skeleton.base.layers
    points = (
        len(search_points(settings, layers))
        if by_loss
        else len(pick_boundaries(settings.boundaries, layers))
    )
    compared = [] if by_loss or not settings.compare else pick_boundaries(settings.compare, layers)
    records = draw_sample(
        data, "prompt", "completion", sample=settings.sample, seed=generation.seed
    )
    if by_loss:
        check_rule(settings.rule, len(records))
    reading = read_lengths(records, encoder_of(skeleton.base, adapter, generation))
    yield length_row("prompts", [length.prompt for length in reading.whole])
    yield length_row("completions", [length.completion for length in reading.whole])
    yield cut_row(reading)
    reading.check()
    check_fits(skeleton.base, adapter)
    batches = _batches(reading.examples, generation, by_loss=by_loss)
    passes = points if by_loss else 1 + len(compared)
    yield {
        "section": "work",
        "records": len(reading.examples),
        "boundaries": points,
        "passes": len(batches) * passes,
    }
    yield parameter_row(skeleton, 0, lora_size(adapter))
    parts = [_reading_parts(skeleton, batch, settings, by_loss=by_loss) for batch in batches]
    largest = max(parts, key=lambda parts: sum(part.bytes for part in parts))
    lasting = [skeleton.base_part(), *adapter_parts([adapter])]
    yield from memory_rows(skeleton, lasting, largest)
    if load is not None:
        loaded = load()
        attach(loaded, adapter)
        count, middle = len(batches) * passes, batches[len(batches) // 2]
        _read(loaded, middle)  # warms up
        seconds = timed(lambda: _read(loaded, middle))
        where = device_name(loaded.device)
        yield time_row("pass", seconds, f"measured on {where}: one batch, all layers")
        yield time_row("run", seconds * count, f"extrapolated to {count} passes, at most")


def _reading_parts(
    skeleton: Skeleton, rows: Sequence[Example], settings: BoundarySettings, *, by_loss: bool
) -> list[Part]:
    """Return what reading a batch takes: the states kept of every layer, and the pass itself.

    By loss they are those of all positions, by probability those of the first few targets.
    """
    size = training_pass(rows, packed=False)
    places = size.positions if by_loss else len(rows) * settings.tokens
    width = skeleton.decoder.layers * skeleton.decoder.hidden * skeleton.precision.value
    return [
        Part("layer inputs", places * width, f"{places} positions of every layer"),
        reading_part(skeleton, size),
    ]


@torch.inference_mode()
def _read(base: Base, rows: Sequence[Example]) -> float:
    """Run a batch through the model, and wait for it."""
    return float(completion_logits(base.model, lay_out(rows, base.device)).sum())


def _batches(
    examples: Sequence[Example], generation: GenerationSettings, *, by_loss: bool
) -> Sequence[Sequence[Example]]:
    """Return the batches that are read, as the search cuts them."""
    if by_loss:
        return micro_batches(examples, TOKENS_PER_ROW * generation.batch_size)
    ordered = sorted(examples, key=lambda example: -len(example.ids))
    return in_batches(ordered, generation.batch_size)
