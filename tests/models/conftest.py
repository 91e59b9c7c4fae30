"""What the tests of models share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lorakit.models import packed, products


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever the processor, oneDNN is taken for the faster one."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    trials = products.is_faster_here, packed._packs_here
    for trial in trials:
        trial.cache_clear()
    yield
    for trial in trials:
        trial.cache_clear()
