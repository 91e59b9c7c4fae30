"""Embed texts, token by token, by one layer of a pretrained encoder.

It implements the Embedder of scoring/bertscore.py, which knows how to compare the vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorakit.errors import LorakitError
from lorakit.models.base import TextEncoder, load_text_encoder
from lorakit.models.devices import pick_device
from lorakit.scoring.bertscore import DEFAULT_MODELS, OTHER_MODEL, TUNED_LAYERS, Embedded

_BATCH = 32


@dataclass(frozen=True)
class LayerEmbedder:
    """An encoder in float32 and the layer whose output is taken (0: the first layer's input)."""

    encoder: TextEncoder
    layer: int

    @property
    def signature(self) -> str:
        """The model, the layer and the library's version, as a score's signature lists them."""
        version = self.encoder.library_version
        return f"model:{self.encoder.name}|layer:{self.layer}|transformers:{version}"

    def embed(self, texts: Sequence[str]) -> list[Embedded]:
        """Return the tokens of each text, in order; texts of similar length share a batch.

        White space around a text is dropped, and so is what exceeds the model's maximum length.
        """
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        embedded: dict[int, Embedded] = {}
        for start in range(0, len(order), _BATCH):
            places = order[start : start + _BATCH]
            batch = self._embed_batch([texts[place] for place in places])
            embedded.update(zip(places, batch, strict=True))
        return [embedded[place] for place in range(len(texts))]

    @torch.no_grad()
    def _embed_batch(self, texts: Sequence[str]) -> list[Embedded]:
        ids, mask = self.encoder.encode(texts)
        states = self.encoder.model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True
        ).hidden_states[self.layer]
        vectors = torch.nn.functional.normalize(states.float(), dim=-1).cpu().numpy()
        special = torch.tensor(self.encoder.uncounted, device=ids.device)
        counts, is_token = (~torch.isin(ids, special)).cpu().numpy(), mask.bool().cpu().numpy()
        rows = zip(vectors, counts, is_token, strict=True)
        return [Embedded(vector[real], count[real]) for vector, count, real in rows]


def open_embedder(lang: str, name: str | None = None, layer: int | None = None) -> LayerEmbedder:
    """Return the embedder of a folder or hub id (default: the language's) on the fastest device.

    Without `layer` it takes the one tuned for the model, or the last layer of an unknown model.
    Raises LorakitError where there is no such model or layer.
    """
    name = name or DEFAULT_MODELS.get(lang, OTHER_MODEL)
    encoder = load_text_encoder(name, device=pick_device("auto"))
    if layer is None:
        layer = TUNED_LAYERS.get(name, encoder.layers)
    if layer > encoder.layers:
        raise LorakitError(
            f"the model {name} has {encoder.layers} layers, none is number {layer}; "
            "choose another --bertscore-layer"
        )
    return LayerEmbedder(encoder, layer)
