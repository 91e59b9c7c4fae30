"""Parts of a training step, each as one kernel of a GPU, by Triton.

PyTorch has operations for these parts that each read and write all they compute with, and Python
starts them one by one: on a GPU the processor falls behind, and hidden states are moved more often
than they are computed with. Here each value is read once and written once.

What is computed element by element is rounded where PyTorch's operations round it, so that norms
aside, which sum in another order, the bits are theirs. LoRA's products are those of float32, by
an error of 2e-6 at most in their norm: a float32 factor is the sum of three in bfloat16 or
TensorFloat-32, of which the GPU multiplies each. Sums are in a fixed order.

Tensors are in half precision, except for A, B, their gradients, and A·x. Triton has to be here
to import this module; gpu_kernels.py knows whether it is.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

WIDEST_NORM = 16_384  # values that one program holds
HIGHEST_RANK = 128
_INNER = 2048  # of the elements of a gated MLP that a program computes
_WARPS = 8
_ALIGNED = 16  # bytes, and elements: what Triton compiles faster code for


# — how they are launched —


def _launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[torch.Tensor, ...],
    sizes: tuple[int, ...],
    constants: tuple[Any, ...],
    **options: Any,
) -> None:
    """Launch a kernel on its parameters, in this order: `sizes` are those that vary by the batch.

    Triton finds what it has compiled by looking at every argument, which takes several times as
    long as the launch. So what it found is kept, by all that it depends on.
    """
    device, pointers = tensors[0].device, 0
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launch(kernel, grid, tensors, sizes, constants, **options)
        return
    for tensor in tensors:
        pointers |= tensor.data_ptr()
    kinds = tuple(tensor.dtype for tensor in tensors)
    divisible = tuple(size % _ALIGNED == 0 for size in sizes)
    key = kernel, device.index, kinds, divisible, constants
    known = _compiled.get(key) if pointers % _ALIGNED == 0 and 1 not in sizes else None
    if known is not None:
        known[grid](*tensors, *sizes, *constants)
        return
    found = kernel[grid](*tensors, *sizes, *constants, **options)
    if pointers % _ALIGNED == 0 and 1 not in sizes and hasattr(found, "run"):
        _compiled[key] = found


_compiled: dict[tuple[Any, ...], Any] = {}


# — norms —


def norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, ...]:
    """Return w·x·r (…, width) of a contiguous x, and r = 1 / √(mean of x² + ε), float32 (rows,)."""
    width = x.shape[-1]
    rows = x.numel() // width
    out, root = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    given = (x, weight, out, root)
    _launch(_norm, (rows, 1, 1), given, (), (width, epsilon, block), num_warps=_WARPS)
    return out, root


@triton.jit
def _norm(x, weight, out, root, width, epsilon, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    inside = at < width
    given = tl.load(x + row * width + at, mask=inside, other=0)
    wide = given.to(tl.float32)
    r = libdevice.rsqrt(tl.sum(wide * wide, 0) / width + epsilon)
    tl.store(root + row, r)
    normed = (wide * r).to(given.dtype).to(tl.float32)
    tl.store(
        out + row * width + at,
        normed * tl.load(weight + at, mask=inside, other=0).to(tl.float32),
        mask=inside,
    )


def norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, root: torch.Tensor
) -> torch.Tensor:
    """Return the gradient of x: r·(g·w) − x·r³·(sum of g·w·x) / width."""
    width = x.shape[-1]
    out, grad = torch.empty_like(x), grad.contiguous()
    block = triton.next_power_of_2(width)
    given, grid = (grad, x, weight, root, out), (root.numel(), 1, 1)
    _launch(_norm_backward, grid, given, (), (width, block), num_warps=_WARPS)
    return out


@triton.jit
def _norm_backward(grad, x, weight, root, out, width, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, block)
    inside = at < width
    due = tl.load(grad + row * width + at, mask=inside, other=0)
    wide = tl.load(x + row * width + at, mask=inside, other=0).to(tl.float32)
    weights = tl.load(weight + at, mask=inside, other=0).to(tl.float32)
    weighted = (due.to(tl.float32) * weights).to(due.dtype).to(tl.float32)
    r = tl.load(root + row)
    along = tl.sum(weighted * wide, 0) * r * r * r / width
    tl.store(out + row * width + at, weighted * r - along * wide, mask=inside)


# — gated MLPs —


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate)·up of contiguous tensors of one shape."""
    out, count = torch.empty_like(gate), gate.numel()
    grid = triton.cdiv(count, _INNER), 1, 1
    _launch(_swiglu, grid, (gate, up, out), (count,), (_INNER,), num_warps=_WARPS)
    return out


@triton.jit
def _swiglu(gate, up, out, count, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < count
    given = tl.load(gate + at, mask=inside, other=0)
    wide = given.to(tl.float32)
    activated = tl.div_rn(wide, 1 + libdevice.exp(-wide)).to(given.dtype).to(tl.float32)
    tl.store(out + at, activated * tl.load(up + at, mask=inside, other=0).to(tl.float32), inside)


def swiglu_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of gate and up."""
    grad, count = grad.contiguous(), gate.numel()
    gate_grad, up_grad = torch.empty_like(gate), torch.empty_like(up)
    given, grid = (grad, gate, up, gate_grad, up_grad), (triton.cdiv(count, _INNER), 1, 1)
    _launch(_swiglu_backward, grid, given, (count,), (_INNER,), num_warps=_WARPS)
    return gate_grad, up_grad


@triton.jit
def _swiglu_backward(grad, gate, up, gate_grad, up_grad, count, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < count
    given = tl.load(gate + at, mask=inside, other=0)
    wide, due = given.to(tl.float32), tl.load(grad + at, mask=inside, other=0).to(tl.float32)
    over = 1 + libdevice.exp(-wide)
    share = tl.div_rn(1.0, over)
    activated = tl.div_rn(wide, over).to(given.dtype).to(tl.float32)
    tl.store(up_grad + at, activated * due, mask=inside)
    other = tl.load(up + at, mask=inside, other=0).to(tl.float32)
    through = (due * other).to(given.dtype).to(tl.float32)
    tl.store(gate_grad + at, through * share * (1 + wide * (1 - share)), mask=inside)


# — rotary positions —


def turn(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, back: bool = False
) -> torch.Tensor:
    """Return x (rows, tokens, heads, width) turned by angles, contiguous; `back` for gradients.

    The heads of a token lie together, and tokens follow each other at one distance. cos and sin are
    contiguous (rows or 1, tokens, width).
    """
    rows, tokens, heads, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half, together = triton.next_power_of_2(width // 2), triton.next_power_of_2(heads)
    _launch(
        *(_turn, (rows * tokens, 1, 1), (x, cos, sin, out), (cos.shape[0] * tokens,)),
        (heads, width // 2, x.stride(1), back, half, together),
        num_warps=4,
        enable_fp_fusion=False,  # PyTorch rounds each product
    )
    return out


@triton.jit(do_not_specialize=["angles"])
def _turn(
    x,
    cos,
    sin,
    out,
    angles,
    heads,
    width,  # of a half
    stride,
    back: tl.constexpr,
    half: tl.constexpr,
    together: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head, at = tl.arange(0, together)[:, None], tl.arange(0, half)[None]
    inside = (head < heads) & (at < width)
    angle = (token % angles) * 2 * width + at
    within = at < width
    source = x + token * stride + head * 2 * width + at
    given = tl.load(source, mask=inside, other=0)
    first, second = given.to(tl.float32), tl.load(source + width, inside, other=0).to(tl.float32)
    cos_first = tl.load(cos + angle, mask=within, other=0).to(tl.float32)
    cos_second = tl.load(cos + angle + width, mask=within, other=0).to(tl.float32)
    sin_first = tl.load(sin + angle, mask=within, other=0).to(tl.float32)
    sin_second = tl.load(sin + angle + width, mask=within, other=0).to(tl.float32)
    if back:
        to_first, to_second = sin_second, -sin_first
    else:
        to_first, to_second = -sin_first, sin_second
    place = out + (token * heads + head) * 2 * width + at
    turned = (first * cos_first).to(given.dtype).to(tl.float32)
    turned += (second * to_first).to(given.dtype).to(tl.float32)
    tl.store(place, turned, mask=inside)
    turned = (second * cos_second).to(given.dtype).to(tl.float32)
    turned += (first * to_second).to(given.dtype).to(tl.float32)
    tl.store(place + width, turned, mask=inside)


# — LoRA —


@triton.jit
def _split(x):
    """Return three tensors in bfloat16, of which float32 is the sum."""
    first = x.to(tl.bfloat16)
    rest = x - first.to(tl.float32)
    second = rest.to(tl.bfloat16)
    return first, second, (rest - second.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _product(half, wide, total):
    """Return total + half·wide, of a matrix in half precision and one in float32."""
    if half.dtype == tl.bfloat16:
        first, second, third = _split(wide)
        total = tl.dot(half, third, total)
        total = tl.dot(half, second, total)
        total = tl.dot(half, first, total)
    else:
        total = tl.dot(half.to(tl.float32), wide, total, input_precision="tf32x3")
    return total


@triton.jit
def _product_of_wide(wide, half, total):
    """Return total + wide·half."""
    if half.dtype == tl.bfloat16:
        first, second, third = _split(wide)
        total = tl.dot(third, half, total)
        total = tl.dot(second, half, total)
        total = tl.dot(first, half, total)
    else:
        total = tl.dot(wide, half.to(tl.float32), total, input_precision="tf32x3")
    return total


def down(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Return scales·(weight·x), float32 (tokens, rank), of a contiguous x (tokens, width).

    weight (rank, width) float32, of any strides; scales (rank,) or (); what `mask` has at 0, bytes
    of x's shape, is left out. Parts of the width are summed up apart, and then together.
    """
    tokens, width = x.shape
    rank, ranks = len(weight), _ranks(len(weight))
    rows, columns, parts, warps = _DOWN[weight.stride(1) == 1]
    columns = min(columns, 4096 // ranks)
    parts = min(parts, triton.cdiv(width, 2 * columns))
    of_a_part = triton.cdiv(triton.cdiv(width, parts), columns) * columns
    sums = torch.empty(parts, tokens, rank, dtype=torch.float32, device=x.device)
    _launch(
        *(_down, (triton.cdiv(tokens, rows), parts, 1)),
        (x, weight, x if mask is None else mask, sums),
        (tokens,),
        (width, of_a_part, rank, *weight.stride(), mask is not None, rows, columns, ranks),
        num_warps=warps,
        num_stages=3,
    )
    out, count = torch.empty_like(sums[0]), tokens * rank
    _launch(
        *(_sum_down, (triton.cdiv(count, 512), 1, 1), (sums, scales, out), (count,)),
        (rank, parts, scales.dim(), 512),
        num_warps=4,
    )
    return out


# By whether a rank's weights lie together: tokens and columns at once, parts of the width, warps.
_DOWN = {True: (64, 64, 8, 4), False: (32, 64, 8, 4)}


def _ranks(rank: int) -> int:
    """Return the ranks that a product is computed for, the rest of them zeros."""
    return max(16, int(triton.next_power_of_2(rank)))


@triton.jit(do_not_specialize=["tokens"])
def _down(
    x,
    weight,
    mask,
    sums,
    tokens,
    width,
    of_a_part,  # columns
    rank,
    rank_stride,
    width_stride,
    masked: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    ranks: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    part = tl.program_id(1)
    r = tl.arange(0, ranks)
    total = tl.zeros((rows, ranks), tl.float32)
    for start in range(part * of_a_part, tl.minimum(width, (part + 1) * of_a_part), columns):
        at = start + tl.arange(0, columns)
        inside = (token[:, None] < tokens) & (at[None] < width)
        place = token[:, None] * width + at[None]
        given = tl.load(x + place, mask=inside, other=0)
        if masked:
            given *= tl.load(mask + place, mask=inside, other=0).to(given.dtype)
        factor = tl.load(
            weight + r[None] * rank_stride + at[:, None] * width_stride,
            mask=(r[None] < rank) & (at[:, None] < width),
            other=0,
        )
        total = _product(given, factor, total)
    inside = (token[:, None] < tokens) & (r[None] < rank)
    place = (part.to(tl.int64) * tokens + token[:, None]) * rank + r[None]
    tl.store(sums + place, total, mask=inside)


@triton.jit(do_not_specialize=["count"])
def _sum_down(
    sums,
    scales,
    out,
    count,
    rank,
    parts: tl.constexpr,
    scale_stride: tl.constexpr,
    block: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < count
    total = tl.zeros((block,), tl.float32)
    for part in tl.static_range(parts):
        total += tl.load(sums + part * count.to(tl.int64) + at, mask=inside, other=0)
    scale = tl.load(scales + (at % rank) * scale_stride, mask=inside, other=0)
    tl.store(out + at, total * scale, mask=inside)


def up(
    low: torch.Tensor,
    weight: torch.Tensor,
    *,
    base: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return low·weight (tokens, width), 0 where `mask` is, added to `base` and rounded once.

    low (tokens, rank) and weight (rank, width) are float32, weight of any strides. `out` takes the
    result, and may be `base`.
    """
    (tokens, rank), width = low.shape, weight.shape[1]
    if out is None:
        out = torch.empty(tokens, width, dtype=dtype, device=low.device)
    ranks = _ranks(rank)
    rows, columns, warps = _UP
    columns = min(columns, 8192 // ranks)
    _launch(
        *(_up, (triton.cdiv(tokens, rows), triton.cdiv(width, columns), 1)),
        (low, weight, out if base is None else base, out if mask is None else mask, out),
        (tokens,),
        (width, rank, *weight.stride(), base is not None, mask is not None, rows, columns, ranks),
        num_warps=warps,
    )
    return out


_UP = (64, 128, 4)  # tokens and columns at once, warps


@triton.jit(do_not_specialize=["tokens"])
def _up(
    low,
    weight,
    base,
    mask,
    out,
    tokens,
    width,
    rank,
    rank_stride,
    width_stride,
    added: tl.constexpr,
    masked: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    ranks: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    at, r = tl.program_id(1) * columns + tl.arange(0, columns), tl.arange(0, ranks)
    given = tl.load(
        low + token[:, None] * rank + r[None],
        mask=(token[:, None] < tokens) & (r[None] < rank),
        other=0,
    )
    factor = tl.load(
        weight + r[:, None] * rank_stride + at[None] * width_stride,
        mask=(r[:, None] < rank) & (at[None] < width),
        other=0,
    )
    if out.dtype.element_ty == tl.bfloat16:
        first, second, third = _split(given)
        total = _product(first, factor, tl.zeros((rows, columns), tl.float32))
        high, middle, _ = _split(factor)
        total = tl.dot(third, high, total)
        total = tl.dot(second, middle, total)
        total = tl.dot(second, high, total)
    else:
        total = tl.dot(given, factor, input_precision="tf32x3")
    place = token[:, None] * width + at[None]
    inside = (token[:, None] < tokens) & (at[None] < width)
    if masked:
        total *= tl.load(mask + place, mask=inside, other=0).to(tl.float32)
    if added:
        total += tl.load(base + place, mask=inside, other=0).to(tl.float32)
    tl.store(out + place, total, mask=inside)


def factor_gradients(
    x: torch.Tensor,
    low_grad: torch.Tensor,
    grad: torch.Tensor,
    low: torch.Tensor,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of A, low_gradᵀ·x (rank, d_in), and of B, gradᵀ·low (d_out, rank).

    x (tokens, d_in) and grad (tokens, d_out) are contiguous, low and low_grad float32
    (tokens, rank). Parts of the tokens are summed up apart, and then together.
    """
    (tokens, d_in), d_out, rank = x.shape, grad.shape[1], low.shape[1]
    parts = min(8, triton.cdiv(tokens, 512))
    sums = torch.empty(parts, rank * (d_in + d_out), dtype=torch.float32, device=x.device)
    of_a, of_b = sums.split([rank * d_in, rank * d_out], 1)
    _sum_parts(low_grad, x, mask, of_a, (d_in, 1))
    _sum_parts(low, grad, None, of_b, (1, rank))
    total = sums[0] if parts == 1 else sums.sum(0)
    return total[: rank * d_in].view(rank, d_in), total[rank * d_in :].view(d_out, rank)


def _sum_parts(
    low: torch.Tensor,
    given: torch.Tensor,
    mask: torch.Tensor | None,
    sums: torch.Tensor,
    strides: tuple[int, int],
) -> None:
    """Write lowᵀ·given (rank, width), by these strides, into each row of `sums` for its tokens."""
    (tokens, rank), width, parts = low.shape, given.shape[1], len(sums)
    rows, columns, warps = _OUTER
    of_a_part = triton.cdiv(triton.cdiv(tokens, parts), rows) * rows
    _launch(
        *(_outer, (triton.cdiv(width, columns), parts, 1)),
        (low, given, given if mask is None else mask, sums),
        (tokens, of_a_part),
        (width, rank, sums.stride(0), *strides, mask is not None, rows, columns, _ranks(rank)),
        num_warps=warps,
    )


_OUTER = (32, 128, 4)  # tokens and columns at once, warps


@triton.jit(do_not_specialize=["tokens", "of_a_part"])
def _outer(
    low,
    given,
    mask,
    sums,
    tokens,
    of_a_part,  # tokens
    width,
    rank,
    part_stride,
    rank_stride,
    width_stride,
    masked: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    ranks: tl.constexpr,
):
    part = tl.program_id(1)
    r, at = tl.arange(0, ranks), tl.program_id(0) * columns + tl.arange(0, columns)
    total = tl.zeros((ranks, columns), tl.float32)
    for start in range(part * of_a_part, tl.minimum(tokens, (part + 1) * of_a_part), rows):
        token = start + tl.arange(0, rows)
        factor = tl.load(
            low + token[None] * rank + r[:, None],
            mask=(token[None] < tokens) & (r[:, None] < rank),
            other=0,
        )
        place = token[:, None].to(tl.int64) * width + at[None]
        inside = (token[:, None] < tokens) & (at[None] < width)
        values = tl.load(given + place, mask=inside, other=0)
        if masked:
            values *= tl.load(mask + place, mask=inside, other=0).to(values.dtype)
        total = _product_of_wide(factor, values, total)
    place = part.to(tl.int64) * part_stride + r[:, None] * rank_stride + at[None] * width_stride
    tl.store(sums + place, total, mask=(r[:, None] < rank) & (at[None] < width))
