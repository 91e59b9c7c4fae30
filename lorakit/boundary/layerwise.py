"""The loss under many cuts, layer by layer: what two cuts share is computed once.

Cuts are taken in descending order. Under the first, the model itself reads the rows, while the
input of every layer is kept; each later cut goes on from the layer in which it first differs from
the one before. Four layers, cut above the bottom 4, 3, 2 and 1 (a layer without LoRA in brackets):

    cut 4    0  1  2  3      kept: the inputs of all four layers
    cut 3             [3]    from the input of layer 3
    cut 2         [2][3]     from the input of layer 2, which is still that of cut 4
    cut 1      [1][2][3]

So L boundaries cost about half of L passes. Nothing depends on the last layer's output but at the
positions whose next token is learnt. At the other positions it computes keys and values alone, and
the output head is spared those positions altogether. Whether a model's layers can be run one by one
like that is found by a trial; no family is known by name.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from lorakit.boundary.cuts import Cut
from lorakit.boundary.gates import Gates
from lorakit.boundary.tail import Tail, TailWatch
from lorakit.errors import LorakitError
from lorakit.models.architecture import Model, decoder_layers
from lorakit.models.base import Base
from lorakit.models.batches import IGNORED, MicroBatch, completion_logits, lay_out
from lorakit.models.tokens import Example

_LOGITS_AT_ONCE = 1 << 25
_TRIED = 32  # tokens of a row on which a model is tried
_CACHES = ("cache", "past_key_values")  # a layer's name for it: since transformers 5.24, before
_BY_TOKEN = ("position_embeddings", "position_ids")  # (rows, tokens, …), or several such
# What a model raises whose layers cannot be run one by one.
_REFUSALS = (TypeError, AttributeError, ValueError, RuntimeError, LookupError, LorakitError)

Arguments = dict[str, Any]  # of a layer's forward, by name; the first is the hidden state


class Losses(NamedTuple):
    """The summed cross-entropy (rows,) float32 of each row's completion under a cut."""

    cut: Cut
    sums: torch.Tensor


@torch.inference_mode()
def read_alone(
    base: Base, gates: Gates, rows: Sequence[Example], cuts: Sequence[Cut]
) -> Iterator[Losses]:
    """Yield the losses of rows under each cut, a forward pass of the model for each."""
    batch = lay_out(rows, base.device)
    learnt = batch.labels != IGNORED
    for cut in cuts:
        gates.set([cut])
        logits = completion_logits(base.model, batch)[learnt]
        yield Losses(cut, _row_sums(_cross_entropy(logits, batch.labels[learnt]), rows))


class Layerwise:
    """Reads rows under many cuts through a model whose LoRA is gated.

    With `trims`, the last layer computes only what the learnt positions need.
    """

    def __init__(self, base: Base, gates: Gates, *, trims: bool) -> None:
        self._base, self._gates, self._trims = base, gates, trims

    @torch.inference_mode()
    def read(self, rows: Sequence[Example], cuts: Sequence[Cut]) -> Iterator[Losses]:
        """Yield the losses of rows under each cut; the cuts are distinct and in descending order.

        Raises LorakitError for a model whose tail cannot be told.
        """
        batch = lay_out(rows, self._base.device)
        learnt = batch.labels != IGNORED
        width = batch.labels.shape[1]
        self._gates.set(cuts[:1])
        trunk = _read_trunk(self._base.model, batch)

        def losses(cut: Cut, last: torch.Tensor) -> Losses:
            values = _tail_losses(trunk.tail, last[learnt], batch.labels[learnt])
            return Losses(cut, _row_sums(values, rows))

        yield losses(cuts[0], trunk.last[:, -width:])
        path = [arguments.pop(name) for name, arguments in trunk.layers]
        for before, cut in itertools.pairwise(cuts):
            self._gates.set([cut])
            del path[cut.split_from(before) + 1 :]
            while len(path) < len(trunk.layers):
                path.append(self._run(trunk, len(path) - 1, path[-1]))
            yield losses(cut, self._run_last(trunk, path[-1], width))

    def _run(self, trunk: _Trunk, number: int, state: torch.Tensor) -> torch.Tensor:
        """Return the output of a layer for a state (rows, tokens, width)."""
        name, arguments = trunk.layers[number]
        return _state_of(self._layer(number)(**{name: state, **arguments}))

    def _run_last(self, trunk: _Trunk, state: torch.Tensor, width: int) -> torch.Tensor:
        """Return the output of the last layer at the last `width` tokens."""
        number = len(trunk.layers) - 1
        before = state.shape[1] - width
        if not self._trims or not before:
            return self._run(trunk, number, state)[:, -width:]
        (name, arguments), layer = trunk.layers[number], self._layer(number)
        stored: Arguments = {_cache_name(layer): _TwoParts()}
        early = {**arguments, **_columns(arguments, state, slice(None, before)), **stored}
        with contextlib.suppress(_KeysStored):
            layer(**{name: state[:, :before], **early})
            raise LookupError("the layer has used no cache")
        late = {**arguments, **_columns(arguments, state, slice(before, None)), **stored}
        return _state_of(layer(**{name: state[:, before:], **late}))

    def _layer(self, number: int) -> torch.nn.Module:
        return (decoder_layers(self._base.model) or ())[number]


def layerwise_for(
    base: Base, gates: Gates, rows: Sequence[Example], cuts: Sequence[Cut]
) -> Layerwise | None:
    """Return what reads a model layer by layer, None where the model does not allow it.

    That is tried on the last tokens of the longest row and on fewer of the shortest: the losses
    under the first, the last and a middle one of the cuts have to be those of the model's own
    passes.
    """
    by_length = sorted(rows, key=lambda row: len(row.ids))
    some = [_last_tokens(by_length[-1], _TRIED), _last_tokens(by_length[0], _TRIED // 2)]
    tried = sorted({cuts[0], cuts[len(cuts) // 2], cuts[-1]}, reverse=True)
    try:
        expected = torch.stack([losses.sums for losses in read_alone(base, gates, some, tried)])
    except torch.OutOfMemoryError:
        return None
    near = 1e-4 if base.dtype == torch.float32 else 0.05
    for trims in (True, False):
        reader = Layerwise(base, gates, trims=trims)
        try:
            sums = torch.stack([losses.sums for losses in reader.read(some, tried)])
        except _REFUSALS:
            continue
        if torch.allclose(sums, expected, rtol=near, atol=near):
            return reader
    return None


def _last_tokens(row: Example, most: int) -> Example:
    """Return a row without the tokens before its last `most`, the first of which is not learnt."""
    ids = row.ids[-most:]
    return replace(row, ids=ids, start=max(1, len(ids) - row.targets))


# — the first pass —


class _Trunk(NamedTuple):
    """A whole pass: the name of each layer's state and its arguments, the last output, the tail."""

    layers: list[tuple[str, Arguments]]
    last: torch.Tensor
    tail: Tail


def _read_trunk(model: Model, batch: MicroBatch) -> _Trunk:
    """Run the model on a batch and keep what every layer is given."""
    layers: list[tuple[str, Arguments]] = []
    outputs: list[torch.Tensor] = []

    def keep(layer: torch.nn.Module, inputs: tuple[object, ...], named: Arguments) -> None:
        names = list(inspect.signature(layer.forward).parameters)
        layers.append((names[0], {**dict(zip(names, inputs, strict=False)), **named}))

    stack = decoder_layers(model) or ()
    with contextlib.ExitStack() as hooks, TailWatch(model).standing() as watch:
        for layer in stack:
            hooks.callback(layer.register_forward_pre_hook(keep, with_kwargs=True).remove)
        for layer in stack[-1:]:
            hook = layer.register_forward_hook(lambda m, i, out: outputs.append(_state_of(out)))
            hooks.callback(hook.remove)
        # one column of logits is enough: the tail comes later
        completion_logits(model, batch._replace(labels=batch.labels[:, -1:]))
    return _Trunk(layers, outputs[0], watch.tail())


def _state_of(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return the hidden state that a layer returns, alone or as the first of several outputs."""
    return output[0] if isinstance(output, tuple) else output


# — the last layer in two parts —


class _KeysStored(Exception):  # noqa: N818  a signal, not an error
    """Leaves a layer as soon as its keys and values are known."""


class _TwoParts:
    """The cache of one layer that first reads the early tokens, for their keys and values alone."""

    def __init__(self) -> None:
        self._early: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key: torch.Tensor, value: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the early tokens' (rows, heads, tokens, width) and leave; then return all."""
        if self._early is None:
            self._early = (key, value)
            raise _KeysStored
        early_keys, early_values = self._early
        return torch.cat([early_keys, key], 2), torch.cat([early_values, value], 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens are stored."""
        return 0 if self._early is None else self._early[0].shape[2]


def _cache_name(layer: torch.nn.Module) -> str:
    """Return the name by which a layer takes a cache; LookupError where it takes none."""
    names = inspect.signature(layer.forward).parameters
    for name in _CACHES:
        if name in names:
            return name
    raise LookupError(f"{type(layer).__name__} takes no cache")


def _columns(arguments: Arguments, state: torch.Tensor, columns: slice) -> Arguments:
    """Return the arguments of a layer that differ for a part of the tokens.

    The mask of the part is (rows, 1, part, tokens), the causal one where the layer has been given
    none.
    """
    part: Arguments = {}
    for name in _BY_TOKEN:
        value = arguments.get(name)
        if isinstance(value, torch.Tensor):
            part[name] = value[:, columns]
        elif value is not None:
            part[name] = tuple(tensor[:, columns] for tensor in value)
    mask = arguments.get("attention_mask")
    if mask is None:
        length = state.shape[1]
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=state.device).tril()
    part["attention_mask"] = mask[:, :, columns]
    return part


# — losses —


def _tail_losses(tail: Tail, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the losses (targets,) of states (targets, width), a bounded number at a time."""
    size = max(1, _LOGITS_AT_ONCE // int(tail.model.get_input_embeddings().weight.shape[0]))
    parts = zip(states.split(size), labels.split(size), strict=True)
    return torch.cat([_cross_entropy(tail.logits(some[None])[0], gold) for some, gold in parts])


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return −log softmax(logits)[label] of each row, float32, a bounded number at a time."""
    size = max(1, _LOGITS_AT_ONCE // logits.shape[1])
    parts = zip(logits.split(size), labels.split(size), strict=True)
    return torch.cat(
        [torch.nn.functional.cross_entropy(p.float(), gold, reduction="none") for p, gold in parts]
    )


def _row_sums(losses: torch.Tensor, rows: Sequence[Example]) -> torch.Tensor:
    """Return the sums (rows,) of losses that lie row after row."""
    return torch.stack([own.sum() for own in losses.split([row.targets for row in rows])])
