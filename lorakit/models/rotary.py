"""Rotary positions by fewer operations, to the same bits: x·cos + swapped(x)·(−sin, sin).

transformers turns the two halves of a head by five operations, and by thirteen in the backward
pass, most of which move or negate a half: on a GPU a tenth of a training step. Here four do, both
ways, of which only the swap of the halves moves anything, the signs being in the sines. A GPU is
given the angles of every head, for which its kernels take whole tensors, once for all layers.

Families' functions differ (GPT-J turns neighbours, not halves), so those are replaced that a trial
shows to compute the same.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from lorakit.models.architecture import Model

_NAME = "apply_rotary_pos_emb"  # in transformers' modules of families
_Pair = tuple[torch.Tensor, torch.Tensor]
_Rotate = Callable[..., _Pair]


@contextlib.contextmanager
def fused_rotary(model: Model) -> Iterator[None]:
    """Inside the block, models of this one's family turn queries and keys by fewer operations."""
    replaced = {module: getattr(module, _NAME) for module in fusible_modules(model)}
    try:
        for module, rotate in replaced.items():
            setattr(module, _NAME, _Rotary(rotate))
        yield
    finally:
        for module, rotate in replaced.items():
            setattr(module, _NAME, rotate)


def fusible_modules(model: Model) -> Iterator[ModuleType]:
    """Yield the Python modules of a model's classes whose function computes what is done here.

    The model may be without weights.
    """
    names = {type(part).__module__ for part in model.modules()}
    for module in (sys.modules[name] for name in sorted(names)):
        rotate = getattr(module, _NAME, None)
        if rotate is not None and not isinstance(rotate, _Rotary) and _computes_the_same(rotate):
            yield module


class _Rotary:
    """Turns queries and keys; by transformers' function where it is asked for anything else."""

    def __init__(self, plain: _Rotate) -> None:
        self._plain = plain
        self._given: tuple[Any, Any] = None, None  # the cosines and sines of what is kept here:
        self._sin = torch.empty(0)  # with signs, (rows, tokens, 1, width)
        self._cos: dict[int, torch.Tensor] = {}  # by the number of heads

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *positions: Any,
        **options: Any,
    ) -> _Pair:
        """Return q and k (rows, heads, tokens, width) turned by cos and sin (rows, tokens, width).

        Where the option `unsqueeze_dim` is 2, heads come after tokens.
        """
        fits = q.shape[-1] == k.shape[-1] == cos.shape[-1] and q.dtype == k.dtype == cos.dtype
        if positions or options.keys() - {"unsqueeze_dim"} or not fits or cos.dim() != q.dim() - 1:
            return self._plain(q, k, cos, sin, *positions, **options)
        if self._given[0] is not cos or self._given[1] is not sin:
            first, second = sin.chunk(2, -1)
            self._given, self._cos = (cos, sin), {}
            self._sin = torch.cat([-first, second], -1).unsqueeze(2)
        heads_at = options.get("unsqueeze_dim", 1)
        return self._turned(q, heads_at), self._turned(k, heads_at)

    def _turned(self, x: torch.Tensor, heads_at: int) -> torch.Tensor:
        """Return queries or keys turned."""
        rows = x.transpose(1, 2) if heads_at == 1 else x  # as projections lay them out
        cos = self._cos_of(rows.shape[2])
        turned: torch.Tensor = _Turn.apply(rows, cos, self._sin)  # type: ignore[no-untyped-call]
        return turned.transpose(1, 2) if heads_at == 1 else turned

    def _cos_of(self, heads: int) -> torch.Tensor:
        """Return the cosines (rows, tokens, 1, width); (rows, tokens, heads, width) on a GPU."""
        if heads not in self._cos:
            cos = self._given[0].unsqueeze(2)
            on_cpu = cos.device.type == "cpu"
            self._cos[heads] = cos if on_cpu else cos.expand(-1, -1, heads, -1).contiguous()
        return self._cos[heads]


class _Turn(torch.autograd.Function):
    """x·cos + swapped(x)·sin, and its gradient, of halves that are swapped."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        first, second = sin.chunk(2, -1)
        return (x * cos).add_(_crossed(x, first, second))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, -1)
        return (grad * cos).add_(_crossed(grad, second, first)), None, None


def _crossed(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the second half of x times `first`, then the first half times `second`."""
    crossed = torch.empty_like(x)
    halves = zip(crossed.chunk(2, -1), reversed(x.chunk(2, -1)), (first, second), strict=True)
    for place, half, factor in halves:
        torch.mul(half, factor, out=place)
    return crossed


@functools.cache
def _computes_the_same(rotate: _Rotate) -> bool:
    """Return whether a family's function gives what `_Rotary` does, to the bit."""
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 3, 5, 8, generator=draw), torch.randn(2, 1, 5, 8, generator=draw)
    cos, sin = torch.randn(2, 2, 5, 8, generator=draw)
    try:
        expected = rotate(q, k, cos, sin)
        return all(map(torch.equal, expected, _Rotary(rotate)(q, k, cos, sin)))
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False
