"""Base models: load one with its tokenizer, and answer what the rest of lorakit asks about it.

Adapters are attached in lora.py; text is generated in generation.py.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils.tqdm import enable_progress_bars
from safetensors import SafetensorError

from lorakit.adapters.safetensors import read_tensors
from lorakit.errors import LorakitError
from lorakit.models.architecture import Model, text_config
from lorakit.models.attention import attend_by_row
from lorakit.models.batches import can_pack
from lorakit.models.chat import Chat, Tokenizer
from lorakit.models.tokens import Encoder
from lorakit.reach import TINY, check_model, is_only_cached
from lorakit.settings import GenerationSettings, TrainingSettings

UNLIMITED = 1 << 30  # tokens: the context of a model whose config sets none
_LOAD_ERRORS = (
    OSError,
    ValueError,
    ImportError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
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
    """A base model in evaluation mode with its tokenizer, and the name that the user gave.

    `end_tokens` are the ids at which generation stops, the tokenizer's own end token first.
    """

    model: Model
    tokenizer: Tokenizer
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
        return record

    def uses_chat(self, choice: str) -> bool:
        """Return whether to apply the chat template; `auto` does if there is one.

        Raises LorakitError for `on` if the tokenizer has no template.
        """
        return _uses_chat(self.tokenizer, choice, self.name)

    def encoder_for(self, settings: GenerationSettings | TrainingSettings) -> Encoder:
        """Return the encoder that the settings ask for, limited to the model's context."""
        encoder = _new_encoder(self.tokenizer, self.end_tokens, self.context, self.name, settings)
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


def _new_encoder(
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


def load_encoder(
    name: str,
    settings: GenerationSettings | TrainingSettings,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Encoder:
    """Load a model's tokenizer and configs, without its weights, and return its encoder.

    Raises LorakitError as `load_base` does.
    """
    quieten_transformers()
    location, options = (
        _location(name),
        {"revision": revision, "trust_remote_code": trust_remote_code},
    )
    with explaining_load_errors("the tokenizer of", name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(location, **options)
        config = transformers.AutoConfig.from_pretrained(location, **options).get_text_config()
    configs = [config]
    with explaining_load_errors("the generation config of", name), contextlib.suppress(OSError):
        configs.insert(  # not every model comes with one
            0, transformers.GenerationConfig.from_pretrained(location, revision=revision or "main")
        )
    _prepare_tokenizer_(tokenizer, name)
    context = int(getattr(config, "max_position_embeddings", None) or UNLIMITED)
    return _new_encoder(tokenizer, _end_tokens(configs, tokenizer, name), context, name, settings)


def _location(name: str) -> str:
    """Return where a model is looked for: the folder of the shipped one, else as it is named."""
    return str(Path(__file__).parents[1] / TINY) if name == TINY else os.path.expanduser(name)


def _prepare_tokenizer_(tokenizer: Tokenizer, name: str) -> None:
    """Have a tokenizer set no limit of its own: the model's applies. Refuse a slow one."""
    if not tokenizer.is_fast:
        raise LorakitError(f"the tokenizer of {name} is a slow one; convert it to tokenizer.json")
    tokenizer.model_max_length = UNLIMITED


def load_base(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Base:
    """Load a causal language model and its tokenizer from a folder, the hub, or the package.

    Only safetensors weights are read. Raises LorakitError for what cannot be loaded, for missing
    weights, for a slow tokenizer, and for a model without an end token.
    """
    check_model(name, revision)
    quieten_transformers()
    location, options = (
        _location(name),
        {
            "revision": revision,
            "trust_remote_code": trust_remote_code,
            "local_files_only": is_only_cached(name, revision),
        },
    )
    with explaining_load_errors("the tokenizer of", name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(location, **options)
    with explaining_load_errors("the model", name):
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            location, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
        model, report = loaded
        model.to(device)
    if report["missing_keys"]:
        raise LorakitError(
            f"the model {name} has no weights for {min(report['missing_keys'])}; give a whole "
            "causal language model"
        )
    _prepare_tokenizer_(tokenizer, name)
    configs = [model.generation_config, text_config(model)]
    end_tokens = _end_tokens(configs, tokenizer, name)
    _prepare_(model, device)
    return Base(model, tokenizer, name, end_tokens, dtype, revision)


def _prepare_(model: Model, device: torch.device) -> None:
    """Freeze a freshly loaded model, and set how it computes and generates."""
    model.requires_grad_(False).eval()
    model.generation_config = transformers.GenerationConfig()  # the user's settings alone apply
    if (head := model.get_output_embeddings()) is not None:
        head.register_forward_pre_hook(_make_contiguous)
    if device.type == "cpu":
        attend_by_row(model)


@contextlib.contextmanager
def explaining_load_errors(what: str, name: str) -> Iterator[None]:
    """Turn what the libraries raise for a bad folder or hub id into a one-line LorakitError.

    `what` is `the model`, `the tokenizer of` or another part of it.
    """
    try:
        yield
    except Exception as error:  # the library tokenizers raises that very class
        if not isinstance(error, _LOAD_ERRORS) and type(error) is not Exception:
            raise
        if isinstance(error, SafetensorError):
            _check_weights(Path(_location(name)))
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LorakitError(
            f"cannot load {what} {name}: {reason.rstrip('.')}; give a folder with config.json, "
            "tokenizer.json and safetensors weights, or a hub id that can be reached"
        ) from error


def _check_weights(folder: Path) -> None:
    """Raise LorakitError for the first file of weights in a folder that is cut or damaged."""
    for path in sorted(folder.glob("*.safetensors")):
        read_tensors(path, str(path))


def quieten_transformers() -> None:
    """Silence what the libraries print while they load a model, but for bars of downloads.

    Those are drawn where stderr is a terminal, unless $HF_HUB_DISABLE_PROGRESS_BARS is set.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()  # the hub's with its own
    if not huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS:
        enable_progress_bars()
    logging.getLogger("accelerate").setLevel(logging.ERROR)


def _make_contiguous(
    module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """Copy the head's input if it is a slice; otherwise torch would copy the larger weight."""
    return tuple(tensor.contiguous() for tensor in inputs)


def _end_tokens(configs: Sequence[object], tokenizer: Tokenizer, name: str) -> tuple[int, ...]:
    """Return the end tokens that the tokenizer and the model's configs name, each once."""
    candidates = [tokenizer.eos_token_id]
    for config in configs:
        ids = getattr(config, "eos_token_id", None)
        candidates += ids if isinstance(ids, list) else [ids]
    named = [token for token in candidates if token is not None]
    if not all(isinstance(token, int) for token in named):
        raise LorakitError(
            f"the model {name} names an end token that is no number; mend eos_token_id in its "
            "config.json or generation_config.json"
        )
    ends = tuple(dict.fromkeys(named))
    if not ends:
        raise LorakitError(
            f"the model {name} has no end token; set eos_token in its tokenizer_config.json"
        )
    return ends
