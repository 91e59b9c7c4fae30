"""Where a curve by layer begins to rise, and how it looks in a few lines of text."""

from __future__ import annotations

from collections.abc import Sequence

_BLOCKS = " ▁▂▃▄▅▆▇█"


def knee(values: Sequence[float]) -> int:
    """Return the place of the knee: the value farthest below the chord from the first to the last.

    This is Kneedle's rule for a convex rising curve. Of equal distances the first place counts;
    where no value lies below the chord, there is no knee and the last place is returned.
    """
    last = len(values) - 1
    below = [
        values[0] + (values[-1] - values[0]) * place / max(last, 1) - value
        for place, value in enumerate(values)
    ]
    deepest = max(below)
    return below.index(deepest) if deepest > 1e-12 else last


def sketch(names: Sequence[int], values: Sequence[float], best: int, height: int = 5) -> list[str]:
    """Return lines that draw the values as bars, the largest on top, the name `best` marked."""
    low, high = min(values), max(values)
    eighths = [
        1 + round((value - low) / ((high - low) or 1.0) * (8 * height - 1)) for value in values
    ]
    wide = max(len(str(name)) for name in names) + 1
    scale = {height - 1: f"{high:.4g}", 0: f"{low:.4g}"}
    lines = []
    for row in reversed(range(height)):
        cells = (_BLOCKS[min(8, max(0, part - 8 * row))] for part in eighths)
        bars = "".join((cell * (wide - 1)).rjust(wide) for cell in cells)
        lines.append(f"{scale.get(row, ''):>8} {bars}".rstrip())
    lines.append(" " * 9 + "".join(f"{name:>{wide}}" for name in names))
    mark = "".join(("▲" if name == best else "").rjust(wide) for name in names)
    return [*lines, f"{'best':>8} {mark}".rstrip()]
