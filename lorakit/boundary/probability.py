"""The boundary layer by probability: how sure of the completion the model is after every layer.

The logit lens: the hidden state after k layers goes through the final norm and the rest of the
model's own forward (head, head bias, soft-capping), teacher-forced at the first positions of the
completion, its end token counted among them. Which module is the final norm is seen from what it
does, not from its name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lorakit.adapters.adapter import Adapter
from lorakit.boundary.evaluate import draw_sample, pick_boundaries
from lorakit.boundary.gates import Gates
from lorakit.boundary.knee import knee
from lorakit.boundary.kv_cache import decoder_layers
from lorakit.errors import LorakitError
from lorakit.models.base import Base
from lorakit.models.batches import IGNORED, MicroBatch, lay_out
from lorakit.models.forward import completion_logits
from lorakit.models.lora import attach
from lorakit.models.predictions import encoder_of
from lorakit.models.tokens import Example, encode_all
from lorakit.reporting import Reporter
from lorakit.settings import BoundarySettings, GenerationSettings

_Curves = tuple[torch.Tensor, torch.Tensor]  # of the gold token, of the likeliest: (layers, tokens)


def read_probabilities(
    base: Base,
    adapter: Adapter,
    data: str,
    *,
    settings: BoundarySettings,
    generation: GenerationSettings,
    reporter: Reporter,
) -> list[dict[str, Any]]:
    """Return a record for each boundary k: the probabilities after k layers, by position.

    `score` is the mean of `probabilities` (the gold token's) over the positions; the knee of the
    scores is marked best. `compared` has the same of the adapter stripped at each boundary to
    compare, and by how much the gold token's differ from the whole adapter's. Raises LorakitError
    for records that cannot be used, and for an adapter or a boundary that does not fit the base.
    """
    boundaries = pick_boundaries(settings.boundaries, base.layers)
    compared = pick_boundaries(settings.compare, base.layers) if settings.compare else []
    sample = draw_sample(data, "prompt", "completion", sample=settings.sample, seed=generation.seed)
    encoder = encoder_of(base, adapter, generation)
    examples = encode_all(sample, encoder.example, reporter.note)
    batches = _batches(examples, generation.batch_size)
    curves: dict[int, _Curves] = {}
    with Gates(attach(base, adapter)).standing() as gates:
        steps = [(k, batch) for k in (base.layers, *compared) for batch in batches]
        sums: dict[int, Any] = {}
        for k, batch in reporter.timed(steps, "reading", len(steps)):
            gates.set([k])
            part = _batch_sums(base, batch, settings.tokens)
            sums[k] = [a + b for a, b in zip(sums[k], part, strict=True)] if k in sums else part
    for k, (gold, most, count) in sums.items():
        there = count > 0
        curves[k] = (gold[:, there] / count[there], most[:, there] / count[there])
    return _records(curves, boundaries, compared, whole=base.layers, count=len(examples))


def _batches(examples: Sequence[Example], size: int) -> list[list[Example]]:
    ordered = sorted(examples, key=lambda example: -len(example.ids))
    return [ordered[first : first + size] for first in range(0, len(ordered), size)]


def _records(
    curves: dict[int, _Curves],
    boundaries: Sequence[int],
    compared: Sequence[int],
    *,
    whole: int,
    count: int,
) -> list[dict[str, Any]]:
    gold, most = curves[whole]
    scores = [float(gold[k - 1].mean()) for k in boundaries]
    best = boundaries[knee(scores)]
    rows = []
    for k, value in zip(boundaries, scores, strict=True):
        row: dict[str, Any] = {"boundary": k, "score": value, "count": count}
        row |= _told(gold[k - 1], most[k - 1])
        if compared:
            row["compared"] = {
                str(other): _told(curves[other][0][k - 1], curves[other][1][k - 1])
                | {"differences": (curves[other][0][k - 1] - gold[k - 1]).tolist()}
                for other in compared
            }
        rows.append({**row, "best": k == best})
    return rows


def _told(gold: torch.Tensor, most: torch.Tensor) -> dict[str, list[float]]:
    return {"probabilities": gold.tolist(), "maximum_probabilities": most.tolist()}


@torch.inference_mode()
def _batch_sums(base: Base, rows: Sequence[Example], tokens: int) -> list[torch.Tensor]:
    """Return, over the rows, the sums of the gold token's and of the largest probability.

    Both (layers, tokens) float64, and the number of rows that have each position, (tokens,).
    """
    batch = lay_out(rows, base.device)
    gold, there = _first_targets(rows, base.device, tokens)
    pass_ = _watched_pass(base.model, batch, _first_places(rows, batch, tokens))
    sums: list[list[torch.Tensor]] = [[], []]
    for state in pass_.states:
        chances = _through_tail(base.model, pass_, state).float().softmax(-1)
        found = chances.gather(-1, gold[..., None])[..., 0], chances.amax(-1)
        for kept, part in zip(sums, found, strict=True):
            kept.append((part.double() * there).sum(0).cpu())
    return [torch.stack(sums[0]), torch.stack(sums[1]), there.sum(0).double().cpu()]


class _Pass(NamedTuple):
    """A forward pass: the states after each layer (rows, tokens, width), before the final norm."""

    states: list[torch.Tensor]
    norm: torch.nn.Module
    output: Any


def _watched_pass(model: Any, batch: MicroBatch, places: torch.Tensor) -> _Pass:
    """Run the model and keep what its layers gave at `places` (rows, tokens).

    The final norm is the decoder's part whose output is the decoder's own. Raises LorakitError for
    a model that has none, or whose layers are not one list.
    """
    decoder, layers = model.get_decoder(), decoder_layers(model)
    rows = torch.arange(len(places), device=places.device)[:, None]
    states: list[torch.Tensor] = []
    parts: list[tuple[torch.nn.Module, Any]] = []
    outputs: list[Any] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
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


def _through_tail(model: Any, pass_: _Pass, state: torch.Tensor) -> torch.Tensor:
    """Return the logits of a state: the final norm, then the model's own forward past its decoder.

    In that forward the decoder gives the state in place of its own.
    """
    decoder = model.get_decoder()
    given = type(pass_.output)(last_hidden_state=pass_.norm(state))
    decoder.forward = lambda *inputs, **named: given
    try:
        ids = torch.zeros(state.shape[:2], dtype=torch.int64, device=state.device)
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
        return logits
    finally:
        del decoder.forward


def _first_places(rows: Sequence[Example], batch: MicroBatch, tokens: int) -> torch.Tensor:
    """Return where, in the batch, each of a row's first completion tokens is predicted."""
    length = batch.input_ids.shape[1]
    first = torch.tensor([length - row.targets for row in rows], device=batch.labels.device)
    steps = torch.arange(tokens, device=batch.labels.device)
    return (first[:, None] + steps).clamp_max(length - 1)


def _first_targets(
    rows: Sequence[Example], device: torch.device, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's first gold tokens (rows, tokens), 0 past its end, and where they are."""
    gold = torch.full((len(rows), tokens), IGNORED)
    for place, row in enumerate(rows):
        some = row.ids[row.start : row.start + tokens]
        gold[place, : len(some)] = torch.tensor(some)
    there = gold != IGNORED
    return gold.clamp_min(0).to(device), there.to(device)
