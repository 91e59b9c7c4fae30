"""Which numbers float32 holds: what options and files may give where adapters are computed with."""

from __future__ import annotations

from decimal import Decimal

TINIEST, LARGEST = 2.0**-126, 2.0**127  # the normal numbers, but for those above half the largest


def fits(number: float | Decimal) -> bool:
    """Return whether a finite number is 0 or within float32's range."""
    return number == 0 or TINIEST <= number <= LARGEST or -LARGEST <= number <= -TINIEST
