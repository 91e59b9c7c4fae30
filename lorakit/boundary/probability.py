"""Find the boundary by probability: how sure the model is of the completion after every layer.

This is the logit lens: the hidden state after k layers goes through the final norm and the rest of
the model's own forward (head, head bias, soft-capping). Probabilities are read, with teacher
forcing, at the first positions of the completion, its end token included. The proposed boundary is
the knee of the curve.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from lorakit.adapters.adapter import Adapter
from lorakit.boundary.cuts import bottom, pick_boundaries
from lorakit.boundary.evaluate import draw_sample
from lorakit.boundary.gates import Gates
from lorakit.boundary.records import ComparedCurve, Comparison, Curve, ProbabilityRecord
from lorakit.boundary.strip import check_layers_are_named
from lorakit.boundary.tail import Tail, TailWatch
from lorakit.boundary.turns import values_in_turn
from lorakit.models.architecture import Model, decoder_layers
from lorakit.models.base import Base
from lorakit.models.batches import IGNORED, MicroBatch, completion_logits, lay_out
from lorakit.models.lora import attach
from lorakit.models.memory import BatchSize, in_batches
from lorakit.models.predictions import encoder_of
from lorakit.models.sharing import ALONE, Team
from lorakit.models.tokens import Example, encode_all
from lorakit.reporting import Reporter
from lorakit.runs.resume import SavedValues, nothing_saved, run_key
from lorakit.settings import BoundarySettings, GenerationSettings


class _Sums(NamedTuple):
    """Probabilities summed over rows, and the number of rows that have each position.

    gold (of the gold token) and likeliest (layers, tokens) float64, rows (tokens,) float64.
    """

    gold: torch.Tensor
    likeliest: torch.Tensor
    rows: torch.Tensor

    def plus(self, other: _Sums) -> _Sums:
        """Return the sums over the rows of both."""
        return _Sums(*(mine + more for mine, more in zip(self, other, strict=True)))

    def as_list(self) -> list[float]:
        """Return all values in a row, for `from_list`."""
        return torch.cat([part.flatten() for part in self]).tolist()

    @classmethod
    def from_list(cls, values: Sequence[float], tokens: int) -> _Sums:
        """Return the sums, of so many positions, that `as_list` wrote."""
        gold, likeliest = torch.tensor(values[:-tokens], dtype=torch.float64).chunk(2)
        rows = torch.tensor(values[-tokens:], dtype=torch.float64)
        return cls(gold.view(-1, tokens), likeliest.view(-1, tokens), rows)

    def means(self) -> _Curves:
        """Return the means, at the positions that any row has."""
        present = self.rows > 0
        rows = self.rows[present]
        return _Curves(self.gold[:, present] / rows, self.likeliest[:, present] / rows)


class _Curves(NamedTuple):
    """Mean probabilities (layers, tokens) of the gold token and of the likeliest."""

    gold: torch.Tensor
    likeliest: torch.Tensor

    def after(self, layers: int) -> Curve:
        """Return the probabilities after the bottom `layers` layers, as fields of a record."""
        return {
            "probabilities": self.gold[layers - 1].tolist(),
            "maximum_probabilities": self.likeliest[layers - 1].tolist(),
        }


def read_probabilities(
    base: Base,
    adapter: Adapter,
    data: str,
    *,
    settings: BoundarySettings,
    generation: GenerationSettings,
    reporter: Reporter,
    saved: SavedValues | None = None,
    team: Team = ALONE,
) -> list[ProbabilityRecord]:
    """Return a record for each boundary k: the probabilities after k layers, by position.

    `score` is the mean of `probabilities` (of the gold token) over the positions; the knee of the
    scores is marked best; where there is none, the last boundary, with a note. `compared` has the
    same curves for the adapter stripped at each boundary of `settings.compare`, with the
    differences of `probabilities` from the whole adapter's. The sums of each batch are added to
    `saved`, and not computed if they are there; processes of a team take the batches in turn.
    Raises LorakitError for records that cannot be used, and for an adapter or a boundary that does
    not fit the base.
    """
    check_layers_are_named(adapter)
    boundaries = pick_boundaries(settings.boundaries, base.layers)
    compared = pick_boundaries(settings.compare, base.layers) if settings.compare else []
    sample = draw_sample(data, "prompt", "completion", sample=settings.sample, seed=generation.seed)
    encoder = encoder_of(base, adapter, generation)
    examples = encode_all(sample, encoder.example, reporter.note)
    batches = in_batches(
        sorted(examples, key=lambda example: -len(example.ids)), generation.batch_size
    )
    batch_size = BatchSize(generation.batch_size, reporter.note)
    saved = nothing_saved() if saved is None else saved
    run = run_key([list(example.ids) for example in examples], settings.tokens)
    sums: dict[int, _Sums] = {}
    with Gates(attach(base, adapter)).standing() as gates:
        places = [(k, number) for k in (base.layers, *compared) for number in range(len(batches))]

        def measure(place: int) -> list[float]:
            k, number = places[place]

            def read(rows: Sequence[Example]) -> _Sums:
                return _sums_under(base, gates, k, rows, settings.tokens)

            parts = batch_size.over(batches[number], read)
            return functools.reduce(_Sums.plus, parts).as_list()

        names = [f"{run[:12]} sums {k} {number}" for k, number in places]
        read_places = zip(places, values_in_turn(names, measure, saved, team), strict=True)
        for (k, _), values in reporter.timed(read_places, "reading", len(places)):
            part = _Sums.from_list(values, settings.tokens)
            sums[k] = sums[k].plus(part) if k in sums else part
    curves = {k: total.means() for k, total in sums.items()}
    records = _records(curves, boundaries, compared, whole=base.layers, count=len(examples))
    if len(records) > 2 and knee([record["score"] for record in records]) is None:
        reporter.note(
            f"no knee: the curve is nowhere below its chord; boundary {boundaries[-1]}, the last, "
            "is marked as the best"
        )
    return records


def knee(values: Sequence[float]) -> int | None:
    """Return the index of the knee: the value farthest below the chord from first to last.

    This is Kneedle's rule for a convex rising curve. Of equal distances the first wins; if no value
    lies below the chord there is no knee: None.
    """
    last = len(values) - 1
    below = [
        values[0] + (values[-1] - values[0]) * index / max(last, 1) - value
        for index, value in enumerate(values)
    ]
    deepest = max(below)
    return below.index(deepest) if deepest > 1e-12 else None


def _difference(curves: _Curves, whole: torch.Tensor, layers: int) -> ComparedCurve:
    """Return a stripped adapter's probabilities after `layers` layers, compared with the whole's.

    `whole` has those of the gold token under the whole adapter (layers, tokens).
    """
    differences = (curves.gold[layers - 1] - whole[layers - 1]).tolist()
    return {**curves.after(layers), "differences": differences}


def _records(
    curves: dict[int, _Curves],
    boundaries: Sequence[int],
    compared: Sequence[int],
    *,
    whole: int,
    count: int,
) -> list[ProbabilityRecord]:
    """Return the records; `curves` are by boundary, the whole adapter's under `whole`."""
    gold = curves[whole].gold
    scores = [float(gold[k - 1].mean()) for k in boundaries]
    place = knee(scores)
    best = boundaries[-1 if place is None else place]
    records: list[ProbabilityRecord] = []
    for k, score in zip(boundaries, scores, strict=True):
        comparison: Comparison = {}
        if compared:
            comparison["compared"] = {
                str(other): _difference(curves[other], gold, k) for other in compared
            }
        records.append(
            {
                "boundary": k,
                "score": score,
                "count": count,
                **curves[whole].after(k),
                **comparison,
                "best": k == best,
            }
        )
    return records


def _sums_under(
    base: Base, gates: Gates, boundary: int, rows: Sequence[Example], tokens: int
) -> _Sums:
    """Return the sums over the rows of a batch, with the LoRA of the layers below a boundary."""
    gates.set([bottom(boundary, base.layers)])
    return _sums_of(base, rows, tokens)


@torch.inference_mode()
def _sums_of(base: Base, rows: Sequence[Example], tokens: int) -> _Sums:
    """Return the sums over the rows of a batch, for the completion's first `tokens` positions."""
    batch = lay_out(rows, base.device)
    targets, present = _first_targets(rows, base.device, tokens)
    pass_ = _watched_pass(base.model, batch, _first_places(rows, batch, tokens))
    gold: list[torch.Tensor] = []
    likeliest: list[torch.Tensor] = []
    for state in pass_.states:
        chances = pass_.tail.logits(state).float().softmax(-1)
        of_target = chances.gather(-1, targets[..., None])[..., 0]
        gold.append((of_target.double() * present).sum(0).cpu())
        likeliest.append((chances.amax(-1).double() * present).sum(0).cpu())
    return _Sums(torch.stack(gold), torch.stack(likeliest), present.sum(0).double().cpu())


class _Pass(NamedTuple):
    """What a watched forward pass yields: the states after each layer, before the final norm.

    Each state is (rows, tokens, width).
    """

    states: list[torch.Tensor]
    tail: Tail


def _watched_pass(model: Model, batch: MicroBatch, places: torch.Tensor) -> _Pass:
    """Run the model and keep the outputs of its layers at `places` (rows, tokens).

    Raises LorakitError for a model whose tail cannot be told.
    """
    rows = torch.arange(len(places), device=places.device)[:, None]
    states: list[torch.Tensor] = []

    def keep(
        layer: torch.nn.Module, inputs: object, output: torch.Tensor | tuple[torch.Tensor, ...]
    ) -> None:
        states.append((output[0] if isinstance(output, tuple) else output)[rows, places])

    with contextlib.ExitStack() as hooks, TailWatch(model).standing() as watch:
        for layer in decoder_layers(model) or ():
            hooks.callback(layer.register_forward_hook(keep).remove)
        completion_logits(model, batch)
    return _Pass(states, watch.tail())


def _first_places(rows: Sequence[Example], batch: MicroBatch, tokens: int) -> torch.Tensor:
    """Return the positions (rows, tokens) in the batch that predict each row's first targets."""
    length = batch.input_ids.shape[1]
    first = torch.tensor([length - row.targets for row in rows], device=batch.labels.device)
    steps = torch.arange(tokens, device=batch.labels.device)
    return (first[:, None] + steps).clamp_max(length - 1)


def _first_targets(
    rows: Sequence[Example], device: torch.device, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's first gold tokens (rows, tokens), 0 past its end, and a mask of them."""
    gold = torch.full((len(rows), tokens), IGNORED)
    for index, row in enumerate(rows):
        first = row.ids[row.start : row.start + tokens]
        gold[index, : len(first)] = torch.tensor(first)
    present = gold != IGNORED
    return gold.clamp_min(0).to(device), present.to(device)
