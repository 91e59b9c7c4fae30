"""What lorakit asks of a transformers model of any family, such as where its layers are.

A model is typed `Model` everywhere in lorakit: transformers types its attributes too broadly to be
of use, and code from the hub does not type them at all. This module knows neither tokens nor LoRA.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch

from lorakit.errors import LorakitError

Model = Any  # transformers.PreTrainedModel
ModelConfig = Any  # transformers.PretrainedConfig
Forward = Callable[..., torch.Tensor]  # what a module computes


def text_config(model: Model) -> ModelConfig:
    """Return the config of the text decoder; for most models that is the whole config."""
    return model.config.get_text_config()


def forward_parameters(model: Model) -> Collection[str]:
    """Return the names of the arguments that the model's forward takes."""
    return inspect.signature(model.forward).parameters


def steady_positions(model: Model) -> float:
    """Return up to how many positions a model's rotary frequencies do not depend on the length.

    Those of dynamic NTK and LongRoPE change for every token once one of a batch lies beyond.
    """
    config = text_config(model)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    by_layer_type = [entry for entry in rope.values() if isinstance(entry, Mapping)]
    return min((_steady(entry, config) for entry in by_layer_type or [rope]), default=math.inf)


def _steady(rope: Mapping[str, Any], config: ModelConfig) -> float:
    """Return `steady_positions` of one set of rotary parameters."""
    kind = str(rope.get("rope_type") or rope.get("type"))
    if "dynamic" not in kind and kind != "longrope":
        return math.inf
    name = "original_max_position_embeddings"
    return float(rope.get(name) or getattr(config, name, None) or config.max_position_embeddings)


def decoder_layers(model: Model) -> Sequence[torch.nn.Module] | None:
    """Return the model's decoder layers, bottom first; None if they are not in one list."""
    count = getattr(text_config(model), "num_hidden_layers", None)
    lists = (m for m in model.get_decoder().modules() if isinstance(m, torch.nn.ModuleList))
    return next((list(layers) for layers in lists if len(layers) == count), None)


def decoder_prefix(model: Model) -> str:
    """Return the prefix of the text decoder's module names: "" for a model of text alone."""
    if text_config(model) is model.config:
        return ""
    decoder = model.get_decoder()
    return next(str(name) for name, module in model.named_modules() if module is decoder)


def python_modules(model: Model) -> Iterator[ModuleType]:
    """Yield the Python modules that a model's classes are from, by name."""
    names = {type(part).__module__ for part in model.modules()}
    yield from (sys.modules[name] for name in sorted(names))


@contextlib.contextmanager
def activation_checkpointing(model: Model) -> Iterator[None]:
    """Inside the block, recompute activations in the backward pass, so that fewer are stored.

    A layer checkpoints only while its own `training` flag is set; the flags of its submodules stay
    as they are, so that no dropout is switched on. Raises LorakitError for a model that cannot
    checkpoint.
    """
    if not model.supports_gradient_checkpointing:
        raise LorakitError("this model cannot checkpoint; leave --gradient-checkpointing out")
    since_5_23 = hasattr(model, "activation_checkpointing_enable")
    name = "activation_checkpointing" if since_5_23 else "gradient_checkpointing"
    getattr(model, f"{name}_enable")({"use_reentrant": False})
    layers = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    try:
        for layer in layers:
            layer.training = True
        yield
    finally:
        for layer in layers:
            layer.training = False
        getattr(model, f"{name}_disable")()


@contextlib.contextmanager
def at_the_head(model: Model, act: Callable[[], None]) -> Iterator[None]:
    """Inside the block, act before a model's output head computes: when its layers are done.

    And once more in the end.
    """
    head = model.get_output_embeddings()
    handle = None if head is None else head.register_forward_pre_hook(lambda *_: act())
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
        act()


@contextlib.contextmanager
def other_forwards(forwards: Mapping[Any, Forward]) -> Iterator[None]:
    """Inside the block, torch's modules compute by these functions, not by their classes' own."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, forward in before.items():
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward
