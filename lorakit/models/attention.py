"""How a base attends on a CPU: in float32, and row by row if rows are packed into one sequence.

PyTorch's bfloat16 attention has a slow backward pass there. A packed sequence (row_masks.py) is cut
into its rows, and attention is computed for each alone. A few families cannot be told to attend so:
they attend as on a GPU (gpu_attention.py).

How rows are packed is decided in batches.py; how those attend that read new tokens, with keys in a
cache, in ragged.py, and how a base attends on a GPU in gpu_attention.py.
"""

from __future__ import annotations

import functools
import inspect
import re
from types import ModuleType
from typing import Any

import torch
import transformers

from lorakit.models.architecture import Model, python_modules
from lorakit.models.gpu_attention import choose_kernels, pytorchs
from lorakit.models.ragged import plain_mask, ragged_now
from lorakit.models.row_masks import RowMasks, make_masks

BY_ROW = "sdpa_by_row"
# Code that compares the attention's name with that of PyTorch's.
_NAMED = re.compile(r"_attn_implementation\s*(==|!=|(not\s+)?in\b)[^\n]*[\"']sdpa[\"']")


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
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention by transformers' own function, in float32 and for each packed row alone.

    query, key and value are (1 or rows, heads, tokens, width). Some models pass them by name.
    """
    mask = attention_mask
    if (rows := ragged_now()) is not None and isinstance(mask, torch.Tensor):
        return rows.attend(module, query, key, value, mask, **settings), None
    wide = [tensor.float() for tensor in (query, key, value)]
    if isinstance(mask, RowMasks):
        parts = zip(*(tensor.split(mask.lengths, 2) for tensor in wide), strict=True)
        attended = [
            pytorchs(module, *part, part_mask, **settings)[0]
            for part, part_mask in zip(parts, mask.masks, strict=True)
        ]
        return torch.cat(attended, 1).to(query.dtype), None
    return pytorchs(module, *wide, plain_mask(mask), **settings)[0].to(query.dtype), None


transformers.AttentionInterface.register(BY_ROW, _attention)
transformers.AttentionMaskInterface.register(BY_ROW, make_masks)
