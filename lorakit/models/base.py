"""A base model with its tokenizer, and what the rest of lorakit asks about it.

It is loaded in loading.py, and adapters are attached in lora.py.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lorakit.errors import LorakitError
from lorakit.models.architecture import Model, text_config
from lorakit.models.batches import can_pack
from lorakit.models.cache_trial import can_batch_continuously
from lorakit.models.chat import Chat, Tokenizer
from lorakit.models.tokens import Encoder
from lorakit.reach import TINY
from lorakit.settings import GenerationSettings, TrainingSettings

UNLIMITED = 1 << 30  # tokens: the context of a model whose config sets none
_SHAPE_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


@dataclass(frozen=True)
class Base:
    """A base model in evaluation mode with its tokenizer, and the name that the user gave.

    `end_tokens` are the ids at which generation stops, the tokenizer's own end token first.
    `load_in` says in how many bits its weights were quantised when it was loaded, None if they were
    not. If it is `sharded`, each process holds a part of it, and all have to run it equally often.
    """

    model: Model
    tokenizer: Tokenizer
    name: str
    end_tokens: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    revision: str | None = None
    load_in: str | None = None
    sharded: bool = False

    @property
    def device(self) -> torch.device:
        return torch.device(next(self.model.parameters()).device)

    @property
    def context(self) -> int:
        """The longest sequence the model can read, in tokens."""
        return int(getattr(text_config(self.model), "max_position_embeddings", None) or UNLIMITED)

    @property
    def layers(self) -> int:
        """The number of decoder layers.

        Raises LorakitError for a model whose config does not tell.
        """
        count = getattr(text_config(self.model), "num_hidden_layers", None)
        if count is None:
            raise LorakitError(
                f"{self.name} does not tell its number of layers (num_hidden_layers in its "
                "config); leave out what chooses or cuts layers"
            )
        return int(count)

    @functools.cached_property
    def packs(self) -> bool:
        """Whether rows can be packed into one sequence; found by a trial on first use."""
        return can_pack(self.model)

    @functools.cached_property
    def batches_continuously(self) -> bool:
        """Whether rows can come and go while others are decoded; found by a trial on first use."""
        return can_batch_continuously(self.model)

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the config fields that determine the shapes of the weights."""
        config = text_config(self.model).to_dict()
        fields = {name: config[name] for name in _SHAPE_FIELDS if name in config}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    @property
    def record(self) -> dict[str, str | bool]:
        """The base as an adapter's header records it; `local` marks the name of a folder."""
        record: dict[str, str | bool] = {"name": self.name, "fingerprint": self.fingerprint}
        if self.revision is not None:
            record["revision"] = self.revision
        if self.name != TINY and Path(self.name).expanduser().is_dir():
            record["local"] = True
        if self.load_in is not None:
            record["load_in"] = self.load_in
        return record

    def uses_chat(self, choice: str) -> bool:
        """Return whether to apply the chat template; `auto` does if there is one.

        Raises LorakitError for `on` if the tokenizer has no template.
        """
        return _uses_chat(self.tokenizer, choice, self.name)

    def encoder_for(self, settings: GenerationSettings | TrainingSettings) -> Encoder:
        """Return the encoder that the settings ask for, limited to the model's context."""
        encoder = new_encoder(self.tokenizer, self.end_tokens, self.context, self.name, settings)
        try:
            embeddings = self.model.get_input_embeddings()
        except NotImplementedError:  # a family that transformers does not know
            return encoder
        return replace(encoder, embedded=len(embeddings.weight))

    def encoder(
        self, *, chat: str, max_length: int | None = None, truncate: bool = False
    ) -> Encoder:
        """Return the encoder of this model, limited to its context and `max_length`."""
        settings = GenerationSettings(chat=chat, max_length=max_length, truncate=truncate)
        return self.encoder_for(settings)


def _uses_chat(tokenizer: Tokenizer, choice: str, name: str) -> bool:
    if choice == "on" and not tokenizer.chat_template:
        raise LorakitError(f"the tokenizer of {name} has no chat template; use --chat off")
    return choice == "on" or (choice == "auto" and bool(tokenizer.chat_template))


def new_encoder(
    tokenizer: Tokenizer,
    end_tokens: tuple[int, ...],
    context: int,
    name: str,
    settings: GenerationSettings | TrainingSettings,
) -> Encoder:
    """Return an encoder; LorakitError for a system turn or arguments without a chat template."""
    uses_chat = _uses_chat(tokenizer, settings.chat, name)
    if not uses_chat and (settings.system is not None or settings.chat_args):
        option = "--chat-arg" if settings.system is None else "--system"
        raise LorakitError(
            f"{option} goes to a chat template, and none is applied to {name}; take an instruct "
            "model and leave --chat off out"
        )
    chat = Chat(tokenizer, settings.system, dict(settings.chat_args)) if uses_chat else None
    limit = min(context, settings.max_length or context)
    return Encoder(tokenizer, end_tokens, limit, chat, settings.truncate, settings.cut, model=name)
