"""Find the boundary by loss: the k at which the bottom k layers' LoRA predicts completions best.

The loss is that of training: the mean cross-entropy over all completion tokens of the sample, the
end token included, each read with the tokens before it as they are in the record. Nothing is
decoded. What cuts share is computed once (layerwise.py); a model whose layers cannot be run one by
one takes a whole pass for each cut.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TypeVar

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.names import layer_of
from lorakit.boundary.choice import Sweep, check_rule
from lorakit.boundary.cuts import Cut, cut_at, layer_order, search_points
from lorakit.boundary.evaluate import draw_sample
from lorakit.boundary.gates import Gates
from lorakit.boundary.layerwise import Losses, layerwise_for, read_alone
from lorakit.boundary.strip import check_layers_are_named
from lorakit.boundary.turns import values_in_turn
from lorakit.models.base import Base
from lorakit.models.batches import micro_batches
from lorakit.models.lora import attach
from lorakit.models.memory import BatchSize
from lorakit.models.predictions import encoder_of
from lorakit.models.sharing import ALONE, Team
from lorakit.models.tokens import Example, encode_all
from lorakit.reporting import Reporter
from lorakit.runs.resume import SavedValues, nothing_saved, run_key
from lorakit.scoring.statistics import Statistics, weighted_mean
from lorakit.settings import BoundarySettings, GenerationSettings
from lorakit.versions import version_of

K = TypeVar("K", bound=Hashable)
Read = Callable[[Sequence[Example], Sequence[Cut]], Iterator[Losses]]
TOKENS_PER_ROW = 128  # --batch-size rows of so many tokens bound what is read at once


def evaluate_loss(
    base: Base,
    adapter: Adapter,
    data: str,
    *,
    settings: BoundarySettings,
    generation: GenerationSettings,
    reporter: Reporter,
    saved: SavedValues | None = None,
    team: Team = ALONE,
) -> Sweep:
    """Measure the loss on a sample of `data` at every boundary, and every factor.

    The losses of each batch are added to `saved`, and not computed if they are there; processes of
    a team take the batches in turn.
    Raises LorakitError naming file and line for a record that cannot be used, such as one without a
    completion, and for an adapter or a boundary that does not fit the base.
    """
    check_layers_are_named(adapter)
    points = search_points(settings, base.layers)
    order = layer_order(settings.keep, base.layers, generation.seed)
    records = draw_sample(
        data, "prompt", "completion", sample=settings.sample, seed=generation.seed
    )
    check_rule(settings.rule, len(records))
    encoder = encoder_of(base, adapter, generation)
    examples = encode_all(records, encoder.example, reporter.note)
    cuts = {point: cut_at(point, order) for point in points}
    rows = generation.batch_size
    losses = losses_under(base, adapter, examples, cuts, rows, reporter, saved, team)
    sweep = Sweep(
        {point: loss_statistics(sums, examples) for point, sums in losses.items()}, settings, order
    )
    for line in sweep.notes:
        reporter.note(line)
    return sweep


def loss_statistics(sums: Sequence[float], examples: Sequence[Example]) -> Statistics:
    """Return the statistics of a mean loss in nats a token, from the summed losses of examples."""
    signature = f"tokens:completion+end|unit:nats|version:lorakit-{version_of('lorakit')}"
    return weighted_mean(sums, [float(row.targets) for row in examples], signature)


def losses_under(
    base: Base,
    adapter: Adapter,
    examples: Sequence[Example],
    cuts: Mapping[K, Cut],
    batch_size: int,
    reporter: Reporter,
    saved: SavedValues | None = None,
    team: Team = ALONE,
) -> dict[K, list[float]]:
    """Return, by the keys of `cuts`, the summed loss of each example's completion, in nats.

    Cuts that leave the same LoRA are computed once, and batches in `saved` not again.
    """
    saved = nothing_saved() if saved is None else saved
    layers = attach(base, adapter)
    places = {layer_of(name) for name in layers}
    left = {key: cut.on(places) for key, cut in cuts.items()}
    distinct = sorted(set(left.values()), reverse=True)
    numbers = {id(example): number for number, example in enumerate(examples)}
    batches = _micro_batches(examples, batch_size)
    size = BatchSize(batch_size, reporter.note)
    run = run_key([list(example.ids) for example in examples], [asdict(cut) for cut in distinct])
    sums: dict[Cut, list[float]] = {cut: [0.0] * len(examples) for cut in distinct}
    with Gates(layers).standing() as gates:
        read = _reader(base, gates, examples, distinct, reporter)
        names = [f"{run[:12]} loss {number}" for number in range(len(batches))]
        values = values_in_turn(
            names, lambda n: _totals(batches[n], distinct, read, size), saved, team
        )
        steps = (
            (rows, cut, totals[n * len(rows) : (n + 1) * len(rows)])
            for rows, totals in zip(batches, values, strict=True)
            for n, cut in enumerate(distinct)
        )
        for rows, cut, totals in reporter.timed(steps, "reading", len(batches) * len(distinct)):
            for row, total in zip(rows, totals, strict=True):
                sums[cut][numbers[id(row)]] = total
    return {key: sums[cut] for key, cut in left.items()}


def _micro_batches(examples: Sequence[Example], rows: int) -> list[list[Example]]:
    """Cut examples into the batches that as many rows of an ordinary length would fill."""
    return micro_batches(examples, TOKENS_PER_ROW * rows)


def _totals(
    rows: Sequence[Example], cuts: Sequence[Cut], read: Read, size: BatchSize
) -> list[float]:
    """Return the summed loss of every row under the first cut, then under the next, and so on."""
    totals: dict[tuple[Cut, int], float] = {}

    def read_part(part: Sequence[Example]) -> None:
        for losses in read(part, cuts):
            for row, total in zip(part, losses.sums.tolist(), strict=True):
                totals[losses.cut, id(row)] = total

    for _ in size.over(rows, read_part, _micro_batches):
        pass
    return [totals[cut, id(row)] for cut in cuts for row in rows]


def _reader(
    base: Base,
    gates: Gates,
    examples: Sequence[Example],
    cuts: Sequence[Cut],
    reporter: Reporter,
) -> Read:
    """Return what reads rows under many cuts: layer by layer if the model allows it."""
    layerwise = layerwise_for(base, gates, examples, cuts)
    if layerwise is not None:
        return layerwise.read
    reporter.note(f"{base.name} cannot be read layer by layer: one pass for each boundary")
    return lambda rows, cuts: read_alone(base, gates, rows, cuts)
