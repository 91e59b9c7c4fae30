"""Keys and values of rows that come and go: a cache with one slot for every position of every row.

A token's keys and values lie at its own position in its row, so rows of any lengths stand in one
batch without padding between their tokens, and what was drafted in vain is overwritten later. A
row sees the positions up to its own, inside the layer's window where it has one.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from lorakit.models.attention import BY_ROW

_KINDS = {"full_attention", "sliding_attention"}
_ATTENTIONS = {"eager", "sdpa", BY_ROW}


def can_slot(model: Any) -> bool:
    """Whether a model's layers all attend by the rules that slots keep, as far as it tells."""
    config = model.config.get_text_config()
    takes = inspect.signature(model.forward).parameters
    return (
        config._attn_implementation in _ATTENTIONS
        and set(getattr(config, "layer_types", None) or ()) <= _KINDS
        and {"position_ids", "past_key_values", "attention_mask", "logits_to_keep"} <= set(takes)
        and decoder_layers(model) is not None
    )


def decoder_layers(model: Any) -> Sequence[torch.nn.Module] | None:
    """Return the model's decoder layers, bottom first; None where they are not one list."""
    count = model.config.get_text_config().num_hidden_layers
    lists = (m for m in model.get_decoder().modules() if isinstance(m, torch.nn.ModuleList))
    return next((list(found) for found in lists if len(found) == count), None)


class Slots:
    """A model's cache of `rows` rows of `length` positions; the model calls `update`.

    `base_row` and the rows after it are those of the batch that is being computed.
    """

    def __init__(self, model: Any, rows: int, length: int) -> None:
        self._model, self._rows, self._length = model, rows, length
        self._stored: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._growing = 0
        self._device = next(model.parameters()).device
        self._places = torch.arange(length + 1, device=self._device)
        self._windows = _windows(model.config.get_text_config())
        self._dtype = model.dtype

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: positions are always given."""
        return 0

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *rest: Any, **more: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep keys and values (rows, heads, new, width) of a layer; return all that rows may see.

        Of rows that begin at position 0 those are the new ones.
        """
        stored = self._stored.get(layer_idx)
        if stored is None:
            stored = (self._new(key), self._new(value))
            self._stored[layer_idx] = stored
        first = self._first
        if self._growing:
            for kept, new in zip(stored, (key, value), strict=True):
                laid = new.transpose(1, 2)
                kept[first : first + len(new), : laid.shape[1]] = laid
                kept[first + len(new) : first + self._growing, : laid.shape[1]] = laid[:1]
            return key, value
        seen = []
        for kept, new in zip(stored, (key, value), strict=True):
            kept[self._row_numbers, self._at] = new.transpose(1, 2)
            seen.append(kept[first : first + len(new), : self._seen].transpose(1, 2))
        return seen[0], seen[1]

    def _new(self, like: torch.Tensor) -> torch.Tensor:
        heads, width = like.shape[1], like.shape[3]
        return like.new_zeros(self._rows, self._length + 1, heads, width)

    def extend(
        self, tokens: Sequence[Sequence[int]], starts: Sequence[int], first: int, keep: int
    ) -> list[list[int]]:
        """Give rows `first` … new tokens, of which the first stands at its row's start.

        Return, for each row, the most probable token after each of its last `keep` tokens (after
        fewer than that where it got fewer, then what stands to the left means nothing).
        """
        width = max(map(len, tokens))
        ids = [[0] * (width - len(row)) + list(row) for row in tokens]
        positions = [
            [-1] * (width - len(row)) + list(range(start, start + len(row)))
            for row, start in zip(tokens, starts, strict=True)
        ]
        at = torch.tensor(positions, device=self._device)
        self._first, self._growing = first, 0
        self._seen = max(row[-1] for row in positions) + 1
        self._row_numbers = self._places_of(first, len(tokens))
        self._at = torch.where(at < 0, self._length, at)  # padding has a slot that nobody sees
        return self._forward(torch.tensor(ids, device=self._device), at.clamp_min(0), keep)

    def _places_of(self, first: int, count: int) -> torch.Tensor:
        return torch.arange(first, first + count, device=self._device)[:, None]

    def fan_out(
        self, tokens: Sequence[int], boundaries: Sequence[int], first: int, keep: int
    ) -> list[list[int]]:
        """Give one row of tokens, from position 0, to a model that grows a row at each boundary.

        Rows `first` … hold the boundaries in the order given: the highest, then the others from
        the lowest up, which is the order in which they leave it. Return as `extend` does.
        """
        self._first, self._growing = first, len(boundaries)
        self._seen = len(tokens)
        ids = torch.tensor([list(tokens)], device=self._device)
        positions = self._places[None, : len(tokens)]
        with _growing(self._model, boundaries[1:]):
            return self._forward(ids, positions, keep)

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, keep: int) -> list[list[int]]:
        logits = self._model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=self._mask(positions),
            past_key_values=self,
            use_cache=True,
            logits_to_keep=keep,
        ).logits
        found: list[list[int]] = logits[:, -keep:].float().argmax(-1).tolist()
        return found

    def _mask(self, positions: torch.Tensor) -> Any:
        """Return the additive mask (rows, 1, new, seen), by kind of layer where there are two."""
        made = {kind: self._mask_of(positions, window) for kind, window in self._windows.items()}
        return made if len(made) > 1 else next(iter(made.values()))

    def _mask_of(self, positions: torch.Tensor, window: int | None) -> torch.Tensor:
        back = positions[:, None, :, None] - self._places[: self._seen]
        hidden = back < 0
        if window is not None and window < self._seen:
            hidden |= back >= window
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
        return mask.masked_fill_(hidden, torch.finfo(self._dtype).min)

    def move(self, source: int, target: int) -> None:
        """Copy a row onto another."""
        for stored in self._stored.values():
            for kept in stored:
                kept[target] = kept[source]


def _windows(config: Any) -> Mapping[str, int | None]:
    """Return the window in tokens, None where there is none, of every kind of layer there is."""
    window = getattr(config, "sliding_window", None)
    kinds = dict.fromkeys(getattr(config, "layer_types", None) or ())
    if not kinds:
        kinds = {"sliding_attention": None}
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


@contextlib.contextmanager
def _growing(model: Any, boundaries: Sequence[int]) -> Iterator[None]:
    """Append a copy of the first row before each layer that is one of the boundaries."""
    layers = decoder_layers(model) or ()
    hooks = [
        layers[boundary].register_forward_pre_hook(_append_first_row, with_kwargs=True)
        for boundary in boundaries
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _append_first_row(module: Any, inputs: Any, named: Any) -> Any:
    if inputs:
        return (torch.cat([inputs[0], inputs[0][:1]]), *inputs[1:]), named
    hidden = named["hidden_states"]
    return inputs, {**named, "hidden_states": torch.cat([hidden, hidden[:1]])}
