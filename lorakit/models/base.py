"""Base models: the only file that names peft and, but for attention.py, transformers.

It loads a base and its tokenizer by name and tells what the rest needs to know of them, and the
encoder that BERTScore asks for; adapters are put on a base by lora.py.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors import SafetensorError

from lorakit.adapters.base_model import TINY
from lorakit.errors import LorakitError
from lorakit.models.attention import attend_by_row
from lorakit.models.packing import can_pack
from lorakit.models.tokens import Encoder
from lorakit.settings import GenerationSettings, TrainingSettings

ADAPTER = "default"
Conv1D = transformers.pytorch_utils.Conv1D
FAMILY_TARGETS: Mapping[str, Sequence[str]] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
_LOAD_ERRORS = (
    *(OSError, ValueError, ImportError, KeyError, TypeError, AttributeError, RuntimeError),
    SafetensorError,
    StrictDataclassError,
)
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
    """A base model in evaluation mode with its tokenizer, and the name it was asked for by.

    `end_tokens` are the ids at which generation stops, the tokenizer's own end token first.
    """

    model: Any
    tokenizer: Any
    name: str
    end_tokens: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    revision: str | None = None

    @property
    def device(self) -> torch.device:
        return torch.device(next(self.model.parameters()).device)

    @property
    def context(self) -> int:
        """The longest sequence the model can read, in tokens."""
        config = self.model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or 1 << 30)

    @property
    def layers(self) -> int:
        return int(self.model.config.get_text_config().num_hidden_layers)

    @functools.cached_property
    def packs(self) -> bool:
        """Whether rows may be packed into one sequence; found by trial, when first asked."""
        return can_pack(self.model)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the fields of the config that shapes depend on."""
        config = self.model.config.get_text_config().to_dict()
        told = {name: config[name] for name in _SHAPE_FIELDS if name in config}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    @property
    def record(self) -> dict[str, Any]:
        """What an adapter's header says of its base; `local` is whether its name is a folder's."""
        told: dict[str, Any] = {"name": self.name, "fingerprint": self.fingerprint}
        if self.revision is not None:
            told["revision"] = self.revision
        if self.name != TINY and Path(self.name).expanduser().is_dir():
            told["local"] = True
        return told

    def uses_chat(self, choice: str) -> bool:
        """Whether the chat template is applied: `auto` where there is one, `on`, or `off`."""
        if choice == "on" and not self.tokenizer.chat_template:
            raise LorakitError(f"the tokenizer of {self.name} has no chat template; use --chat off")
        return choice == "on" or (choice == "auto" and bool(self.tokenizer.chat_template))

    def encoder_for(
        self, settings: GenerationSettings | TrainingSettings, *, chat: str | None = None
    ) -> Encoder:
        """Return the encoder that the settings ask for; `chat` in the place of theirs."""
        return self.encoder(
            chat=settings.chat if chat is None else chat,
            max_length=settings.max_length,
            truncate=settings.truncate,
        )

    def encoder(
        self, *, chat: str, max_length: int | None = None, truncate: bool = False
    ) -> Encoder:
        """Return the encoder of this model, limited to its context and `max_length`."""
        limit = min(self.context, max_length or self.context)
        return Encoder(self.tokenizer, self.end_tokens[0], limit, self.uses_chat(chat), truncate)


def load_base(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Base:
    """Load a causal language model and its tokenizer from a folder, the hub, or the package.

    Only safetensors weights are read. Raises LorakitError where there is no such model.
    """
    _quieten()
    place = str(Path(__file__).parents[1] / TINY) if name == TINY else os.path.expanduser(name)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    with _naming("the tokenizer of", name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, **options)
    with _naming("the model", name):
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            place, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
        model, told = loaded
        model.to(device)
    if told["missing_keys"]:
        raise LorakitError(
            f"the model {name} has no weights for {min(told['missing_keys'])}; give a whole causal "
            "language model"
        )
    if not tokenizer.is_fast:
        raise LorakitError(f"the tokenizer of {name} is a slow one; convert it to tokenizer.json")
    model.requires_grad_(False).eval()
    ends = _end_tokens(model, tokenizer, name)
    model.generation_config = transformers.GenerationConfig()  # its habits are not the user's wish
    if (head := model.get_output_embeddings()) is not None:
        head.register_forward_pre_hook(_contiguous)
    if device.type == "cpu":
        attend_by_row(model)
    return Base(model, tokenizer, name, ends, dtype, revision)


@contextlib.contextmanager
def _naming(what: str, name: str) -> Iterator[None]:
    """Turn whatever the libraries raise on a bad folder or hub id into one line."""
    try:
        yield
    except _LOAD_ERRORS as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LorakitError(
            f"cannot load {what} {name}: {reason.rstrip('.')}; give a folder with config.json, "
            "tokenizer.json and safetensors weights, or a hub id that can be reached"
        ) from error


def _contiguous(module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Lay the head's input out in one piece: a slice of it is multiplied with a copied weight."""
    return tuple(tensor.contiguous() for tensor in inputs)


@dataclass(frozen=True)
class TextEncoder:
    """A model without a head, in float32, and its tokenizer: what turns texts into vectors.

    `prefix` is put before every text, `uncounted` are the ids of its class and separator tokens,
    `limit` is the longest sequence in tokens.
    """

    model: Any
    tokenizer: Any
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
        """Return token ids and attention mask (both texts × tokens), padded at the right."""
        told = self.tokenizer(
            [f"{self.prefix}{text.strip()}" for text in texts],
            padding=True,
            truncation=True,
            max_length=self.limit,
            return_tensors="pt",
        ).to(self.model.device)
        return told["input_ids"], told["attention_mask"]


def load_text_encoder(name: str, *, device: torch.device) -> TextEncoder:
    """Load a pretrained model without its head, of an encoder and decoder the encoder alone.

    Byte-level tokenizers see a space before the first word, as bert-score has it. Raises
    LorakitError where there is no such model, or weights are missing (but for an unused pooler).
    """
    _quieten()
    place = os.path.expanduser(name)
    with _naming("the tokenizer of", name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    with _naming("the model", name):
        loaded: Any = transformers.AutoModel.from_pretrained(
            place, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    model, told = loaded
    missing = [key for key in told["missing_keys"] if "pooler" not in key]
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


def _longest(model: Any, tokenizer: Any) -> int:
    """Return the longest sequence both read; RoBERTa's positions start after its padding id."""
    positions = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    skipped = getattr(getattr(model, "embeddings", None), "padding_idx", None)
    return min(int(tokenizer.model_max_length), positions - (0 if skipped is None else skipped + 1))


def _end_tokens(model: Any, tokenizer: Any, name: str) -> tuple[int, ...]:
    named = [tokenizer.eos_token_id]
    for config in (model.generation_config, model.config.get_text_config()):
        found = getattr(config, "eos_token_id", None)
        named += found if isinstance(found, list) else [found]
    ends = tuple(dict.fromkeys(token for token in named if token is not None))
    if not ends:
        raise LorakitError(
            f"the model {name} has no end token; set eos_token in its tokenizer_config.json"
        )
    return ends


def _quieten() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)


def put_lora(model: Any, **config: Any) -> None:
    """Put fresh LoRA modules on a model by PEFT; `config` are fields of its LoraConfig."""
    told = peft.LoraConfig(task_type="CAUSAL_LM", **config)
    peft.inject_adapter_in_model(told, model, adapter_name=ADAPTER)


def new_generation_config(base: Base, **settings: Any) -> Any:
    """Return a generation config of these settings alone, none of those the model came with."""
    return transformers.GenerationConfig(eos_token_id=list(base.end_tokens), **settings)
