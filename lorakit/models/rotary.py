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
        self._given: tuple[Any, Any] = None, None  # the cosines and sines that `_angles` are of
        self._angles: dict[int, _Pair] = {}  # by the number of heads

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *positions: Any,
        unsqueeze_dim: int = 1,
        **others: Any,
    ) -> _Pair:
        """Return q and k turned; they are (rows, heads, tokens, width), cos and sin (rows, tokens,
        width), or heads come after tokens where `unsqueeze_dim` is 2."""
        fits = q.shape[-1] == k.shape[-1] == cos.shape[-1] and q.dtype == k.dtype == cos.dtype
        if positions or others or not fits or cos.dim() != q.dim() - 1:
            more = {"unsqueeze_dim": unsqueeze_dim, **others}
            return self._plain(q, k, cos, sin, *positions, **more)
        if self._given[0] is not cos or self._given[1] is not sin:
            self._given, self._angles = (cos, sin), {}
        return self._turned(q, unsqueeze_dim), self._turned(k, unsqueeze_dim)

    def _turned(self, x: torch.Tensor, heads_at: int) -> torch.Tensor:
        """Return queries or keys turned."""
        rows = x.transpose(1, 2) if heads_at == 1 else x  # as projections lay them out
        heads = rows.shape[2]
        if heads not in self._angles:
            self._angles[heads] = _angles(*self._given, heads)
        turned: torch.Tensor = _Turn.apply(rows, *self._angles[heads])  # type: ignore[no-untyped-call]
        return turned.transpose(1, 2) if heads_at == 1 else turned


def _angles(cos: torch.Tensor, sin: torch.Tensor, heads: int) -> _Pair:
    """Return the cosines, and the sines with their signs: (rows, tokens, 1, width).

    On a GPU they are (rows, tokens, heads, width).
    """
    first, second = sin.chunk(2, -1)
    pair = cos.unsqueeze(2), torch.cat([-first, second], -1).unsqueeze(2)
    if cos.device.type == "cpu":
        return pair
    of_all, signed = (part.expand(-1, -1, heads, -1).contiguous() for part in pair)
    return of_all, signed


class _Turn(torch.autograd.Function):
    """x·cos + swapped(x)·sin, and its gradient, of halves that are swapped."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return (x * cos).add_(_swapped(x).mul_(sin))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return (grad * cos).add_(_swapped(grad * sin)), None, None


def _swapped(x: torch.Tensor) -> torch.Tensor:
    """Return a copy of x (…, width) with the halves of its last dimension swapped."""
    return x.roll(x.shape[-1] // 2, -1)


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
