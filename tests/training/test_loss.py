"""Cross-entropy in parts against PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lorakit.training import loss as module
from lorakit.training.loss import cross_entropy


@pytest.mark.parametrize("at_once", [1, 100, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_pytorchs(
    at_once: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", at_once)
    torch.manual_seed(0)
    labels = torch.tensor([3, -100, 0, 39, 7, -100, 12])
    given = (torch.randn(7, 40) * 4).to(dtype)
    weight = torch.rand(7)
    told = []
    functions: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
        lambda logits: cross_entropy(logits, labels, ignored=-100),
        lambda logits: torch.nn.functional.cross_entropy(
            logits.float(), labels, ignore_index=-100, reduction="none"
        ),
    )
    for function in functions:
        logits = given.clone().requires_grad_(True)
        losses = function(logits)
        (losses * weight).sum().backward()
        told.append((losses.detach(), logits.grad))
    (found, gradient), (expected, expected_gradient) = told
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert gradient is not None
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, expected_gradient)
    assert float(found[1]) == 0.0
    assert not bool(gradient[1].any())
