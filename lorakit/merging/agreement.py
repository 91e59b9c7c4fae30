"""Whole weights in merges: kept where the adapters agree, since sums of them have no meaning."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.names import whole_key
from lorakit.adapters.tensors import Tensor
from lorakit.adapters.whole import is_saved
from lorakit.errors import LorakitError
from lorakit.foreign_text import quote


def common_whole(adapters: Sequence[Adapter], modules: Collection[str]) -> dict[str, Tensor]:
    """Return the whole weights of the adapters by PEFT's names, in a merge with LoRA on `modules`.

    Raises LorakitError naming the first weight that two of them do not have alike, and one on which
    another has LoRA.
    """
    first = adapters[0]
    for other in adapters[1:]:
        for name in sorted(first.whole.keys() | other.whole.keys()):
            if not _alike(first.whole.get(name), other.whole.get(name)):
                raise LorakitError(
                    f"{first.name} and {other.name} differ in {quote(name)}, which is held whole, "
                    "and whole weights have no sum; fuse one into the base (lorakit fuse) and "
                    "train the others on that, without modules_to_save"
                )
    for name in first.whole:
        _check_unshared(adapters, name, modules)
    return {whole_key(name, modules): tensor for name, tensor in first.whole.items()}


def _check_unshared(adapters: Sequence[Adapter], name: str, modules: Collection[str]) -> None:
    """Raise LorakitError where one adapter saves a module whole and another has LoRA on it."""
    module = name.rpartition(".")[0]
    for adapter in adapters:
        if module in modules and is_saved(adapter.config, module):
            raise LorakitError(
                f"{adapter.name} holds {quote(name)} whole, and another has LoRA on it, which PEFT "
                "cannot hold together; fuse the adapter (lorakit fuse) and train the other on that"
            )


def _alike(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return np.array_equal(one.array(), other.array())


def check_no_dora(adapters: Sequence[Adapter]) -> None:
    """Raise LorakitError for an adapter of DoRA, whose change is no product of A and B."""
    for adapter in adapters:
        if adapter.is_dora:
            raise LorakitError(
                f"{adapter.name} is DoRA's, and its magnitudes cannot be summed; merge what LoRA "
                "can hold of it by --approximate dora"
            )
