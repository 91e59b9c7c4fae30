"""Whether a model can have KVCache in the place of its own: by its config, and by a trial."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from lorakit.models.architecture import (
    Model,
    ModelConfig,
    decoder_layers,
    forward_parameters,
    text_config,
)
from lorakit.models.attention import BY_ROW
from lorakit.models.kv_cache import cache_parameter
from lorakit.models.reading import Reader

_KINDS = {"full_attention", "sliding_attention"}
_ATTENTIONS = {"eager", "sdpa", BY_ROW}
# What a config says of windows that Reader has.
_WINDOWS = ("sliding_window", "max_window_layers")
_NEEDED = {"position_ids", "attention_mask", "logits_to_keep"}
# What a model raises whose code cannot work with that cache.
REFUSALS = (TypeError, AttributeError, ValueError, RuntimeError, IndexError, KeyError)
_TRIED = range(3, 19)  # tokens that are read in a trial
_TRIED_WINDOW = 3


def can_read(model: Model) -> bool:
    """Return whether, by its config, a model's layers attend in a way that Reader supports."""
    config = text_config(model)
    return (
        config._attn_implementation in _ATTENTIONS
        and set(getattr(config, "layer_types", None) or ()) <= _KINDS
        and all(any(part in name for part in _WINDOWS) for name in _named_windows(config))
        and set(forward_parameters(model)) >= _NEEDED
        and cache_parameter(model) is not None
        and decoder_layers(model) is not None
    )


@torch.inference_mode()
def can_batch_continuously(model: Model) -> bool:
    """Return whether rows can come and go in a model's cache, by its config and by a trial.

    In the trial, tokens read in parts beside another row, which ends elsewhere, and one by one,
    have to give the same most probable tokens as those read whole by the model's own forward (in
    half precision, nearly all of them). A sliding window is a short one meanwhile.
    """
    if not can_read(model):
        return False
    size = text_config(model).vocab_size
    tokens = [token % size for token in _TRIED]
    with _short_window(text_config(model)):
        reader = Reader(model, 2, len(tokens))
        try:
            plain = model(input_ids=torch.tensor([tokens], device=model.device)).logits[0]
            expected = plain.float().argmax(-1).tolist()
            reader.extend([tokens[:1], tokens[:-6:-1]], [0, 0], 0, 5)
            reader.cache.hold(1, 1, reader.read_prefix(tokens[:2]))
            short, long = reader.extend([tokens[1:-4], tokens[2:]], [1, 2], 0, len(tokens) - 2)
            several = reader.step([tokens[1:3], tokens[2:3]], [1, 2])
            single = reader.extend([tokens[1:2], tokens[2:3]], [1, 2], 0, 1)
        except REFUSALS:
            return False
    pairs = [*zip(long, expected[2:], strict=True), *zip(short[3:], expected[1:-4], strict=True)]
    ends = [row[-1] for row in (*several, *single)]
    pairs += zip(ends, (expected[place] for place in (2, 2, 1, 2)), strict=True)
    return alike_enough([one == other for one, other in pairs], model.dtype)


@contextlib.contextmanager
def _short_window(config: ModelConfig) -> Iterator[None]:
    """Inside the block, a sliding window, where there is one, is shorter than a trial."""
    window = getattr(config, "sliding_window", None)
    if window is not None:
        config.sliding_window = min(window, _TRIED_WINDOW)
    try:
        yield
    finally:
        if window is not None:
            config.sliding_window = window


def _named_windows(config: ModelConfig) -> list[str]:
    """Return the names of what a config says of windows: models with others mask by themselves."""
    return [name for name in config.to_dict() if "window" in name]


def alike_enough(alike: Sequence[bool], dtype: torch.dtype) -> bool:
    """Return whether a trial agrees: at all tokens, or in half precision at four fifths of them."""
    needed = 1.0 if dtype == torch.float32 else 0.8
    return sum(alike) >= needed * len(alike)
