"""All of an adapter on its base: whole weights and DoRA's magnitudes besides A and B.

Whole weights stand in place of the base's for as long as a `with` block lasts. LoRA itself is put
on by lora.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.tensors import Tensor
from lorakit.adapters.whole import without_whole
from lorakit.errors import LorakitError
from lorakit.models.architecture import Model
from lorakit.models.base import Base
from lorakit.models.lora import PeftLayer, attach_lora


@contextlib.contextmanager
def attached(base: Base, adapter: Adapter) -> Iterator[dict[str, PeftLayer]]:
    """Put all of an adapter on its base, and yield PEFT's layers; whole weights go afterwards.

    Raises LorakitError naming the module, or weight, and both shapes if the adapter does not fit.
    """
    check_whole_fits(base, adapter)
    before: dict[str, torch.nn.Parameter] = {}
    try:
        for name, tensor in adapter.whole.items():
            values = torch.from_numpy(tensor.array().copy())
            before[name] = _replace_(base.model, name, values)
        yield attach_lora(base, adapter)
    finally:
        for name, parameter in before.items():
            _replace_(base.model, name, parameter)


def _replace_(model: Model, name: str, values: torch.Tensor) -> torch.nn.Parameter:
    """Put other values in place of a parameter, in its number format; return the one before."""
    module, last = _owner(model, name), name.rpartition(".")[2]
    before = module.get_parameter(last)
    after = values.to(before.device, before.dtype)
    setattr(module, last, torch.nn.Parameter(after, requires_grad=False))
    return before


def _owner(model: Model, name: str) -> torch.nn.Module:
    """Return the base's module that has a parameter, whether LoRA is on it or not."""
    module = model.get_submodule(name.rpartition(".")[0])
    plain: torch.nn.Module = getattr(module, "base_layer", module)  # PEFT's name
    return plain


def check_whole_fits(base: Base, adapter: Adapter) -> None:
    """Raise LorakitError for a whole weight that the base lacks, or has in another shape.

    So it does for one that embedding and head share in the base but not in the adapter.
    """
    if adapter.whole and base.sharded:
        raise LorakitError(
            f"{adapter.name} holds {next(iter(adapter.whole))} whole, which --shard cannot place; "
            "fuse it first (lorakit fuse), or leave --shard out"
        )
    named = base.model.named_parameters(remove_duplicate=False)
    shapes = {name.replace(".base_layer.", "."): tuple(p.shape) for name, p in named}
    for name, tensor in adapter.whole.items():
        if name not in shapes:
            raise LorakitError(
                f"{adapter.name}: {base.name} has no weights {name}; give the base the adapter was "
                "trained on by --model"
            )
        if tensor.shape != shapes[name]:
            raise _other_shape(base, adapter, name, shapes[name])
    _check_shared(base, adapter)


def without_copies(base: Base, adapter: Adapter, note: Callable[[str], None]) -> Adapter:
    """Return the adapter without whole weights that are the base's own, value by value; say which.

    In lower precision than they were saved in, the base's own cannot be told from others.
    """
    if base.sharded:
        return adapter
    own = base.model.state_dict()
    copies = [name for name, tensor in adapter.whole.items() if _equals(tensor, own.get(name))]
    if not copies:
        return adapter
    note(f"{adapter.name}: {', '.join(copies)}, which it holds whole, are the base's own: left out")
    return without_whole(adapter, copies)


def _equals(tensor: Tensor, own: torch.Tensor | None) -> bool:
    if own is None or tensor.shape != tuple(own.shape) or not own.is_floating_point():
        return False
    return torch.equal(torch.from_numpy(tensor.array().copy()), own.float().cpu())


def _other_shape(
    base: Base, adapter: Adapter, name: str, expected: tuple[int, ...]
) -> LorakitError:
    shape = adapter.whole[name].shape
    where = f"{adapter.name}: {name} is {_dims(shape)}, in {base.name} it is {_dims(expected)}"
    if shape[1:] == expected[1:] and _is_vocabulary(base.model, name):
        return LorakitError(
            f"{where}: the vocabulary was resized; resize the base's by resize_token_embeddings"
            f"({shape[0]}), save it with the adapter's tokenizer and give it by --model"
        )
    return LorakitError(f"{where}; give the base the adapter was trained on by --model")


def _check_shared(base: Base, adapter: Adapter) -> None:
    """Raise LorakitError where the base's embedding and head are one, and the adapter's are not."""
    if not getattr(base.model.config.get_text_config(), "tie_word_embeddings", False):
        return
    shared = {n: t for n, t in adapter.whole.items() if _is_vocabulary(base.model, n)}
    if shared and (len(shared) == 1 or len({bytes(t.data) for t in shared.values()}) > 1):
        raise LorakitError(
            f"{adapter.name} holds {next(iter(shared))} whole, which {base.name} shares between "
            "embedding and head; save both, with equal weights, or untie the base's "
            "(tie_word_embeddings)"
        )


def _is_vocabulary(model: Model, name: str) -> bool:
    """Return whether a parameter is of the input embedding or of the output head."""
    return _owner(model, name) in (model.get_input_embeddings(), model.get_output_embeddings())


def _dims(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
