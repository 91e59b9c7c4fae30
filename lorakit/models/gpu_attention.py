"""How a base attends on a GPU: as transformers does, but for packed rows and shared keys.

So do, on a CPU, those that attention.py cannot tell to attend otherwise.

Packed rows (row_masks.py) attend in one call: PyTorch's attention over rows of several lengths,
where it takes their dtype; else as a batch padded on the right, where the causal mask hides the
padding. Rows with another mask, of a sliding window that ends within them, attend one by one, and
so do rows of which the longest would leave more padding than tokens.

Inside `in_groups` heads that share keys attend without a copy of these keys for each: there, only
few tokens are new, and keys are most of what is read.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
import transformers

from lorakit.models.devices import is_recent_nvidia
from lorakit.models.fixed_order import (
    allow_fixed_order,
    fixed_order,
    fixed_order_begins,
    fixed_order_ends,
)
from lorakit.models.row_masks import RowMasks, make_masks

Kernel = Callable[..., tuple[torch.Tensor, None]]
# transformers' call of PyTorch's attention
pytorchs: Kernel = transformers.AttentionInterface()["sdpa"]
_ungrouped: Any = types.SimpleNamespace(is_causal=False)  # a module whose heads share no keys
_HALF = (torch.bfloat16, torch.float16)  # what attention over several lengths takes
_WIDEST = 256  # of its heads
_in_groups: ContextVar[bool] = ContextVar("in_groups", default=False)


@contextlib.contextmanager
def in_groups() -> Iterator[None]:
    """Inside the block, heads that share keys are not given copies of them."""
    token = _in_groups.set(True)
    try:
        yield
    finally:
        _in_groups.reset(token)


def choose_kernels() -> None:
    """Leave cuDNN's attention out in this process, and let attention sum in a fixed order.

    cuDNN's gives gradients that are no numbers for some lengths of masked rows
    (pytorch/pytorch#196678).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    allow_fixed_order()


def queries_a_key(query: torch.Tensor, key: torch.Tensor, **settings: object) -> int:
    """Return how many heads share keys; 1 if each is to be treated by itself."""
    has_bias = settings.get("position_bias") is not None  # each head has its own
    return 1 if has_bias else query.shape[1] // key.shape[1]


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | RowMasks | None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention (rows, tokens, heads, values), mostly by transformers' own function.

    query, key and value are (rows, heads, tokens, values). Some models pass them by name.
    """
    if isinstance(attention_mask, RowMasks) and attention_mask.causal:
        together = _attend_over_lengths(module, query, key, value, attention_mask, **settings)
        if together is not None:
            return together, None
    if query.device.type != "cuda" or not torch.is_grad_enabled():
        return _attend(module, query, key, value, attention_mask, **settings), None
    query, key, value = fixed_order_ends(query, key, value)
    return fixed_order_begins(_attend(module, query, key, value, attention_mask, **settings)), None


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | RowMasks | None,
    **settings: Any,
) -> torch.Tensor:
    """Compute attention of any mask.

    Inside `in_groups` the queries of heads that share keys are taken for more tokens of one head.
    """
    if isinstance(mask, RowMasks):
        return _attend_packed(module, query, key, value, mask, **settings)
    group = queries_a_key(query, key, **settings) if _in_groups.get() else 1
    if group == 1 or mask is None or mask.shape[1] > 1:
        attended: torch.Tensor = pytorchs(module, query, key, value, mask, **settings)[0]
        return attended
    masks = mask.repeat(1, 1, group, 1)
    return attend_in_groups(module, query, key, value, masks, group, **settings)


def attend_in_groups(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    masks: torch.Tensor | None,
    group: int,
    kernel: Kernel = pytorchs,
    **settings: Any,
) -> torch.Tensor:
    """Compute attention (rows, tokens, heads, values) where so many heads share keys.

    Their queries are taken for more tokens of one head: `masks` are (rows, 1, group * tokens,
    keys). A group of one attends as the module does. The kernel is called as transformers' own.
    """
    if group == 1:
        return kernel(module, query, key, value, masks, **settings)[0]
    grouped = query.unflatten(1, (-1, group)).flatten(2, 3)
    by_group = kernel(_ungrouped, grouped, key, value, masks, **settings)[0]
    # (rows, group, tokens, heads / group, values)
    apart: torch.Tensor = by_group.unflatten(1, (group, -1))
    return apart.permute(0, 2, 3, 1, 4).flatten(2, 3)


def _attend_packed(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: RowMasks,
    **settings: Any,
) -> torch.Tensor:
    """Compute attention (1, tokens, heads, values) of packed rows."""
    if rows.causal and len(rows.lengths) * max(rows.lengths) <= 2 * sum(rows.lengths):
        return _attend_padded(module, query, key, value, rows, **settings)
    parts = [tensor.split(rows.lengths, 2) for tensor in (query, key, value)]
    attended = [
        _attend_alone(module, q, k, v, mask, **settings)
        for q, k, v, mask in zip(*parts, rows.masks, strict=True)
    ]
    return torch.cat(attended, 1)


def _attend_alone(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **settings: Any,
) -> torch.Tensor:
    """Compute attention of rows of one length, with the causal mask where there is none.

    In float32, heads that share keys get copies of them: without a mask PyTorch's fast kernels for
    that dtype take as many keys as queries, and others hold every score.
    """
    group = query.shape[1] // key.shape[1]
    if mask is None and group > 1 and query.dtype not in _HALF:
        key, value = (tensor.repeat_interleave(group, 1) for tensor in (key, value))
        module, settings = _ungrouped, {**settings, "is_causal": True}
    attended: torch.Tensor = pytorchs(module, query, key, value, mask, **settings)[0]
    return attended


def _by_tokens(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return a sequence's queries, keys and values as (tokens, heads, values)."""
    return [tensor.squeeze(0).transpose(0, 1) for tensor in tensors]


def _attend_over_lengths(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: RowMasks,
    **settings: Any,
) -> torch.Tensor | None:
    """Compute attention (1, tokens, heads, values) of all packed rows in one call, if one can."""
    tokens = _by_tokens(query, key, value)
    if not _takes_lengths(module, *tokens, **settings):
        return None
    attend = _over_lengths(query.device)
    if attend is None:
        return None
    return attend(*tokens, rows.ends, max(rows.lengths), settings.get("scaling"))[None]


def _takes_lengths(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    **settings: Any,
) -> bool:
    """Return whether attention over several lengths computes what these settings ask for."""
    return (
        query.dtype in _HALF
        and query.shape[2] == key.shape[2] == value.shape[2] <= _WIDEST
        and query.shape[2] % 8 == 0
        and not settings.get("dropout")
        and settings.get("position_bias") is None
        and settings.get("is_causal", getattr(module, "is_causal", True)) is not False
    )


@functools.cache
def _over_lengths(device: torch.device) -> Callable[..., torch.Tensor] | None:
    """Return attention over rows of several lengths, None where a device has none, by a trial."""
    if device.type != "cuda" or not is_recent_nvidia(device):
        return None
    attend: Callable[..., torch.Tensor] = _OverLengths.apply
    ends = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
    query = torch.zeros(5, 2, 8, dtype=torch.bfloat16, device=device, requires_grad=True)
    key = query.detach()[:, :1]
    try:
        with torch.enable_grad():
            attend(query, key, key, ends, 3, None).sum().backward()
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return None
    return attend


class _OverLengths(torch.autograd.Function):
    """Causal attention (tokens, heads, values) of rows in one sequence, by PyTorch's own kernels.

    `torch.nn.attention.varlen` calls the same ones, later in Python and without a fixed order.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        ends: torch.Tensor,
        longest: int,
        scale: float | None,
    ) -> torch.Tensor:
        lengths = ends, ends, longest, longest
        attended, sums, *state, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, *lengths, 0.0, True, False, scale=scale
        )
        state = [torch.empty(0, device=query.device) if s is None else s for s in state]
        ctx.save_for_backward(query, key, value, attended, sums, ends, *state)
        ctx.longest, ctx.scale = longest, scale
        return attended  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *given, ends, state, unused = ctx.saved_tensors
        lengths = ends, ends, ctx.longest, ctx.longest
        with fixed_order():
            grads = torch.ops.aten._flash_attention_backward(
                grad, *given, *lengths, 0.0, True, state, unused, scale=ctx.scale
            )
        return *grads, None, None, None


def _attend_padded(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: RowMasks,
    **settings: Any,
) -> torch.Tensor:
    """Compute attention of packed rows as a batch that is padded on the right."""
    tokens = _by_tokens(query, key, value)
    size = len(rows.lengths), max(rows.lengths)
    batch = [
        tensor.new_zeros(size[0] * size[1], *tensor.shape[1:])
        .index_copy(0, rows.places, tensor)
        .unflatten(0, size)
        .transpose(1, 2)
        for tensor in tokens
    ]
    query, key, value = batch
    attended = _attend_alone(module, query, key, value, None, **settings)
    return attended.flatten(0, 1).index_select(0, rows.places)[None]


transformers.AttentionInterface.register("sdpa", _attention)
transformers.AttentionMaskInterface.register("sdpa", make_masks)
