"""How quantised weights lie in files, and what they stand for: bitsandbytes', fp8, mxfp4.

The numbers are those that bitsandbytes and transformers compute with. To add a form, add a line to
FORMS. What a file says of its weights is checked before code in C reads them. Nothing is known here
of models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from lorakit.adapters.tensors import Tensor
from lorakit.models.devices import DTYPES
from lorakit.models.quantisation import BITSANDBYTES

_TYPES = {"U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn, **DTYPES}
_LEVELS, _NESTED_LEVELS = 16, 256  # of 4-bit weights, and of the scales of their scales
_BLOCK_SIZES = tuple(2**power for power in range(5, 13))  # of values that have one scale

Parts = Mapping[str, Tensor]  # the stored tensors of one weight, by what they are to it
Shape = tuple[int, ...]
# What checks of parts that do not fit each other raise, those of bitsandbytes too.
MISFITS = (ValueError, KeyError, TypeError, AttributeError, AssertionError, RuntimeError)


class Form(NamedTuple):
    """How a quantised weight lies in files.

    The name of one stored tensor marks it; the first group of `mark` is the stem from which `name`
    makes the weight's and `parts` those of the tensors that belong to it. `shape_of` returns the
    weight's shape, and raises one of MISFITS for parts that do not fit; `compute` returns it.
    """

    mark: re.Pattern[str]
    name: str
    parts: Mapping[str, str]
    shape_of: Callable[[Parts], Shape]
    compute: Callable[[Parts], torch.Tensor]


def _torch(part: Tensor) -> torch.Tensor:
    """Return a copy of a stored tensor."""
    return torch.frombuffer(bytearray(part.data), dtype=_TYPES[part.dtype]).reshape(part.shape)


def _pair(parts: Parts) -> tuple[Tensor, Tensor]:
    return parts["weight"], parts["scales"]


def _check(what: str, count: int, expected: int) -> None:
    if count != expected:
        raise ValueError(f"{count} in {what}, not {expected}")


# — bitsandbytes in 4 bits: two values a byte, a scale for each block; the scales may be so too —


def _four_bit_state(parts: Parts) -> Any:
    """Return bitsandbytes' QuantState of a weight."""
    from bitsandbytes.functional import QuantState

    entries = {role: _torch(part) for role, part in parts.items() if role != "weight"}
    return QuantState.from_dict(entries, torch.device("cpu"))


def _four_bit_shape(parts: Parts) -> Shape:
    state = _four_bit_state(parts)
    _check_kind(state)
    shape = tuple(int(size) for size in state.shape)
    count = math.prod(shape)
    scales = -(-count // state.blocksize)
    _check("weight", len(parts["weight"].data), -(-count // 2))
    _check("absmax", state.absmax.numel(), scales)
    _check("quant_map", state.code.numel(), _LEVELS)
    if state.nested:
        nested = -(-scales // state.state2.blocksize)
        _check("nested_absmax", state.state2.absmax.numel(), nested)
        _check("nested_quant_map", state.state2.code.numel(), _NESTED_LEVELS)
    return shape


def _check_kind(state: Any) -> None:
    """Raise ValueError for a QuantState that bitsandbytes would not take."""
    sizes = [state.blocksize, *([state.state2.blocksize] if state.nested else [])]
    if (
        state.quant_type not in ("nf4", "fp4")
        or state.dtype not in DTYPES.values()
        or any(type(size) is not int or size not in _BLOCK_SIZES for size in sizes)
        or any(size < 1 for size in state.shape)
    ):
        raise ValueError("a kind that bitsandbytes does not know")


def _from_four_bit(parts: Parts) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    packed = torch.frombuffer(bytearray(parts["weight"].data), dtype=torch.uint8)
    weight: torch.Tensor = dequantize_4bit(packed.reshape(-1, 1), _four_bit_state(parts))
    return weight


# — bitsandbytes in 8 bits: whole numbers, and a scale for each row —


def _eight_bit_shape(parts: Parts) -> Shape:
    weight, scales = _pair(parts)
    if weight.dtype != "I8" or scales.dtype != "F32" or any(parts["order"].data):
        raise ValueError("another format, or rows in another order")
    rows, columns = weight.shape
    _check("SCB", math.prod(scales.shape), rows)
    return rows, columns


def _from_eight_bit(parts: Parts) -> torch.Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    weight: torch.Tensor = int8_vectorwise_dequant(*map(_torch, _pair(parts)))
    return weight


# — fp8: one byte a value, and a scale for each block of a grid —


def _fp8_shape(parts: Parts) -> Shape:
    weight, scales = _pair(parts)
    if weight.dtype != "F8_E4M3" or scales.dtype not in DTYPES:
        raise ValueError(f"formats {weight.dtype} and {scales.dtype}")
    rows, columns = weight.shape
    down, across = scales.shape or (1, 1)
    if 0 in (down, across) or rows % down or columns % across:
        raise ValueError(f"{rows}×{columns} values in {down}×{across} blocks")
    return rows, columns


def _from_fp8(parts: Parts) -> torch.Tensor:
    weight, scales = (_torch(part).float() for part in _pair(parts))
    (rows, columns), (down, across) = weight.shape, scales.shape or (1, 1)
    blocks = weight.reshape(down, rows // down, across, columns // across)
    return (blocks * scales.reshape(down, 1, across, 1)).reshape(rows, columns)


# — mxfp4, of experts: two values a byte, an exponent for each block of 32 —


def _mxfp4_shape(parts: Parts) -> Shape:
    weight, scales = _pair(parts)
    experts, rows, blocks, size = weight.shape
    if scales.shape != (experts, rows, blocks) or {weight.dtype, scales.dtype} != {"U8"}:
        raise ValueError(f"{scales.shape} scales for {weight.shape} blocks")
    return experts, 2 * size * blocks, rows


def _from_mxfp4(parts: Parts) -> torch.Tensor:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    weight: torch.Tensor = convert_moe_packed_tensors(*map(_torch, _pair(parts)))
    return weight.contiguous()


_FOUR_BIT = {
    "weight": "{}",
    "absmax": "{}.absmax",
    "quant_map": "{}.quant_map",
    "nested_absmax": "{}.nested_absmax",
    "nested_quant_map": "{}.nested_quant_map",
    "quant_state.bitsandbytes__nf4": "{}.quant_state.bitsandbytes__nf4",
    "quant_state.bitsandbytes__fp4": "{}.quant_state.bitsandbytes__fp4",
}
_EIGHT_BIT = {"weight": "{}.weight", "scales": "{}.SCB", "order": "{}.weight_format"}
_FP8 = {"weight": "{}", "scales": "{}_scale_inv"}
_MXFP4 = {"weight": "{}_blocks", "scales": "{}_scales"}

FORMS: Mapping[str, tuple[Form, ...]] = {  # by the `quant_method` of a model's config
    BITSANDBYTES: (
        Form(
            re.compile(r"(.+)\.quant_state\.bitsandbytes__(?:nf4|fp4)"),
            "{}",
            _FOUR_BIT,
            _four_bit_shape,
            _from_four_bit,
        ),
        Form(re.compile(r"(.+)\.SCB"), "{}.weight", _EIGHT_BIT, _eight_bit_shape, _from_eight_bit),
    ),
    "fp8": (Form(re.compile(r"(.+)_scale_inv"), "{}", _FP8, _fp8_shape, _from_fp8),),
    "mxfp4": (Form(re.compile(r"(.+)_scales"), "{}", _MXFP4, _mxfp4_shape, _from_mxfp4),),
}
