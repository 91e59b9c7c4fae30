"""LoRA adapters in memory: one A and one B for each module they change, by PEFT's names.

It knows no files: storage.py reads, checks and writes them. What the config means is in
config.py, what a tensor is in tensors.py.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lorakit.adapters.config import config_text, scale_of
from lorakit.adapters.foreign import quote
from lorakit.adapters.names import layer_of, natural_key
from lorakit.adapters.tensors import FloatArray, Tensor
from lorakit.errors import LorakitError

Factor = Literal["A", "B"]
Factors = Mapping[
    str, tuple[FloatArray, FloatArray]
]  # A (rank, d_in) and B (d_out, rank) by module

_PREFIX = "base_model.model."
_LORA_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")


@dataclass(frozen=True)
class LoraModule:
    """A view of one A/B pair: `module`'s weights change by s·B·A.

    `a` (r × d_in) and `b` (d_out × r) are float32 and read-only; F32 tensors are not copied, others
    are widened anew at each access, so that a whole adapter never stands in memory twice.
    """

    name: str
    layer: int | None
    tensor_a: Tensor
    tensor_b: Tensor
    scale: float

    @property
    def a(self) -> FloatArray:
        return self.tensor_a.array()

    @property
    def b(self) -> FloatArray:
        return self.tensor_b.array()

    @property
    def rank(self) -> int:
        return self.tensor_a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of ΔW, (d_out, d_in)."""
        return self.tensor_b.shape[0], self.tensor_a.shape[1]

    def delta(self) -> NDArray[np.float64]:
        """Return ΔW = s·B·A (d_out × d_in), dense, computed in float64."""
        product: NDArray[np.float64] = self.b.astype(np.float64) @ self.a.astype(np.float64)
        return self.scale * product

    def norm(self) -> float:
        """Return the Frobenius norm of ΔW, |s|·√tr((BᵀB)(AAᵀ)), without the dense ΔW."""
        return abs(self.scale) * product_norm(self.a, self.b)


@dataclass(frozen=True)
class Adapter:
    """An adapter: tensors by PEFT's names, PEFT's config, and lorakit's header ({} for others').

    `name` is what messages call it. Operations return a new one; nothing here is changed in place.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    header: Mapping[str, Any] = field(default_factory=dict)
    name: str = "the adapter"

    @functools.cached_property
    def sha256(self) -> str:
        """The SHA-256 of what the adapter computes: its config's text, its tensors' own SHA-256.

        Header, file layout and the order of keys are left out, so that the single file and the
        folder of one adapter have one hash, and so has an adapter written again. Raises
        LorakitError for a value that is not finite.
        """
        hashes = _finite_hashes(self.tensors, self.name)
        listed = sorted(self.tensors.items())
        told = [[key, tensor.dtype, tensor.shape, hashes[key]] for key, tensor in listed]
        return hashlib.sha256((config_text(self.config) + json.dumps(told)).encode()).hexdigest()

    def modules(self) -> list[LoraModule]:
        """Return the A/B pairs by layer, then name; cheap, since values are converted on access."""
        return list(self._modules)

    @functools.cached_property
    def _modules(self) -> tuple[LoraModule, ...]:
        return tuple(self._module(name) for name in module_names(self.tensors))

    def _module(self, name: str) -> LoraModule:
        a, b = (self.tensors[lora_name(name, factor)] for factor in ("A", "B"))
        return LoraModule(name, layer_of(name), a, b, scale_of(self.config, name))


def lora_name(module: str, factor: Factor) -> str:
    """Return PEFT's name of the tensor that is A or B of `module`."""
    return f"{_PREFIX}{module}.lora_{factor}.weight"


def lora_parts(key: str) -> tuple[str, Factor] | None:
    """Return the module and the factor whose tensor PEFT calls `key`; None for other names."""
    match = _LORA_NAME.fullmatch(key)
    if match is None:
        return None
    return match["module"], "A" if match["factor"] == "A" else "B"


def module_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the modules that have a tensor here, by layer, then name."""
    parts = (lora_parts(key) for key in tensors)
    return sorted({found[0] for found in parts if found}, key=natural_key)


def tensors_of(factors: Factors) -> dict[str, Tensor]:
    """Return the factors as the float32 tensors of an adapter, by PEFT's names."""
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[lora_name(name, "A")] = Tensor.from_array(a)
        tensors[lora_name(name, "B")] = Tensor.from_array(b)
    return tensors


def product_norm(a: FloatArray, b: FloatArray) -> float:
    """Return the Frobenius norm of B·A for A (r × d_in) and B (d_out × r), in float64."""
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    square = float(np.sum((b64.T @ b64) * (a64 @ a64.T)))
    return math.sqrt(max(square, 0.0))


def _finite_hashes(tensors: Mapping[str, Tensor], name: str) -> dict[str, str]:
    """Return the SHA-256 of every tensor; all have finite values.

    Tensors are looked at and hashed in one pass, side by side, one on each core: of all that is
    done to an adapter it takes the longest.
    """
    from concurrent.futures import ThreadPoolExecutor

    keys = sorted(tensors)
    hashes: dict[str, str] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(Tensor.finite_sha256, (tensors[key] for key in keys))
        for key, digest in zip(keys, found, strict=True):
            if digest is None:
                where = f"{name}: tensor {quote(key)}"
                raise LorakitError(f"{where} holds values that are not finite; train it again")
            hashes[key] = digest
    return hashes
