"""The last layer, of which only the tokens count whose logits are asked for.

Above it no token sees another, so that what it computes of the other tokens after attention is read
by nobody: its MLP, and the projection before that. Here both compute the tokens that count, and
give zeros for the others:

    tokens        a b c d e f        logits are asked for after d and f
    MLP reads           d   f
    MLP gives     0 0 0 D 0 F

Gradients of the others are zero with and without it. Where the MLP has LoRA, both compute all
tokens, since pruning weighs all that LoRA reads, and rows are told apart by their places.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lorakit.models.architecture import Forward, Model, decoder_layers, other_forwards

_LARGEST_STEP = 64  # tokens, of which leaving some out gains nothing


@contextlib.contextmanager
def last_layer_at(model: Model, places: torch.Tensor, tokens: int) -> Iterator[None]:
    """Inside the block, the last layer computes the tokens at `places` (n,) of rows of so many."""
    parts = _parts(model) if leaves_out(len(places), tokens) else ()
    with other_forwards({part: _at(places, tokens, part.forward) for part in parts}):
        yield


def leaves_out(count: int, tokens: int) -> bool:
    """Return whether the last layer leaves out any tokens where so many count."""
    return tokens > _LARGEST_STEP and 2 * count <= tokens


def _at(places: torch.Tensor, tokens: int, forward: Forward) -> Forward:
    """Return what computes some places of (rows, tokens, …) by a module's forward."""

    def compute(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        if x.dim() != 3 or x.shape[1] != tokens:
            return forward(x, *args, **kwargs)
        own = places.to(x.device)  # a model can lie on several
        given = forward(x.index_select(1, own), *args, **kwargs)
        if not isinstance(given, torch.Tensor):  # with what routes tokens to experts
            return forward(x, *args, **kwargs)
        whole = given.new_zeros(len(x), tokens, given.shape[2])
        whole[:, own] = given  # index_copy would store them for the backward pass
        return whole

    return compute


def _parts(model: Model) -> Sequence[Any]:
    """Return the last layer's MLP and the projection before it, where these can be told."""
    layers = decoder_layers(model)
    if not layers or _checkpoints(layers[-1]):  # what is computed again is so outside the block
        return []
    mlp = getattr(layers[-1], "mlp", None)
    projection = getattr(getattr(layers[-1], "self_attn", None), "o_proj", None)
    if not _is_plain(mlp):  # what reads all tokens needs what attention gives for them
        return []
    return [mlp, projection] if _is_plain(projection) else [mlp]


def _checkpoints(layer: torch.nn.Module) -> bool:
    return layer.training and bool(getattr(layer, "gradient_checkpointing", False))


def _is_plain(part: Any) -> bool:
    """Return whether a module computes each token by frozen linear layers without LoRA."""
    if not isinstance(part, torch.nn.Module):
        return False
    modules = list(part.modules())
    holders = [module for module in modules if module._parameters or module._buffers]
    are_linear = all(
        isinstance(module, torch.nn.Linear) and not module.weight.requires_grad
        for module in holders
    )
    return are_linear and bool(holders) and not any(hasattr(m, "base_layer") for m in modules)
