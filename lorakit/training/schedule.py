"""How the learning rate rises and falls over a run.

To add a schedule: a name in SCHEDULES (lorakit/settings.py) and its line here.
"""

from __future__ import annotations

import math


def learning_rate_factor(schedule: str, step: int, steps: int, warmup: float) -> float:
    """Return the factor of the learning rate at optimiser step 0 … steps-1.

    It rises linearly over the share `warmup` of the steps, then falls to 0 (linear, cosine) or
    stays at 1 (constant).
    """
    rise = round(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(1, steps - rise)
    if schedule == "linear":
        return 1 - done
    return (1 + math.cos(math.pi * done)) / 2 if schedule == "cosine" else 1.0
