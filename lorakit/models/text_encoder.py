"""Embed texts, token by token, by one layer of a pretrained encoder.

LayerEmbedder implements the Embedder of scoring/bertscore.py, which compares the vectors.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers

from lorakit.errors import LorakitError
from lorakit.foreign_text import check_encodable, quote
from lorakit.models.architecture import Model
from lorakit.models.base import UNLIMITED
from lorakit.models.chat import Tokenizer
from lorakit.models.devices import pick_device
from lorakit.models.loading import explaining_load_errors, quieten_transformers
from lorakit.reach import check_model
from lorakit.scoring.bertscore import DEFAULT_MODELS, OTHER_MODEL, TUNED_LAYERS, EmbeddedText

_BATCH = 32


@dataclass(frozen=True)
class TextEncoder:
    """A model without a head, in float32, and its tokenizer.

    `prefix` is put before every text, `uncounted` are the ids of the class and separator tokens,
    `limit` is the longest sequence in tokens.
    """

    model: Model
    tokenizer: Tokenizer
    name: str
    prefix: str
    uncounted: tuple[int, ...]
    limit: int

    @property
    def layers(self) -> int:
        return int(self.model.config.num_hidden_layers)

    @property
    def library_version(self) -> str:
        return str(transformers.__version__)

    def encode(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token ids and attention mask (both texts × tokens), padded on the right."""
        for text in texts:
            check_encodable(text, f"the text {quote(text)}")
        encoded = self.tokenizer(
            [f"{self.prefix}{text.strip()}" for text in texts],
            padding=True,
            truncation=True,
            max_length=self.limit,
            return_tensors="pt",
        ).to(self.model.device)
        return encoded["input_ids"], encoded["attention_mask"]


def load_text_encoder(name: str, *, device: torch.device) -> TextEncoder:
    """Load a pretrained model without its head; of an encoder-decoder model, the encoder alone.

    Byte-level tokenizers see a space before the first word, as in bert-score. Raises LorakitError
    if there is no such model, or weights are missing (except for an unused pooler).
    """
    check_model(name)
    quieten_transformers()
    location = os.path.expanduser(name)
    with explaining_load_errors("the tokenizer of", name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(location)
    with explaining_load_errors("the model", name):
        model, report = transformers.AutoModel.from_pretrained(
            location, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    missing = [key for key in report["missing_keys"] if "pooler" not in key]
    if missing:
        raise LorakitError(f"the model {name} has no weights for {min(missing)}; give a whole one")
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    tokenizer.padding_side = "right"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    spaced = isinstance(tokenizer, (transformers.RobertaTokenizer, transformers.GPT2Tokenizer))
    ends = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    uncounted = tuple(token for token in ends if token is not None)
    model.requires_grad_(False).eval().to(device)
    return TextEncoder(
        model, tokenizer, name, " " if spaced else "", uncounted, _longest(model, tokenizer)
    )


def _longest(model: Model, tokenizer: Tokenizer) -> int:
    """Return the longest sequence that both can read; RoBERTa counts from after padding_idx."""
    positions = getattr(model.config, "max_position_embeddings", None) or UNLIMITED
    skipped = getattr(getattr(model, "embeddings", None), "padding_idx", None)
    return min(int(tokenizer.model_max_length), positions - (0 if skipped is None else skipped + 1))


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

    def embed(self, texts: Sequence[str]) -> list[EmbeddedText]:
        """Return the tokens of each text, in order; texts of similar length share a batch.

        White space around a text is dropped, as are tokens beyond the model's maximum length.
        """
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        embedded: dict[int, EmbeddedText] = {}
        for start in range(0, len(order), _BATCH):
            indices = order[start : start + _BATCH]
            batch = self._embed_batch([texts[index] for index in indices])
            embedded.update(zip(indices, batch, strict=True))
        return [embedded[index] for index in range(len(texts))]

    @torch.no_grad()
    def _embed_batch(self, texts: Sequence[str]) -> list[EmbeddedText]:
        ids, mask = self.encoder.encode(texts)
        states = self.encoder.model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True
        ).hidden_states[self.layer]
        vectors = torch.nn.functional.normalize(states.float(), dim=-1).cpu().numpy()
        special = torch.tensor(self.encoder.uncounted, device=ids.device)
        counts, is_token = (~torch.isin(ids, special)).cpu().numpy(), mask.bool().cpu().numpy()
        rows = zip(vectors, counts, is_token, strict=True)
        return [EmbeddedText(vector[real], count[real]) for vector, count, real in rows]


def open_embedder(lang: str, name: str | None = None, layer: int | None = None) -> LayerEmbedder:
    """Return the embedder of a folder or hub id (default: the language's) on the fastest device.

    Without `layer` it takes the one tuned for the model, or the last layer of an unknown model.
    Raises LorakitError if there is no such model or layer.
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
