"""Find the boundary by probability: how sure the model is of the completion after every layer.

This is the logit lens: the hidden state after k layers goes through the final norm and the rest of
the model's own forward (head, head bias, soft-capping). Probabilities are read, with teacher
forcing, at the first positions of the completion, its end token included. The final norm is
recognised by what it does, not by its name. The proposed boundary is the knee of the curve.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lorakit.adapters.adapter import Adapter
from lorakit.boundary.evaluate import draw_sample, pick_boundaries
from lorakit.boundary.gates import Gates
from lorakit.boundary.records import ComparedCurve, Comparison, Curve, ProbabilityRecord
from lorakit.errors import LorakitError
from lorakit.models.architecture import Model, decoder_layers
from lorakit.models.base import Base
from lorakit.models.batches import IGNORED, MicroBatch, completion_logits, lay_out
from lorakit.models.lora import attach
from lorakit.models.predictions import encoder_of
from lorakit.models.tokens import Example, encode_all
from lorakit.reporting import Reporter
from lorakit.settings import BoundarySettings, GenerationSettings

DecoderOutput = Any  # transformers.modeling_outputs.BaseModelOutputWithPast or a similar class


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
) -> list[ProbabilityRecord]:
    """Return a record for each boundary k: the probabilities after k layers, by position.

    `score` is the mean of `probabilities` (of the gold token) over the positions; the knee of the
    scores is marked best. `compared` has the same curves for the adapter stripped at each boundary
    of `settings.compare`, with the differences of `probabilities` from the whole adapter's. Raises
    LorakitError for records that cannot be used, and for an adapter or a boundary that does not fit
    the base.
    """
    boundaries = pick_boundaries(settings.boundaries, base.layers)
    compared = pick_boundaries(settings.compare, base.layers) if settings.compare else []
    sample = draw_sample(data, "prompt", "completion", sample=settings.sample, seed=generation.seed)
    encoder = encoder_of(base, adapter, generation)
    examples = encode_all(sample, encoder.example, reporter.note)
    batches = _batches(examples, generation.batch_size)
    sums: dict[int, _Sums] = {}
    with Gates(attach(base, adapter)).standing() as gates:
        steps = [(k, batch) for k in (base.layers, *compared) for batch in batches]
        for k, batch in reporter.timed(steps, "reading", len(steps)):
            gates.set([k])
            part = _sums_of(base, batch, settings.tokens)
            sums[k] = sums[k].plus(part) if k in sums else part
    curves = {k: total.means() for k, total in sums.items()}
    return _records(curves, boundaries, compared, whole=base.layers, count=len(examples))


def knee(values: Sequence[float]) -> int:
    """Return the index of the knee: the value farthest below the chord from first to last.

    This is Kneedle's rule for a convex rising curve. Of equal distances the first wins; if no value
    lies below the chord there is no knee, and the last index is returned.
    """
    last = len(values) - 1
    below = [
        values[0] + (values[-1] - values[0]) * index / max(last, 1) - value
        for index, value in enumerate(values)
    ]
    deepest = max(below)
    return below.index(deepest) if deepest > 1e-12 else last


def _difference(curves: _Curves, whole: torch.Tensor, layers: int) -> ComparedCurve:
    """Return a stripped adapter's probabilities after `layers` layers, compared with the whole's.

    `whole` has those of the gold token under the whole adapter (layers, tokens).
    """
    differences = (curves.gold[layers - 1] - whole[layers - 1]).tolist()
    return {**curves.after(layers), "differences": differences}


def _batches(examples: Sequence[Example], size: int) -> list[list[Example]]:
    """Cut examples into batches of `size`, the longest first."""
    ordered = sorted(examples, key=lambda example: -len(example.ids))
    return [ordered[first : first + size] for first in range(0, len(ordered), size)]


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
    best = boundaries[knee(scores)]
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


@torch.inference_mode()
def _sums_of(base: Base, rows: Sequence[Example], tokens: int) -> _Sums:
    """Return the sums over the rows of a batch, for the completion's first `tokens` positions."""
    batch = lay_out(rows, base.device)
    targets, present = _first_targets(rows, base.device, tokens)
    pass_ = _watched_pass(base.model, batch, _first_places(rows, batch, tokens))
    gold: list[torch.Tensor] = []
    likeliest: list[torch.Tensor] = []
    for state in pass_.states:
        chances = _through_tail(base.model, pass_, state).float().softmax(-1)
        of_target = chances.gather(-1, targets[..., None])[..., 0]
        gold.append((of_target.double() * present).sum(0).cpu())
        likeliest.append((chances.amax(-1).double() * present).sum(0).cpu())
    return _Sums(torch.stack(gold), torch.stack(likeliest), present.sum(0).double().cpu())


class _Pass(NamedTuple):
    """What a watched forward pass yields: the states after each layer, before the final norm.

    Each state is (rows, tokens, width); `norm` is the final norm, `output` the decoder's output.
    """

    states: list[torch.Tensor]
    norm: torch.nn.Module
    output: DecoderOutput


def _watched_pass(model: Model, batch: MicroBatch, places: torch.Tensor) -> _Pass:
    """Run the model and keep the outputs of its layers at `places` (rows, tokens).

    The final norm is the part of the decoder whose output is also the decoder's. Raises
    LorakitError for a model that has none, or whose layers are not in one list.
    """
    decoder, layers = model.get_decoder(), decoder_layers(model)
    rows = torch.arange(len(places), device=places.device)[:, None]
    states: list[torch.Tensor] = []
    parts: list[tuple[torch.nn.Module, object]] = []
    outputs: list[DecoderOutput] = []

    def keep(
        layer: torch.nn.Module, inputs: object, output: torch.Tensor | tuple[torch.Tensor, ...]
    ) -> None:
        states.append((output[0] if isinstance(output, tuple) else output)[rows, places])

    with contextlib.ExitStack() as hooks:
        for layer in layers or ():
            hooks.callback(layer.register_forward_hook(keep).remove)
        for part in decoder.children():
            watch = part.register_forward_hook(lambda m, i, output: parts.append((m, output)))
            hooks.callback(watch.remove)
        watch = decoder.register_forward_hook(lambda m, i, output: outputs.append(output))
        hooks.callback(watch.remove)
        completion_logits(model, batch)
    last = outputs[0].last_hidden_state
    for part, output in parts:
        if isinstance(output, torch.Tensor) and output.data_ptr() == last.data_ptr() and layers:
            return _Pass(states, part, outputs[0])
    raise LorakitError(
        f"{type(model).__name__} has no final norm that can be found; use --by evaluation"
    )


def _through_tail(model: Model, pass_: _Pass, state: torch.Tensor) -> torch.Tensor:
    """Return the logits of a state: the final norm, then what the model does after its decoder.

    To that end the model runs with a decoder that returns the normalised state.
    """
    decoder = model.get_decoder()
    replaced = type(pass_.output)(last_hidden_state=pass_.norm(state))
    decoder.forward = lambda *args, **kwargs: replaced
    try:
        ids = torch.zeros(state.shape[:2], dtype=torch.int64, device=state.device)
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
        return logits
    finally:
        del decoder.forward


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
