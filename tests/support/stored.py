"""What torch stores for the backward pass of a batch, counted while it computes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import torch

from lorakit.models.architecture import activation_checkpointing
from lorakit.models.base import Base
from lorakit.models.lora import PeftLayer, factors
from lorakit.models.sharing import new_accelerator
from lorakit.models.tokens import Example
from lorakit.training.lora_step import lean_passes, switch_dropout
from lorakit.training.loss import BatchLoss


def stored_bytes(
    base: Base,
    layers: Mapping[str, PeftLayer],
    rows: Sequence[Example],
    *,
    padded: bool = False,
    checkpointing: bool = False,
) -> int:
    """Return the bytes of all tensors saved in the forward pass of one micro-batch.

    Each storage counts once, and the model's own parameters not at all.
    """
    trained = [factor for layer in layers.values() for factor in factors(layer)]
    for factor in trained:
        factor.requires_grad_(True)
    losses = BatchLoss(base, trained, tokens=1 << 20, accelerator=new_accelerator("cpu"))
    losses.packed = losses.packed and not padded
    own = {parameter.untyped_storage().data_ptr() for parameter in base.model.parameters()}
    sizes: dict[int, int] = {}
    alive = []  # or another tensor would take a freed one's place

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with contextlib.ExitStack() as stack:
        if checkpointing:
            stack.enter_context(activation_checkpointing(base.model))
        stack.enter_context(switch_dropout(layers, on=True))
        stack.enter_context(lean_passes(base.model, layers))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        losses.backward(rows)
    return sum(sizes.values())
