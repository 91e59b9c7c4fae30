"""How a base attends on a CPU: in float32, and row by row if rows are packed into one sequence.

PyTorch's bfloat16 attention has a slow backward pass there. A packed sequence (row_masks.py) is cut
into its rows, and attention is computed for each alone. A few families cannot be told to attend so:
they attend as on a GPU (gpu_attention.py).

Rows whose keys and values lie in a cache may have new tokens in different numbers. Inside `ragged`
they too come as one sequence, so that no layer computes padding but attention, where it is cheap:

    row 0 reads a b c, row 1 reads d: the layers see a b c d, attention sees  a b c / d · ·

Rows that read a whole prompt attend one by one, as packed ones do.

How rows are packed is decided in batches.py, which tokens rows read in reading.py; how a base
attends on a GPU in gpu_attention.py.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from types import ModuleType
from typing import NamedTuple

import torch
import transformers

from lorakit.models.architecture import Model, python_modules
from lorakit.models.gpu_attention import choose_kernels, pytorchs, queries_a_key, ungrouped
from lorakit.models.row_masks import RowMasks, are_causal, make_masks

BY_ROW = "sdpa_by_row"
# New tokens of a row from which a batch saves less than it loses by computing what is hidden.
_WIDE = 16
# Code that compares the attention's name with that of PyTorch's.
_NAMED = re.compile(r"_attn_implementation\s*(==|!=|(not\s+)?in\b)[^\n]*[\"']sdpa[\"']")
_ragged: ContextVar[RaggedRows | None] = ContextVar("ragged", default=None)


class RaggedRows(NamedTuple):
    """Where each token of a sequence belongs in a batch of rows, all as wide as the longest.

    `row` and `column` are (tokens,). `lengths` are the rows' new tokens, in the last columns, and
    `visible` those that each sees with those before them.
    """

    row: torch.Tensor
    column: torch.Tensor
    lengths: Sequence[int]
    visible: Sequence[int]

    @property
    def width(self) -> int:
        return max(self.lengths)

    def apart(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor | None, ...]]:
        """Yield query, key, value and mask of each row, all of them (1, heads or 1, …)."""
        queries = query.split(list(self.lengths), 2)
        for place, (own, seen) in enumerate(zip(queries, self.visible, strict=True)):
            row = slice(place, place + 1)
            own_mask = _plain(mask[row, :, self.width - own.shape[2] :, :seen])
            yield own, key[row, :, :seen], value[row, :, :seen], own_mask

    def laid_out(self, query: torch.Tensor, group: int) -> torch.Tensor:
        """Return (rows, heads / group, group * width, values), 0 where no token is.

        query is (1, heads, tokens, values). The queries of a group of heads follow one another.
        """
        heads = query.shape[1] // group
        size = len(self.lengths), heads, group, self.width, query.shape[3]
        rows = query.new_zeros(size)
        rows[self.row, :, :, self.column] = query[0].transpose(0, 1).unflatten(1, (heads, group))
        return rows.flatten(2, 3)

    def in_sequence(self, attended: torch.Tensor, group: int) -> torch.Tensor:
        """Return (1, tokens, heads, values) from (rows, group * width, heads / group, values)."""
        by_group = attended.unflatten(1, (group, self.width))
        tokens: torch.Tensor = by_group[self.row, :, self.column].transpose(1, 2)
        return tokens.reshape(1, len(self.row), -1, attended.shape[-1])


@contextlib.contextmanager
def ragged(rows: RaggedRows | None) -> Iterator[None]:
    """Inside the block, a sequence holds the new tokens of rows whose keys a cache returns."""
    token = _ragged.set(rows)
    try:
        yield
    finally:
        _ragged.reset(token)


def set_attention(model: Model, device: torch.device) -> None:
    """Make a model that uses PyTorch's attention attend as this module says on a device."""
    if device.type == "cuda":
        choose_kernels()
    if attends_by_row(model, device):
        model.set_attn_implementation(BY_ROW)


def attends_by_row(model: Model, device: torch.device) -> bool:
    """Return whether a model, as transformers makes it, is set to attend by row on a device.

    It gets another name for its attention then, under which some families would compute otherwise
    (Gemma 4, DeepSeek V3.2). Those keep "sdpa", as all do on a GPU. The model may be without
    weights.
    """
    is_pytorchs = model.config._attn_implementation == "sdpa"
    return device.type == "cpu" and is_pytorchs and not any(map(_asks, python_modules(model)))


@functools.cache
def _asks(module: ModuleType) -> bool:
    """Return whether the code of a Python module asks for the attention by its name."""
    try:
        return _NAMED.search(inspect.getsource(module)) is not None
    except (OSError, TypeError):  # there is no source
        return False


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | RowMasks | None,
    **settings: object,
) -> tuple[torch.Tensor, None]:
    """Compute attention by transformers' own function, in float32 and for each packed row alone.

    query, key and value are (1 or rows, heads, tokens, width). Some models pass them by name.
    """
    mask = attention_mask
    if (rows := _ragged.get()) is not None and isinstance(mask, torch.Tensor):
        return _attend_ragged(rows, module, query, key, value, mask, **settings), None
    wide = [tensor.float() for tensor in (query, key, value)]
    if isinstance(mask, RowMasks):
        parts = zip(*(tensor.split(mask.lengths, 2) for tensor in wide), strict=True)
        attended = [
            pytorchs(module, *part, part_mask, **settings)[0]
            for part, part_mask in zip(parts, mask.masks, strict=True)
        ]
        return torch.cat(attended, 1).to(query.dtype), None
    return pytorchs(module, *wide, _plain(mask), **settings)[0].to(query.dtype), None


def _attend_ragged(
    rows: RaggedRows,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    **settings: object,
) -> torch.Tensor:
    """Compute attention (1, tokens, heads, values) of the new tokens of rows; see `ragged`.

    Where heads share keys, transformers copies the keys to each head as soon as rows have two new
    tokens. Instead, the queries of these heads are taken for more tokens of one head. Where there
    are many new tokens, each row attends alone.
    """
    if rows.width >= _WIDE:
        apart = rows.apart(query.float(), key.float(), value.float(), mask)
        alone = [pytorchs(module, *row, **settings)[0] for row in apart]
        return torch.cat(alone, 1).to(query.dtype)
    group = queries_a_key(query, key, **settings)
    if group > 1:
        mask, module = mask.repeat(1, 1, group, 1), ungrouped
    laid_out = rows.laid_out(query, group).float()
    attended, _ = pytorchs(module, laid_out, key.float(), value.float(), mask.float(), **settings)
    return rows.in_sequence(attended, group).to(query.dtype)


def _plain(mask: torch.Tensor | None) -> torch.Tensor | None:
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


transformers.AttentionInterface.register(BY_ROW, _attention)
transformers.AttentionMaskInterface.register(BY_ROW, make_masks)
