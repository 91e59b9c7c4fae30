"""A cache of keys and values for rows that come and go: a slot for each position of each row.

A token's keys and values lie in the slot of its own position, so rows of any lengths share a batch
without padding between their tokens, and wrong guesses are overwritten by the tokens that come
next. Two rows of four slots, given tokens by `Reader.extend` (reading.py), row by row:

    row 0   row 1     starts   the model reads   then row 0 and row 1 hold
    a b c   d         0, 0     a b c / · · d     a b c .   d . . .
    x       e f       3, 1     · x   / e f       a b c x   d e f .      e f was a guess, f is wrong:
    .       g         -, 2             g         a b c x   d e g .      g goes into the slot of f

The padding (·) of shorter rows goes into an extra slot that no token sees. When rows differ only
from some layer on, a pass fills several at once. What a token sees is decided in reading.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from lorakit.models.architecture import Model, forward_parameters
from lorakit.models.prefixes import KeysAndValues, Prefix

_NAMES = ("cache", "past_key_values")  # what transformers calls a cache, since 5.24 and before
_AHEAD = 128  # positions for which slots are added at once


def cache_parameter(model: Model) -> str | None:
    """Return the name by which a model's forward takes a cache, None where it takes none."""
    parameters = forward_parameters(model)
    return next((name for name in _NAMES if name in parameters), None)


class Extended(NamedTuple):
    """A pass that gives `size` rows, from `first` on, tokens of their own.

    `rows` and `slots` say where each goes: (rows, 1) and (rows, new), or (1, tokens) both.
    """

    first: int
    size: int
    rows: torch.Tensor
    slots: torch.Tensor


class Fanned(NamedTuple):
    """A pass that gives `size` rows, from `first` on, the same tokens, after a prefix if any."""

    first: int
    size: int
    prefix: Prefix | None


class KVCache:
    """Slots of `rows` rows of up to `length` positions; a model calls `update` in every layer.

    Before a pass, `expected` is set to the rows that it gives tokens to, and `visible` to how many
    positions the longest of them has then. Position p lies in slot p + 1, padding in slot 0. Slots
    are added as rows grow; `moved` is told that they lie elsewhere then.
    """

    def __init__(self, rows: int, length: int, moved: Callable[[], None]) -> None:
        self._rows, self._length, self._moved = rows, length, moved
        self._stored: dict[int, KeysAndValues] = {}
        self.expected: Extended | Fanned
        self.visible = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: the model asks, but needs no length, since it is always given positions."""
        return 0

    def update(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> KeysAndValues:
        """Store a layer's new keys and values (rows, heads, new, width); return all visible ones.

        A fanned-out batch sees the new ones alone, where its rows begin at position 0.
        """
        self._stored[layer_idx] = self._roomy(self._stored.get(layer_idx), key, value)
        expected = self.expected
        if isinstance(expected, Fanned):
            return self._fan_out(expected, key, value, layer_idx)
        first, size, rows, targets = expected
        visible = []
        for slots, new in zip(self._stored[layer_idx], (key, value), strict=True):
            slots[rows, targets] = new.transpose(1, 2)
            visible.append(slots[first : first + size, 1 : 1 + self.visible].transpose(1, 2))
        return visible[0], visible[1]

    def _fan_out(
        self, fanned: Fanned, key: torch.Tensor, value: torch.Tensor, layer: int
    ) -> KeysAndValues:
        """Store new keys and values of a batch that is fanned out; return all visible ones."""
        first, size, prefix = fanned
        stored, count, end = self._stored[layer], len(key), 1 + self.visible
        for slots, new in zip(stored, (key, value), strict=True):
            slots[first : first + count, end - new.shape[2] : end] = new.transpose(1, 2)
        self._hold(layer, first, count, prefix)
        for slots in stored:  # rows that split off above this layer are the first row here
            slots[first + count : first + size, 1:end] = slots[first, 1:end]
        if prefix is None:
            return key, value
        keys, values = (slots[first : first + count, 1:end] for slots in stored)
        return keys.transpose(1, 2), values.transpose(1, 2)

    def _roomy(
        self, stored: KeysAndValues | None, key: torch.Tensor, value: torch.Tensor
    ) -> KeysAndValues:
        """Return a layer's slots (rows, slots, heads, width), enough for what is visible now."""
        count = 0 if stored is None else stored[0].shape[1]
        if count > self.visible and stored is not None:
            return stored
        wanted = 1 + min(self._length, self.visible + max(_AHEAD, self.visible // 2))
        self._moved()
        roomy = self._empty(key, wanted), self._empty(value, wanted)
        for slots, before in zip(roomy, stored or (), strict=False):
            slots[:, :count] = before
        return roomy

    def _empty(self, like: torch.Tensor, count: int) -> torch.Tensor:
        """Return zeros (rows, count, heads, width) for a layer's keys or values."""
        return like.new_zeros(self._rows, count, like.shape[1], like.shape[3])

    def copy_prefix(self, first: int, rows_in: Callable[[int], int]) -> Prefix:
        """Return what rows from `first` on hold now, in a layer as many as `rows_in` says of it."""
        end, layers = 1 + self.visible, {}
        for layer, (keys, values) in self._stored.items():
            own = slice(first, first + rows_in(layer))
            layers[layer] = keys[own, 1:end].clone(), values[own, 1:end].clone()
        return Prefix(self.visible, layers)

    def hold(self, first: int, count: int, prefix: Prefix) -> None:
        """Let `count` rows from `first` on hold a prefix, which was read for one row."""
        for layer in self._stored:
            self._hold(layer, first, count, prefix)

    def _hold(self, layer: int, first: int, count: int, prefix: Prefix | None) -> None:
        """Let rows hold a layer's part of a prefix, if there is one."""
        parts = () if prefix is None else prefix.layers.get(layer, ())
        for slots, part in zip(self._stored[layer], parts, strict=False):
            slots[first : first + count, 1 : 1 + part.shape[1]] = part

    def move(self, source: int, target: int) -> None:
        """Copy a row onto another; it is one of the last pass, whose positions are all it has."""
        end = 1 + self.visible
        for stored in self._stored.values():
            for slots in stored:
                slots[target, 1:end] = slots[source, 1:end]
