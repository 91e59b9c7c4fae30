"""Import torch, transformers and PEFT in two thirds of the time that they take by themselves.

Transformers and PEFT import on sight, where it is installed, what this program has no use for yet:
SciPy, for losses of object detection, and bitsandbytes, with all of PyTorch's compiler, for weights
of 4 or 8 bits. While they are imported these look as if they were not installed; a base of such
weights imports bitsandbytes when it is loaded. And Python's garbage collector, which would find
nothing, does not go through all that has been imported so far again and again.

Whoever opens a base imports this module first; later imports of the libraries then cost nothing.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
from collections.abc import Iterator

BITSANDBYTES = "bitsandbytes"
_UNUSED = (BITSANDBYTES, "scipy")
_LIBRARIES = ("torch", "transformers.modeling_utils", "peft")
# What they remember of packages: functions that are to look again, once these are to be seen.
_REMEMBERED = {
    "transformers.utils.import_utils": ("is_scipy_available", "is_bitsandbytes_available"),
    "peft.import_utils": ("is_bnb_available", "is_bnb_4bit_available"),
}


@contextlib.contextmanager
def hidden(*packages: str) -> Iterator[None]:
    """Make packages look as if they were not installed, inside the block.

    One that has been imported already stays as it is.
    """
    absent = [name for name in packages if name not in sys.modules]
    for name in absent:
        sys.modules[name] = None  # type: ignore[assignment]  # what Python takes for missing
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
        _forget()


def _forget() -> None:
    """Have transformers and PEFT look again which packages are installed."""
    for module, names in _REMEMBERED.items():
        for name in names:
            if (function := getattr(sys.modules.get(module), name, None)) is not None:
                function.cache_clear()


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Let the garbage collector rest inside the block, and never look at what is there after it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


with hidden(*_UNUSED), _uncollected():
    for library in _LIBRARIES:
        importlib.import_module(library)
