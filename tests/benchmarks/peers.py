"""A base as its peers have it, where both sides run on one in the same process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers

from lorakit.models.attention import BY_ROW, set_attention
from lorakit.models.gpu_attention import choose_kernels, pytorchs
from lorakit.models.norms import fuse_norms_, fusible_norms
from lorakit.models.products import fast_layers, speed_up_products_
from lorakit.models.row_masks import transformers_masks


@contextlib.contextmanager
def as_transformers_has_it(model: Any) -> Iterator[None]:
    """Inside the block, a model computes as transformers does.

    On a GPU that concerns norms and attention, on a CPU attention and products.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        with _as_loaded_on_a_cpu(model, device):
            yield
        return
    attentions, masks = transformers.AttentionInterface(), transformers.AttentionMaskInterface()
    ours = attentions["sdpa"], masks["sdpa"]
    for norm in fusible_norms(model):
        norm.__dict__.pop("forward", None)
    attentions.register("sdpa", pytorchs)
    masks.register("sdpa", transformers_masks)
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        yield
    finally:
        attentions.register("sdpa", ours[0])
        masks.register("sdpa", ours[1])
        choose_kernels()
        fuse_norms_(model)


@contextlib.contextmanager
def _as_loaded_on_a_cpu(model: Any, device: torch.device) -> Iterator[None]:
    """Inside the block, undo what lorakit set when it loaded a base; others stay as they are."""
    fast = [layer for layer in fast_layers(model) if "forward" in vars(layer)]
    for layer in fast:
        del layer.forward
    by_row = model.config._attn_implementation == BY_ROW
    if by_row:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if by_row:
            set_attention(model, device)
        if fast:
            speed_up_products_(model)
