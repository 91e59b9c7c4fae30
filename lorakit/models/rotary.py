"""Rotary positions by fewer operations, to the same bits: x·cos + swapped(x)·(−sin, sin).

transformers turns the two halves of a head by five operations, and by thirteen in the backward
pass, most of which move or negate a half: on a GPU a tenth of a training step. There, in half
precision, one kernel does, both ways; elsewhere four operations, as the sines have the signs. On
all devices but a CPU the cosines are repeated for every head, once for all layers: operations are
fast where nothing is left to repeat.

Families' functions differ (GPT-J turns neighbours, not halves), so those are replaced that a trial
shows to compute the same.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch

from lorakit.models.architecture import Model, at_the_head, python_modules
from lorakit.models.gpu_kernels import kernels_for
from lorakit.models.trials import DTYPES, compute_the_same

_NAME = "apply_rotary_pos_emb"  # in transformers' modules of families
_Pair = tuple[torch.Tensor, torch.Tensor]
_Rotate = Callable[..., _Pair]


@contextlib.contextmanager
def fused_rotary(model: Model) -> Iterator[None]:
    """Inside the block, models of this one's family turn queries and keys by fewer operations.

    What is replaced is a function of transformers', for all threads.
    """
    replaced = {module: getattr(module, _NAME) for module in fusible_modules(model)}
    rotaries = {module: _Rotary(rotate) for module, rotate in replaced.items()}

    def forget() -> None:
        for rotary in rotaries.values():
            rotary.forget()

    try:
        for module, rotary in rotaries.items():
            setattr(module, _NAME, rotary)
        with at_the_head(model, forget):
            yield
    finally:
        for module, rotate in replaced.items():
            setattr(module, _NAME, rotate)


def fusible_modules(model: Model) -> Iterator[ModuleType]:
    """Yield the Python modules of a model's classes whose function computes what is done here.

    The model may be without weights.
    """
    for module in python_modules(model):
        rotate = getattr(module, _NAME, None)
        if rotate is not None and not isinstance(rotate, _Rotary) and _computes_the_same(rotate):
            yield module


class _Angles(NamedTuple):
    """The cosines and sines that a model gave, and what is made of them."""

    cos: torch.Tensor
    sin: torch.Tensor
    signed: torch.Tensor  # the sines with signs, (rows, tokens, 1, width)
    by_heads: dict[int, torch.Tensor]  # the cosines by the number of heads


class _Rotary:
    """Turns queries and keys; by transformers' function where it is asked for anything else."""

    def __init__(self, plain: _Rotate) -> None:
        self._plain = plain
        self._angles: list[_Angles] = []  # of this pass: some models have two, for windows

    def forget(self) -> None:
        """Forget the angles of a pass."""
        self._angles = []

    def __call__(self, *given: torch.Tensor, **options: Any) -> _Pair:
        """Return q and k (rows, heads, tokens, width) turned by cos and sin (rows, tokens, width).

        Where the option `unsqueeze_dim` is 2, heads come after tokens.
        """
        heads_at = options.get("unsqueeze_dim", 1)
        if options.keys() - {"unsqueeze_dim"} or heads_at not in (1, 2) or not _fit(given):
            return self._plain(*given, **options)
        q, k, cos, sin = given
        kernels, rows = kernels_for(q), [_by_tokens(x, heads_at) for x in (q, k)]
        if kernels is not None and all(map(_lies_by_tokens, rows)):
            cos, sin = cos.contiguous(), sin.contiguous()
            turned = [_KernelTurn.apply(x, cos, sin, kernels) for x in rows]  # type: ignore[no-untyped-call]
            return _by_tokens(turned[0], heads_at), _by_tokens(turned[1], heads_at)
        angles = self._angles_of(cos, sin)
        return _turned(q, angles, heads_at), _turned(k, angles, heads_at)

    def _angles_of(self, cos: torch.Tensor, sin: torch.Tensor) -> _Angles:
        for angles in self._angles:
            if angles.cos is cos and angles.sin is sin:
                return angles
        first, second = sin.chunk(2, -1)
        signed = torch.cat([-first, second], -1).unsqueeze(2)
        self._angles.append(_Angles(cos, sin, signed, {}))
        return self._angles[-1]


def _fit(given: tuple[torch.Tensor, ...]) -> bool:
    """Return whether these are q, k, cos and sin as `_Rotary` turns them."""
    if len(given) != 4:
        return False
    q, k, cos, sin = given
    return (
        q.dim() == k.dim() == 4
        and cos.dim() == sin.dim() == 3
        and q.shape[-1] == k.shape[-1] == cos.shape[-1] == sin.shape[-1]
        and q.dtype == k.dtype == cos.dtype == sin.dtype
    )


def _turned(x: torch.Tensor, angles: _Angles, heads_at: int) -> torch.Tensor:
    """Return queries or keys turned."""
    rows = _by_tokens(x, heads_at)
    cos = _cosines(angles, rows.shape[2])
    turned: torch.Tensor = _Turn.apply(rows, cos, angles.signed)  # type: ignore[no-untyped-call]
    return _by_tokens(turned, heads_at)


def _by_tokens(x: torch.Tensor, heads_at: int) -> torch.Tensor:
    """Return a view (rows, tokens, heads, width), as projections lay them out; or back from it."""
    return x.transpose(1, 2) if heads_at == 1 else x


def _lies_by_tokens(x: torch.Tensor) -> bool:
    """Return whether heads lie together by token, and all tokens at one distance."""
    rows, tokens, _, width = x.shape
    by_rows = rows == 1 or x.stride(0) == tokens * x.stride(1)
    return by_rows and x.stride()[2:] == (width, 1) and width % 2 == 0


def _cosines(angles: _Angles, heads: int) -> torch.Tensor:
    """Return the cosines (rows, tokens, 1, width); (rows, tokens, heads, width) but on a CPU."""
    if heads not in angles.by_heads:
        cos = angles.cos.unsqueeze(2)
        on_cpu = cos.device.type == "cpu"
        angles.by_heads[heads] = cos if on_cpu else cos.expand(-1, -1, heads, -1).contiguous()
    return angles.by_heads[heads]


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


class _KernelTurn(torch.autograd.Function):
    """What `_Turn` does, of cosines and sines as a model gives them, by one kernel each way."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kernels: ModuleType
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.kernels = kernels
        turned: torch.Tensor = kernels.turn(x, cos, sin)
        return turned

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        given = grad if _lies_by_tokens(grad) else grad.contiguous()
        return ctx.kernels.turn(given, cos, sin, back=True), None, None, None


def _crossed(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the second half of x times `first`, then the first half times `second`."""
    crossed = torch.empty_like(x)
    halves = zip(crossed.chunk(2, -1), reversed(x.chunk(2, -1)), (first, second), strict=True)
    for place, half, factor in halves:
        torch.mul(half, factor, out=place)
    return crossed


@functools.cache
def _computes_the_same(rotate: _Rotate) -> bool:
    """Return whether a family's function gives what `_Rotary` does, with its gradient."""
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 3, 5, 8, generator=draw), torch.randn(2, 1, 5, 8, generator=draw)
    angles = torch.randn(2, 2, 5, 8, generator=draw)

    def same(dtype: torch.dtype) -> bool:
        cos, sin = angles.to(dtype)
        return compute_the_same(
            lambda q, k: rotate(q, k, cos, sin),
            lambda q, k: _Rotary(rotate)(q, k, cos, sin),
            [q.to(dtype), k.to(dtype)],
        )

    return all(map(same, DTYPES))
