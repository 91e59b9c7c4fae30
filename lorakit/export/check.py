"""Whether a fused model computes what its base computes with the adapter on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from lorakit.adapters.adapter import Adapter
from lorakit.errors import LorakitError
from lorakit.models.base import Base
from lorakit.models.loading import load_base
from lorakit.models.quantisation import dequantise
from lorakit.models.whole import attached
from lorakit.settings import ModelSettings

PROMPT = "The people of the town were asked which of the two roads they would rather take."
_STEPS = 16  # of the number format's spacing at 1 that the logits may differ by, relatively
_LEAST = 1e-4  # what the order of float32 sums makes of it


def check_fused(
    folder: Path,
    adapter: Adapter,
    model: ModelSettings,
    name: str,
    *,
    device: torch.device,
    stored: torch.dtype,
    note: Callable[[str], None],
) -> None:
    """Compare the logits of a fused model on PROMPT with those of base and adapter.

    A base of bitsandbytes' is dequantised first: in 8 bits it would round its inputs as well.
    Both compute in float32 on a CPU, else in `stored`, the format of the fused weights. A note says
    where rounding the weights has changed more than a tenth of what the adapter does. Raises
    LorakitError where they differ by more than rounding explains: relatively by 16 times the
    spacing of that format, and at least 1e-4.
    """
    dtype = torch.float32 if device.type == "cpu" else stored
    base = load_base(
        name,
        device=device,
        dtype=dtype,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
    )
    base = replace(base, model=dequantise(base.model, dtype))
    plain = _logits(base)
    with attached(base, adapter):
        expected = _logits(base)
    del base
    fused = load_base(
        str(folder), device=device, dtype=dtype, trust_remote_code=model.trust_remote_code
    )
    difference, change = (
        float(torch.linalg.norm(other - expected) / torch.linalg.norm(expected))
        for other in (_logits(fused), plain)
    )
    limit = max(_LEAST, _STEPS * torch.finfo(stored).eps)
    if not difference <= limit:
        raise LorakitError(
            f"the logits of {folder} differ from those of base and adapter by {difference:.2g} of "
            f"their norm, more than the {limit:.2g} that rounding explains; report it, or give "
            "--no-check"
        )
    if difference > change / 10:
        note(
            f"Warning: the logits differ by {difference:.2g} of their norm, the adapter changes "
            f"{change:.2g}: {str(stored).removeprefix('torch.')} is too coarse for it; give "
            "--dtype float32"
        )


@torch.no_grad()
def _logits(base: Base) -> torch.Tensor:
    """Return the logits of PROMPT, (tokens, vocabulary), float32 on the CPU."""
    ids = base.tokenizer(PROMPT, return_tensors="pt")["input_ids"].to(base.device)
    logits: torch.Tensor = base.model(ids).logits[0].float().cpu()
    return logits
