"""Load base models by name, with their tokenizers: straight to their device, whole or in shards.

What a loaded base can tell is in base.py.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
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
from lorakit.models.attention import set_attention
from lorakit.models.base import UNLIMITED, Base, new_encoder
from lorakit.models.chat import Tokenizer
from lorakit.models.norms import fuse_norms_
from lorakit.models.products import speed_up_products_
from lorakit.models.quantisation import check_quantised, keep_gradients, quantising
from lorakit.models.sharding import in_turns, shard_
from lorakit.models.tokens import Encoder
from lorakit.reach import TINY, check_model, is_only_cached
from lorakit.settings import GenerationSettings, TrainingSettings

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
        location_of(name),
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
    prepare_tokenizer_(tokenizer, name)
    context = int(getattr(config, "max_position_embeddings", None) or UNLIMITED)
    return new_encoder(tokenizer, end_tokens_of(configs, tokenizer, name), context, name, settings)


def location_of(name: str) -> str:
    """Return where a model is looked for: the folder of the shipped one, else as it is named."""
    return str(Path(__file__).parents[1] / TINY) if name == TINY else os.path.expanduser(name)


def prepare_tokenizer_(tokenizer: Tokenizer, name: str) -> None:
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
    load_in: str | None = None,
    shard: bool = False,
) -> Base:
    """Load a causal language model and its tokenizer from a folder, the hub, or the package.

    Weights go straight to the device, tensor by tensor, quantised to 4 or 8 bits by `load_in`; with
    `shard`, for which torch's process group has to be there, each process gets its part of them.
    Only safetensors weights are read. Raises LorakitError for what cannot be loaded so, for missing
    weights, for a slow tokenizer, and for a model without an end token.
    """
    check_model(name, revision)
    quieten_transformers()
    location = location_of(name)
    options: dict[str, Any] = {
        "revision": revision,
        "trust_remote_code": trust_remote_code,
        "local_files_only": is_only_cached(name, revision),
    }
    with explaining_load_errors("the tokenizer of", name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(location, **options)
    with explaining_load_errors("the model", name):
        config = transformers.AutoConfig.from_pretrained(location, **options)
    check_quantised(config, name, load_in, shard=shard)
    options |= {"dtype": dtype, **quantising(load_in, device, dtype)}
    if shard:
        with in_turns():
            model = _load_model(name, location, torch.device("cpu"), options)
            shard_(model, name, device)
    else:
        model = _load_model(name, location, device, options)
    prepare_tokenizer_(tokenizer, name)
    configs = [model.generation_config, text_config(model)]
    end_tokens = end_tokens_of(configs, tokenizer, name)
    _prepare_(model, device)
    return Base(model, tokenizer, name, end_tokens, dtype, revision, load_in, shard)


def bare_model(
    name: str, location: str | Path, options: Mapping[str, Any], *, dtype: torch.dtype | None = None
) -> Model:
    """Return a model without weights: its parameters have shapes alone (torch's device `meta`).

    Nothing is read but the config, with these options. Their number format is `dtype`, by default
    the config's. Raises LorakitError for a config that transformers does not know.
    """
    trust = {"trust_remote_code": options["trust_remote_code"]}
    with explaining_load_errors("the model", name):
        config = transformers.AutoConfig.from_pretrained(location, **options)
        with torch.device("meta"):
            model: Model = transformers.AutoModelForCausalLM.from_config(
                config, **trust, **({} if dtype is None else {"dtype": dtype})
            )
    return model


def _load_model(
    name: str, location: str, device: torch.device, options: Mapping[str, object]
) -> Model:
    """Return a model on a device; LorakitError for what cannot be loaded, or lacks weights.

    On a CPU, weights that the files hold in the dtype asked for stay in them, mapped into memory.
    """
    with explaining_load_errors("the model", name):
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            location,
            device_map={"": str(device)},
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    model, report = loaded
    if report["missing_keys"]:
        raise LorakitError(
            f"the model {name} has no weights for {min(report['missing_keys'])}; give a whole "
            "causal language model"
        )
    return model


def _prepare_(model: Model, device: torch.device) -> None:
    """Freeze a freshly loaded model, and set how it computes and generates."""
    model.requires_grad_(False).eval()
    model.generation_config = transformers.GenerationConfig()  # the user's settings alone apply
    if (head := model.get_output_embeddings()) is not None:
        head.register_forward_pre_hook(_make_contiguous)
    keep_gradients(model)
    set_attention(model, device)
    if device.type == "cuda":
        fuse_norms_(model)
    else:
        speed_up_products_(model)


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
            _check_weights(Path(location_of(name)))
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
    for library in ("accelerate", "bitsandbytes"):
        logging.getLogger(library).setLevel(logging.ERROR)


def _make_contiguous(
    module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """Copy the head's input if it is a slice; otherwise torch would copy the larger weight."""
    return tuple(tensor.contiguous() for tensor in inputs)


def end_tokens_of(configs: Sequence[object], tokenizer: Tokenizer, name: str) -> tuple[int, ...]:
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
