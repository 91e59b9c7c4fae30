"""Base models and the LoRA on them: the only file that names transformers and peft.

It finds a base by name, loads it and its tokenizer, and puts adapters on it. An adapter is attached
as one PEFT adapter whose modules, ranks and scales are the adapter's own, so that what the model
computes is what PEFT computes from the adapter's folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

from lorakit.adapter import Adapter
from lorakit.batching import MicroBatch
from lorakit.encoding import Encoder
from lorakit.errors import LorakitError
from lorakit.layers import layer_of
from lorakit.model_choice import TINY

ADAPTER = "default"
PeftLayer = Any  # peft.tuners.lora.LoraLayer, whose attributes torch types too widely
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv")
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

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the fields of the config that shapes depend on."""
        config = self.model.config.get_text_config().to_dict()
        told = {name: config[name] for name in _SHAPE_FIELDS if name in config}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    @property
    def record(self) -> dict[str, str]:
        """What an adapter's header says of its base."""
        return {"name": self.name, "fingerprint": self.fingerprint}

    def uses_chat(self, choice: str) -> bool:
        """Whether the chat template is applied: `auto` where there is one, `on`, or `off`."""
        if choice == "on" and not self.tokenizer.chat_template:
            raise LorakitError(f"the tokenizer of {self.name} has no chat template; use --chat off")
        return choice == "on" or (choice == "auto" and bool(self.tokenizer.chat_template))

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
    place = str(Path(__file__).parent / TINY) if name == TINY else os.path.expanduser(name)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, **options)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            place, dtype=dtype, use_safetensors=True, **options
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LorakitError(
            f"cannot load the model {name}: {reason.rstrip('.')}; give a folder with config.json, "
            "tokenizer and safetensors weights, or a hub id that can be reached"
        ) from error
    if not tokenizer.is_fast:
        raise LorakitError(f"the tokenizer of {name} is a slow one; convert it to tokenizer.json")
    model.requires_grad_(False).eval()
    ends = _end_tokens(model, tokenizer, name)
    model.generation_config = transformers.GenerationConfig()  # its habits are not the user's wish
    model.get_output_embeddings().register_forward_pre_hook(_contiguous)
    return Base(model.to(device), tokenizer, name, ends)


def _contiguous(module: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Lay the head's input out in one piece: a slice of it is multiplied with a copied weight."""
    return (inputs[0].contiguous(),)


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


def projections(model: Any) -> dict[str, tuple[int, int]]:
    """Return (d_out, d_in) of every projection that LoRA can adapt, by module name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            found[name] = (module.out_features, module.in_features)
        elif isinstance(module, transformers.pytorch_utils.Conv1D):
            found[name] = (module.weight.shape[1], module.weight.shape[0])
    return found


def default_targets(base: Base) -> tuple[list[str], str | None]:
    """Return the query and value projections as the family names them, and a note if fused.

    Raises LorakitError for a family that neither names them q_proj and v_proj nor is known to PEFT.
    """
    there = {name.rsplit(".", 1)[-1] for name in projections(base.model)}
    if {"q_proj", "v_proj"} <= there:
        return ["q_proj", "v_proj"], None
    kind = base.model.config.model_type
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind, _FUSED)
    fused = [name for name in known if name in there]
    if not fused:
        raise LorakitError(
            f"no default target modules are known for {kind}; give --target-modules, "
            f"of {', '.join(sorted(there))}"
        )
    return fused, f"{kind} has no separate query and value projections: training {', '.join(fused)}"


def pick_modules(base: Base, targets: Sequence[str], layers: Sequence[int] | None) -> list[str]:
    """Return the names of the projections that end in one of `targets`, in the layers given.

    `all-linear` is every projection inside a decoder layer. Raises LorakitError for a target or a
    layer that the model does not have.
    """
    inside = [name for name in projections(base.model) if layer_of(name) is not None]
    if list(targets) == ["all-linear"]:
        chosen = inside
    else:
        for target in targets:
            if not any(_ends_in(name, target) for name in inside):
                there = sorted({name.rsplit(".", 1)[-1] for name in inside})
                raise LorakitError(
                    f"{base.name} has no module {target}; choose --target-modules from "
                    f"{', '.join(there)}"
                )
        chosen = [name for name in inside if any(_ends_in(name, target) for target in targets)]
    if layers is None:
        return chosen
    beyond = [layer for layer in layers if layer >= base.layers]
    if beyond:
        raise LorakitError(
            f"{base.name} has no layer {beyond[0]}; give --layers within 0-{base.layers - 1}"
        )
    return [name for name in chosen if layer_of(name) in layers]


def _ends_in(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def is_transposed(base: Base, modules: Sequence[str]) -> bool:
    """Whether the weights of these modules lie (d_in, d_out), PEFT's `fan_in_fan_out`."""
    return isinstance(base.model.get_submodule(modules[0]), transformers.pytorch_utils.Conv1D)


def inject(
    base: Base, ranks: Mapping[str, int], *, alpha: float | None = None, dropout: float = 0.0
) -> dict[str, PeftLayer]:
    """Put a fresh LoRA of the given rank on each module named; return PEFT's layers by name.

    The scale is alpha/rank, or 1 where no alpha is given. Weights are float32, A as PEFT
    initialises it, B zero; nothing is trainable yet but these. The base changes in place.
    """
    rank = max(ranks.values())
    other = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank}
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=list(ranks),
        rank_pattern=other,
        alpha_pattern=dict(other) if alpha is None else {},
        fan_in_fan_out=is_transposed(base, list(ranks)),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():  # adapters of a base that has one already replace it
        warnings.filterwarnings("ignore", message="You are trying to modify a model with PEFT")
        peft.inject_adapter_in_model(config, base.model, adapter_name=ADAPTER)
    layers: dict[str, PeftLayer] = {name: base.model.get_submodule(name) for name in ranks}
    for layer in layers.values():
        for factors in (layer.lora_A, layer.lora_B):
            factors[ADAPTER].to(torch.float32)
    base.model.eval()
    return layers


def attach(base: Base, adapter: Adapter) -> dict[str, PeftLayer]:
    """Put an adapter on its base: the model then computes W0·x + s·B·A·x; return PEFT's layers.

    Raises LorakitError naming the module and both shapes where the adapter does not fit.
    """
    modules = adapter.modules()
    check_fits(base, adapter)
    layers = inject(base, {module.name: module.rank for module in modules})
    for module in modules:
        layer = layers[module.name]
        set_factors(layer, module.a, module.b)
        layer.scaling[ADAPTER] = module.scale
    return layers


def set_factors(layer: PeftLayer, a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> None:
    """Copy A (rank, d_in) and B (d_out, rank) into a PEFT layer."""
    with torch.no_grad():
        layer.lora_A[ADAPTER].weight.copy_(torch.tensor(a))
        layer.lora_B[ADAPTER].weight.copy_(torch.tensor(b))


def factors(layer: PeftLayer) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """Return the A (rank, d_in) and B (d_out, rank) of a PEFT layer."""
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


def check_fits(base: Base, adapter: Adapter) -> None:
    """Raise LorakitError naming the first module the base lacks or has in another shape."""
    there = projections(base.model)
    for module in adapter.modules():
        if module.name not in there:
            raise LorakitError(
                f"{adapter.name}: {base.name} has no module {module.name}; "
                "give the base the adapter was trained on by --model"
            )
        shape = (module.b.shape[0], module.a.shape[1])
        if shape != there[module.name]:
            raise LorakitError(
                f"{adapter.name}: {module.name} is {_by(shape)}, in {base.name} it is "
                f"{_by(there[module.name])}; give the base the adapter was trained on by --model"
            )


def _by(shape: tuple[int, int]) -> str:
    return f"{shape[0]}×{shape[1]}"


def completion_logits(model: Any, batch: MicroBatch) -> torch.Tensor:
    """Return the logits (rows, kept, vocabulary) of a micro-batch's last `kept` positions.

    They come from the model's own forward, soft-capping, head bias and all; positions are counted
    without the padding on the left.
    """
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    kept = batch.labels.shape[1]
    takes = inspect.signature(model.forward).parameters
    if batch.mask is not None:
        inputs["attention_mask"] = batch.mask.long()
        if "position_ids" in takes:
            inputs["position_ids"] = (batch.mask.long().cumsum(-1) - 1).clamp_min(0)
    if "logits_to_keep" in takes:
        inputs["logits_to_keep"] = kept
    logits: torch.Tensor = model(**inputs).logits
    return logits[:, -kept:]


def new_generation_config(base: Base, **settings: Any) -> Any:
    """Return a generation config of these settings alone, none of those the model came with."""
    return transformers.GenerationConfig(eos_token_id=list(base.end_tokens), **settings)


@contextlib.contextmanager
def activation_checkpointing(model: Any) -> Iterator[None]:
    """Compute activations twice inside the block to hold fewer; no layer's dropout is switched on.

    A layer checkpoints only while its own `training` flag is set; its parts keep theirs.
    """
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
