"""A base without its weights: what `--dry-run` asks instead of the base that a run would load.

The tokenizer and the configs are read, and the model is built on torch's device `meta`, where
parameters have shapes alone. The device of the run may be another machine's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers

from lorakit.errors import LorakitError
from lorakit.models.architecture import Model, forward_parameters, text_config
from lorakit.models.attention import attends_by_row
from lorakit.models.base import Base
from lorakit.models.batches import NEEDED_TO_PACK
from lorakit.models.estimate import (
    Decoder,
    Part,
    Precision,
    Shapes,
    count_parameters,
    decoder_of,
    quantised_bytes,
    weight_bytes,
)
from lorakit.models.loading import (
    bare_model,
    end_tokens_of,
    explaining_load_errors,
    location_of,
    prepare_tokenizer_,
    quieten_transformers,
)
from lorakit.models.lora import projections
from lorakit.models.norms import fusible_norms, lean_norms
from lorakit.models.rotary import fusible_modules
from lorakit.models.swiglu import fusible_mlps
from lorakit.reach import check_model, is_only_cached


def load_skeleton(
    name: str,
    *,
    dtype: torch.dtype,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Base:
    """Load a base without its weights: its parameters have shapes alone (torch's device `meta`).

    Only the tokenizer and the configs are read. Raises LorakitError as `load_base` does.
    """
    check_model(name, revision)
    quieten_transformers()
    location, options = (
        location_of(name),
        {
            "revision": revision,
            "trust_remote_code": trust_remote_code,
            "local_files_only": is_only_cached(name, revision),
        },
    )
    with explaining_load_errors("the tokenizer of", name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(location, **options)
    model = bare_model(name, location, options, dtype=dtype)
    prepare_tokenizer_(tokenizer, name)
    end_tokens = end_tokens_of([model.generation_config, text_config(model)], tokenizer, name)
    model.requires_grad_(False).eval()
    return Base(model, tokenizer, name, end_tokens, dtype, revision)


@dataclass(frozen=True)
class Skeleton:
    """A base without weights, the device of the run, and the bytes of a quantised weight.

    The device may be another machine's. Without `quantised_bytes` the base's own config says
    whether its projections are quantised.
    """

    base: Base
    device: torch.device
    bytes_each: float | None = None

    @property
    def decoder(self) -> Decoder:
        """The widths of the text decoder.

        Raises LorakitError for a config that does not tell them.
        """
        try:
            return decoder_of(text_config(self.base.model))
        except (AttributeError, TypeError) as error:
            raise LorakitError(
                f"the config of {self.base.name} does not tell the widths of its layers "
                f"({error}); leave --dry-run out"
            ) from error

    @property
    def precision(self) -> Precision:
        """Bytes of the values that the model computes; most attend in float32 on a CPU."""
        value = self.base.dtype.itemsize
        model, on_cpu = self.base.model, self.device.type == "cpu"
        attention = text_config(model)._attn_implementation
        by_row = attends_by_row(model, self.device)
        norms = {"cpu": lean_norms, "cuda": fusible_norms}.get(self.device.type)
        return Precision(
            value,
            4 if by_row else value,
            eager=attention == "eager",
            norm=value if norms and any(norms(model)) else 4,
            mlp=2 if any(fusible_mlps(model)) else 3,
            cosines_by_head=not on_cpu and any(fusible_modules(model)),
        )

    @property
    def packs(self) -> bool:
        """Whether rows are packed, if the trial that needs weights shows nothing else."""
        model = self.base.model
        return (
            self.device.type in ("cpu", "cuda")
            and text_config(model)._attn_implementation == "sdpa"
            and set(forward_parameters(model)) >= NEEDED_TO_PACK
        )

    @property
    def shapes(self) -> Shapes:
        return projections(self.base.model)

    def base_part(self) -> Part:
        """Return the memory of the base's weights."""
        model, dtype = self.base.model, str(self.base.dtype).removeprefix("torch.")
        own = getattr(text_config(model), "quantization_config", None)
        own = own or getattr(model.config, "quantization_config", None)
        each = self.bytes_each or quantised_bytes(own if isinstance(own, dict) else None)
        count = f"{count_parameters(model):,} parameters"
        if each is None:
            return Part("base weights", weight_bytes(model), f"{count} in {dtype}")
        quantised = _quantised(model)
        return Part(
            "base weights",
            weight_bytes(model, quantised, each),
            f"{count}, those of {len(quantised)} projections at {each:.3g} bytes, others {dtype}",
        )


def _quantised(model: Model) -> list[str]:
    """Return the projections that quantisation changes: all but the output head."""
    head = model.get_output_embeddings()
    return [name for name in projections(model) if model.get_submodule(name) is not head]
