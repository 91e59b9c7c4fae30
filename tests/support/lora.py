"""What LoRA computes on a base: its logits, and the gradients of its A and B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lorakit.models.lora import factors


def logits_and_gradients(base: Any, layers: Mapping[str, Any], seed: int = 5) -> list[torch.Tensor]:
    """Return the logits of random rows and the gradients of their sum; `seed` is dropout's."""
    torch.manual_seed(seed)
    ids = torch.randint(3, 250, (3, 11), generator=torch.Generator().manual_seed(0))
    logits = base.model(input_ids=ids.to(base.device)).logits.float()
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * weight.to(base.device)).mean().backward()
    found = [logits.detach()]
    for layer in layers.values():
        for parameter in factors(layer):
            assert parameter.grad is not None
            found.append(parameter.grad.clone())
            parameter.grad = None
    return found
