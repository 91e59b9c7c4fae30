"""What a training step asks of a model's own forward, whatever its family."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch

from lorakit.errors import LorakitError
from lorakit.models.batches import MicroBatch


def completion_logits(model: Any, batch: MicroBatch) -> torch.Tensor:
    """Return the logits (rows, kept, vocabulary) of a micro-batch's last `kept` positions.

    They come from the model's own forward, soft-capping, head bias and all; positions are counted
    without the padding on the left.
    """
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    kept = batch.labels.shape[1]
    takes = inspect.signature(model.forward).parameters
    if batch.mask is not None:
        inputs["attention_mask"] = batch.mask.long()
        if "position_ids" in takes:
            inputs["position_ids"] = (batch.mask.long().cumsum(-1) - 1).clamp_min(0)
    if "logits_to_keep" in takes:
        inputs["logits_to_keep"] = kept
    logits: torch.Tensor = model(**inputs).logits
    return logits[:, -kept:]


@contextlib.contextmanager
def activation_checkpointing(model: Any) -> Iterator[None]:
    """Compute activations twice inside the block to hold fewer; no layer's dropout is switched on.

    A layer checkpoints only while its own `training` flag is set; its parts keep theirs.
    """
    if not model.supports_gradient_checkpointing:
        raise LorakitError("this model cannot checkpoint; leave --gradient-checkpointing out")
    since_5_23 = hasattr(model, "activation_checkpointing_enable")
    name = "activation_checkpointing" if since_5_23 else "gradient_checkpointing"
    getattr(model, f"{name}_enable")({"use_reentrant": False})
    layers = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    try:
        for layer in layers:
            layer.training = True
        yield
    finally:
        for layer in layers:
            layer.training = False
        getattr(model, f"{name}_disable")()
