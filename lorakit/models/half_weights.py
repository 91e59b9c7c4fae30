"""Products of few tokens with weights that 16 bits hold, while tokens are decoded on a CPU.

Most bases are published in 16 bits a weight. In float32 they take twice the memory, and reading
them is most of what a step with few tokens takes. FBGEMM, which PyTorch has on board for quantised
layers, multiplies float32 by weights in float16, turned into float32 as they are read: products and
sums are float32's. Nothing is lost:

    W·x = (2^k W)·(2^-k x)    where float16 holds 2^k W, with k = 0 where it holds W

A power of two changes no digit. float16 has more digits than bfloat16 and fewer magnitudes, so that
what counts is how small weights are beside the largest; where one does not fit, there is no such
product. It is a copy, of half the weights' size, which is made where there is memory for three.
"""

from __future__ import annotations

import functools
import math
from concurrent.futures import Executor, ThreadPoolExecutor

import torch
from torch.nn.functional import linear

FEW = 300  # tokens up to which this product takes less than oneDNN's
_LARGEST = torch.finfo(torch.float16).max
_AT_ONCE = 1 << 17  # weights that are tried
_BLOCK = 512  # inputs, of which FBGEMM fills up to a multiple


class HalfWeights:
    """Weights (out, in) in float16 with a bias (out,) if any, that multiply float32.

    `weight` is what float16 holds: 2^exponent times what is multiplied with. A thread of the pool
    puts it in FBGEMM's order.
    """

    def __init__(
        self, weight: torch.Tensor, exponent: int, bias: torch.Tensor | None, pool: Executor
    ) -> None:
        self._factor = 2.0**-exponent
        self._packed = pool.submit(torch.ops.quantized.linear_prepack_fp16, weight, bias)

    def finish(self) -> None:
        """Wait until the weights are in that order."""
        self._packed.result()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return W·x + b (…, out) for x (…, in)."""
        rows = x if x.dim() > 1 else x[None]
        if self._factor != 1:
            rows = rows * self._factor
        given: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16(rows, self._packed.result())
        return given if x.dim() > 1 else given[0]


def half_weights(
    weight: torch.Tensor, bias: torch.Tensor | None, pool: Executor
) -> HalfWeights | None:
    """Return weights in float16, None where it does not hold every one."""
    largest = max(abs(bound.item()) for bound in torch.aminmax(weight))
    if largest <= _LARGEST and _holds(weight):
        return HalfWeights(weight, 0, bias, pool)
    if not 0 < largest < math.inf:
        return None
    exponent = math.floor(math.log2(_LARGEST / largest))
    scaled = weight * 2.0**exponent
    return HalfWeights(scaled, exponent, bias, pool) if _holds(scaled) else None


def _holds(weight: torch.Tensor) -> bool:
    """Return whether float16 holds every weight, a part after the other that a cache holds."""
    parts = weight.flatten().split(_AT_ONCE)
    return all(torch.equal(part.half().float(), part) for part in parts)


def half_size(layer: torch.nn.Linear) -> int:
    """Return how many bytes a layer's weights take in float16, in FBGEMM's order."""
    return 2 * layer.out_features * -(-layer.in_features // _BLOCK) * _BLOCK


@functools.cache
def multiplies_half() -> bool:
    """Return whether PyTorch multiplies float32 by weights in float16, and loses nothing."""
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, generator=draw) for size in ((3, 5, 70), (33, 70)))
    sizes = 2.0 ** torch.arange(-22, 11)
    weight = (weight * sizes[:, None]).half().float()
    bias = weight[:, 0].clone()
    try:
        with ThreadPoolExecutor(1) as pool:
            found = HalfWeights(weight, 0, bias, pool)(x)
    except (AttributeError, RuntimeError, TypeError):  # other processors, other builds
        return False
    return torch.allclose(found / sizes, linear(x, weight, bias) / sizes, atol=1e-4)
