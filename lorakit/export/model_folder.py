"""A model in its folder: its modules, on no device, and the names of their weights in its files.

The modules tell what LoRA can be on and in which shape; nothing is read but the config.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.pytorch_utils import Conv1D

from lorakit.errors import LorakitError
from lorakit.hub import hub_errors_explained
from lorakit.models.architecture import Model
from lorakit.models.base import Base
from lorakit.models.loading import explaining_load_errors, quieten_transformers
from lorakit.reach import TINY, check_model
from lorakit.settings import ModelSettings

# What belongs to a model besides its weights: configs, tokenizers, templates, licences, code.
PARTS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")


@dataclass(frozen=True)
class ModelFolder:
    """A model of this name in a folder, its modules on torch's meta device."""

    name: str
    folder: Path
    model: Model
    revision: str | None = None

    @property
    def as_base(self) -> Base:
        """The model as what check_fits and headers ask about; it has no tokenizer."""
        return Base(self.model, None, self.name, (), revision=self.revision)

    @property
    def quantisation(self) -> str | None:
        """The method by which its weights are stored, where they are no plain numbers."""
        config = getattr(self.model.config, "quantization_config", None)
        if config is None:
            return None
        fields = config if isinstance(config, dict) else config.to_dict()
        return str(fields.get("quant_method", "unknown"))

    @property
    def ties_head(self) -> bool:
        """Whether the output head's weights are those of the input embedding."""
        return bool(getattr(self.model.config.get_text_config(), "tie_word_embeddings", False))

    def is_head(self, module: str) -> bool:
        """Return whether a module is the output head."""
        return self.model.get_submodule(module) is self.model.get_output_embeddings()

    def stores_transposed(self, module: str) -> bool:
        """Return whether a module's weight is (d_in, d_out), as GPT-2's are."""
        return isinstance(self.model.get_submodule(module), Conv1D)

    def weight_of(self, module: str, keys: Collection[str]) -> str:
        """Return which of the stored tensors' names is the weight of a module, as `key_of` does."""
        return self.key_of(f"{module}.weight", keys)

    def key_of(self, parameter: str, keys: Collection[str]) -> str:
        """Return which of the stored tensors' names is that of a parameter.

        Checkpoints of a bare decoder lack the prefix of the model with a head, `transformer.`.
        Raises LorakitError where none is.
        """
        prefix = f"{self.model.base_model_prefix}."
        for candidate in (parameter, parameter.removeprefix(prefix), f"{prefix}{parameter}"):
            if candidate in keys:
                return candidate
        raise LorakitError(
            f"{self.name} stores {parameter.removesuffix('.weight')} under another name or "
            "together with others; give a base whose files hold it as one tensor"
        )


def open_model_folder(settings: ModelSettings, name: str) -> ModelFolder:
    """Return the folder of a model, of tiny, or of one on the hub, which is fetched whole.

    Raises LorakitError for what cannot be had, and for a config that transformers does not know.
    """
    check_model(name, settings.revision)
    quieten_transformers()
    folder = _folder(name, settings.revision)
    options: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    with explaining_load_errors("the model", name):
        config = transformers.AutoConfig.from_pretrained(folder, **options)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, **options)
    return ModelFolder(name, folder, model, settings.revision)


def _folder(name: str, revision: str | None) -> Path:
    """Return the folder with a model's files, fetched from the hub where it is none."""
    if name == TINY:
        return Path(__file__).parents[1] / TINY
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    with hub_errors_explained(name, revision):
        patterns = [*PARTS, "*.safetensors"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
