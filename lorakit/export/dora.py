"""DoRA's factors: what the rows of W0 + ΔW are multiplied by.

Weight-decomposed LoRA (Liu et al., 2024, equation 5): W' = m·(W0 + s·B·A)/‖W0 + s·B·A‖, with one
norm and one magnitude m for each output, as PEFT computes it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lorakit.adapters.tensors import Tensor
from lorakit.errors import LorakitError


def row_factors(
    sums: Iterable[torch.Tensor], magnitude: Tensor, *, transposed: bool, where: str
) -> torch.Tensor:
    """Return m/‖W0 + ΔW‖ for each output, (d_out,) float32.

    `sums` are W0 + ΔW in runs of rows, as the weight is stored: (n, d_in), or (n, d_out) if
    `transposed`. Raises LorakitError for an output that has no weight but zeros; `where` names it.
    """
    squares = [values.square().sum(0 if transposed else 1) for values in sums]
    norms = (torch.stack(squares).sum(0) if transposed else torch.cat(squares)).sqrt()
    factors = torch.from_numpy(magnitude.array().copy()) / norms
    if not bool(torch.isfinite(factors).all()):
        raise LorakitError(
            f"{where} has a row of zeros, to which DoRA gives no direction; leave the module out "
            "of the adapter"
        )
    return factors
