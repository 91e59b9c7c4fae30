"""Attention of rows that have new tokens in different numbers, on a CPU.

Keys and values of the rows lie in a cache. Inside `ragged` the new tokens of all rows come as one
sequence, so that no layer computes padding but attention, where it is cheap:

    row 0 reads a b c, row 1 reads d: the layers see a b c d, attention sees  a b c / d · ·

Where few rows have more than one token, their tokens but the last attend row by row, and there is
no padding (the last ones of all rows together: c / d). From the first row on that reads a prompt,
rows attend one by one, as packed ones do; those before it as they would without them.

Where heads share keys, transformers copies the keys to each head as soon as rows have two new
tokens. Instead, the queries of these heads are taken for more tokens of one head.

Which tokens rows read is decided in reading.py.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from lorakit.models.gpu_attention import Kernel, attend_in_groups, pytorchs, queries_a_key
from lorakit.models.row_masks import are_causal

# New tokens of a row from which a batch saves less than it loses by computing what is hidden.
_WIDE = 16
# What a row that attends by itself costs, in queries of padding: as measured with SmolLM2's heads.
_ALONE = 50

_Attend = Callable[..., torch.Tensor]  # `attend_in_groups` of a layer


class _Part(NamedTuple):
    """Tokens of one row that attend by themselves: their places in the sequence, and their mask.

    They see the row's first `visible` keys; the mask is (1, 1, group * tokens, visible) or None.
    """

    row: int
    tokens: slice
    visible: int
    mask: torch.Tensor | None


class _Plan(NamedTuple):
    """How tokens attend without padding.

    That is the mask (rows, 1, group, visible) by which all rows' last tokens do, and the earlier
    ones.
    """

    last: torch.Tensor
    earlier: Sequence[_Part]


class _Division(NamedTuple):
    """The masks of the rows before the first with many tokens, and of each other row."""

    before: torch.Tensor
    alone: Sequence[torch.Tensor | None]


_How = torch.Tensor | _Plan | _Division


@dataclass(frozen=True)
class RaggedRows:
    """Where each token of a sequence belongs in a batch of rows, all as wide as the longest.

    `row` and `column` are (tokens,). `lengths` are the rows' new tokens, in the last columns, and
    `visible` those that each sees with those before them.
    """

    row: torch.Tensor
    column: torch.Tensor
    lengths: Sequence[int]
    visible: Sequence[int]
    _of_masks: dict[tuple[int, int], tuple[torch.Tensor, _How]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @functools.cached_property
    def width(self) -> int:
        return max(self.lengths)

    @functools.cached_property
    def _before(self) -> RaggedRows | None:
        """The rows before the first with many tokens, if there are any."""
        count = next(place for place, length in enumerate(self.lengths) if length >= _WIDE)
        if not count:
            return None
        lengths, visible = self.lengths[:count], self.visible[:count]
        row, column = self.row[: sum(lengths)], self.column[: sum(lengths)]
        return RaggedRows(row, column - (self.width - max(lengths)), lengths, visible)

    @functools.cached_property
    def _ends(self) -> list[int]:
        """Where each row ends in the sequence."""
        return list(itertools.accumulate(self.lengths))

    @functools.cached_property
    def _last(self) -> torch.Tensor:
        """The place of each row's last token in the sequence, (rows,)."""
        return torch.tensor(self._ends) - 1

    def _pads(self, group: int) -> bool:
        """Return whether padding costs less than rows with several tokens attending apart."""
        several = sum(length > 1 for length in self.lengths)
        return several * _ALONE >= len(self.lengths) * group * (self.width - 1) > 0

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor,
        *,
        kernel: Kernel = pytorchs,
        **settings: Any,
    ) -> torch.Tensor:
        """Compute attention (1, tokens, heads, values) by transformers' own function, in float32.

        query is (1, heads, tokens, width), key and value (rows, heads or fewer, visible, width),
        the mask is added: (rows, 1, columns, visible). Another kernel is called alike.
        """
        wide = query.float(), key.float(), value.float()
        group = queries_a_key(query, key, **settings)
        settings["kernel"] = kernel
        attend = functools.partial(attend_in_groups, module, group=group, **settings)
        how = self._how(mask, group)
        if isinstance(how, _Division):
            parts = self._attend_divided(how, module, *wide, **settings)
            return torch.cat(list(parts), 1).to(query.dtype)
        if isinstance(how, _Plan):
            return self._attend_planned(attend, *wide, how).to(query.dtype)
        return self._attend_padded(attend, *wide, how).to(query.dtype)

    def _how(self, mask: torch.Tensor, group: int) -> _How:
        """Return how a mask's layers attend, where so many heads share keys.

        That is a mask (rows, 1, group * columns, visible), a plan, or a division. All layers of a
        pass have the same few masks.
        """
        known = self._of_masks.get((id(mask), group))
        if known is None:
            known = self._of_masks[id(mask), group] = mask, self._choose(mask, group)
        return known[1]

    def _choose(self, mask: torch.Tensor, group: int) -> _How:
        if self.width >= _WIDE:
            return self._divide(mask)
        padded = self._pads(group)
        return mask.float().repeat(1, 1, group, 1) if padded else self._plan(mask, group)

    def _plan(self, mask: torch.Tensor, group: int) -> _Plan:
        """Return how tokens attend without padding."""
        wide, earlier = mask.float(), []
        for row, (end, length) in enumerate(zip(self._ends, self.lengths, strict=True)):
            if length > 1:
                seen = self.visible[row] - 1
                own = wide[row : row + 1, :, self.width - length : -1, :seen]
                own_mask = own.repeat(1, 1, group, 1) if own.any() else None
                earlier.append(_Part(row, slice(end - length, end - 1), seen, own_mask))
        return _Plan(wide[:, :, -1:].repeat(1, 1, group, 1), earlier)

    def _divide(self, mask: torch.Tensor) -> _Division:
        """Return the masks of what attends apart."""
        before, first, of_before = self._before, 0, mask[:0]
        if before is not None:
            first = len(before.lengths)
            of_before = mask[:first, :, self.width - before.width :, : max(before.visible)]
        rows = enumerate(zip(self.lengths[first:], self.visible[first:], strict=True), first)
        alone = [
            plain_mask(mask[row : row + 1, :, self.width - length :, :seen])
            for row, (length, seen) in rows
        ]
        return _Division(of_before, alone)

    def _attend_divided(
        self,
        masks: _Division,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        kernel: Kernel,
        **settings: Any,
    ) -> Iterator[torch.Tensor]:
        """Yield attention of the rows before the first with many tokens, then of each other row."""
        first = 0
        if (before := self._before) is not None:
            first, seen = len(before.lengths), max(before.visible)
            keys, values = key[:first, :, :seen], value[:first, :, :seen]
            own = query[:, :, : len(before.row)]
            yield before.attend(module, own, keys, values, masks.before, kernel=kernel, **settings)
        queries = query.split(list(self.lengths), 2)
        for row, own_mask in enumerate(masks.alone, first):
            seen = self.visible[row]
            keys, values = key[row : row + 1, :, :seen], value[row : row + 1, :, :seen]
            yield kernel(module, queries[row], keys, values, own_mask, **settings)[0]

    def _attend_padded(
        self,
        attend: _Attend,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Compute attention of a batch in which all rows are as wide as the longest."""
        by_token = query[0].transpose(0, 1)
        laid_out = query.new_zeros(len(self.lengths), self.width, *by_token.shape[1:])
        laid_out[self.row, self.column] = by_token
        return attend(laid_out.transpose(1, 2), key, value, mask)[self.row, self.column][None]

    def _attend_planned(
        self,
        attend: _Attend,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        plan: _Plan,
    ) -> torch.Tensor:
        """Compute attention of the last tokens together, and of each row's earlier ones."""
        by_token = query.transpose(0, 2)  # a row of one token for each
        last = by_token[self._last] if plan.earlier else by_token
        of_last = attend(last, key, value, plan.last).transpose(0, 1)
        if not plan.earlier:
            return of_last
        result = of_last.new_empty(1, len(by_token), *of_last.shape[2:])
        result[:, self._last] = of_last
        for row, own, seen, mask in plan.earlier:
            of_row = key[row : row + 1, :, :seen], value[row : row + 1, :, :seen]
            result[:, own] = attend(query[:, :, own], *of_row, mask)
        return result


_now: ContextVar[RaggedRows | None] = ContextVar("ragged", default=None)
ragged_now = _now.get


@contextlib.contextmanager
def ragged(rows: RaggedRows | None) -> Iterator[None]:
    """Inside the block, a sequence holds the new tokens of rows whose keys a cache returns."""
    token = _now.set(rows)
    try:
        yield
    finally:
        _now.reset(token)


def plain_mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Return a mask as attention in float32 takes it, None for the causal mask of one row.

    A mask is (rows, 1, queries, keys), bool or what is added. Without one, PyTorch leaves out what
    a token does not see.
    """
    if mask is None:
        return None
    is_square = len(mask) == 1 and mask.shape[2] == mask.shape[3]
    if is_square and are_causal(mask == 0 if mask.is_floating_point() else mask):
        return None
    return mask.float() if mask.is_floating_point() else mask
