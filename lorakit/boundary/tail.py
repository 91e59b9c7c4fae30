"""A model's tail: the final norm, and whatever the model does after its decoder.

That may be more than a head: Phi's has a bias, Gemma 2 caps the logits. So the tail is run by the
model's own forward, with its decoder replaced for the moment. The final norm is recognised by what
it does, not by its name: it is the part of the decoder whose output is also the decoder's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from lorakit.errors import LorakitError
from lorakit.models.architecture import Model, decoder_layers

DecoderOutput = Any  # transformers.modeling_outputs.BaseModelOutputWithPast or a similar class


class Tail(NamedTuple):
    """A model's final norm, and the class of its decoder's output."""

    model: Model
    norm: torch.nn.Module
    output_class: type[DecoderOutput]

    def logits(self, state: torch.Tensor) -> torch.Tensor:
        """Return the logits (rows, tokens, vocabulary) of a state (rows, tokens, width).

        The state is a layer's output, before the final norm.
        """
        decoder = self.model.get_decoder()
        replaced = self.output_class(last_hidden_state=self.norm(state))
        decoder.forward = lambda *args, **kwargs: replaced
        try:
            ids = torch.zeros(state.shape[:2], dtype=torch.int64, device=state.device)
            logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
            return logits
        finally:
            del decoder.forward


class TailWatch:
    """Watches a model's forward pass for its tail."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._parts: list[tuple[torch.nn.Module, object]] = []
        self._outputs: list[DecoderOutput] = []

    @contextlib.contextmanager
    def standing(self) -> Iterator[TailWatch]:
        """Watch the passes inside the block."""
        decoder = self._model.get_decoder()
        with contextlib.ExitStack() as hooks:
            for part in decoder.children():
                watch = part.register_forward_hook(
                    lambda module, inputs, output: self._parts.append((module, output))
                )
                hooks.callback(watch.remove)
            watch = decoder.register_forward_hook(
                lambda module, inputs, output: self._outputs.append(output)
            )
            hooks.callback(watch.remove)
            yield self

    def tail(self) -> Tail:
        """Return the tail that the pass has shown.

        Raises LorakitError for a model without a final norm, or whose layers are not in one list.
        """
        last = self._outputs[0].last_hidden_state
        for part, output in self._parts:
            same = isinstance(output, torch.Tensor) and output.data_ptr() == last.data_ptr()
            if same and decoder_layers(self._model):
                return Tail(self._model, part, type(self._outputs[0]))
        raise LorakitError(
            f"{type(self._model).__name__} has no final norm that can be found; use --by evaluation"
        )
